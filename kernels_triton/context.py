"""What devices tell each other where a sequence is split over them, and what each makes of it: array API, O(state).

A segment is one device's part of the sequence. Forward, every segment's state from a start of 0 is gathered, C and n
scaled by exp(-m) of its own m; what stands before segment s is their sum, each decayed by the segments between:

    C_s = sum_{r<s} exp(m_r + F_{r+1} + ... + F_{s-1} - m) C_r       F: a segment's sum of log f

Backward, in mirror image, what every segment adds to the cotangent of its initial state, whose stabiliser is m_initial;
that of segment s's last state is

    dC_s = sum_{r>s} exp(m_last_s + F_{s+1} + ... + F_{r-1} - m_initial_r) dC_r

Exponents are sums of their own terms, never differences of prefix sums, and none is positive but for rounding.
Gathered arrays have an axis of segments first: c (P, B, H, K, V), n (P, B, H, K), numbers (P, B, H).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import array_api_compat

from .problem import Problem
from .reference import finite

Array = Any
State = tuple[Array, Array, Array]
# Of a segment's start, where there is nothing that a stabiliser would have to hold: any token exceeds it.
NO_STABILISER = -1e30


def exchanged_bytes(B: int, H: int, K: int, V: int) -> tuple[int, int]:
    """What one device hands to the gathering of the forward pass, and to that of the backward pass."""
    return 4 * B * H * (K * V + K + 2), 4 * B * H * (K * V + K + 3)


def pack(c: Array, n: Array, *numbers: Array) -> Array:
    """What one device tells the others, as one array (B, H, K * V + K + numbers)."""
    xp = array_api_compat.array_namespace(c)
    B, H = c.shape[:2]
    one_each = [xp.astype(x, c.dtype)[..., None] for x in numbers]
    return xp.concat([xp.reshape(c, (B, H, -1)), n, *one_each], axis=-1)


def unpack(packed: Array, K: int, V: int) -> tuple[Array, Array, tuple[Array, ...]]:
    """c, n and the numbers, of one device or gathered."""
    xp = array_api_compat.array_namespace(packed)
    c = xp.reshape(packed[..., : K * V], (*packed.shape[:-1], K, V))
    n = packed[..., K * V : K * V + K]
    return c, n, tuple(packed[..., x] for x in range(K * V + K, packed.shape[-1]))


def _where(counts: Array | None, x: Array, other: float) -> Array:
    """x where `counts`, on x's first axes, holds; all of it where that is None."""
    if counts is None:
        return x
    xp = array_api_compat.array_namespace(x)
    counts = xp.reshape(counts, (*counts.shape, *(1,) * (len(x.shape) - len(counts.shape))))
    return xp.where(counts, x, other)


def _select(index: Any, before: bool, decays: Array, *arrays: Array) -> tuple[Array | None, Array, list[Array]]:
    """Of the segments before `index`, or those after it: which count, the sums of log f from there to it, the arrays.

    Where the host knows the index, of those segments alone, and all count: few small operations in place of many.
    """
    xp = array_api_compat.array_namespace(decays)
    if not isinstance(index, int):
        o = xp.arange(decays.shape[0])
        counts = o < index if before else o > index
        nearer = o[:, None] < o[None, :] if before else o[None, :] < o[:, None]
        return counts, xp.sum(_where(counts[None, :] & nearer, decays[None], 0.0), axis=1), list(arrays)
    part = slice(index) if before else slice(index + 1, None)
    step = -1 if before else 1
    between = [xp.zeros_like(decays[0])]
    for x in [*decays[part]][::step][:-1]:
        between.append(between[-1] + x)
    return None, xp.stack(between[::step]), [x[part] for x in arrays]


def _sum(counts: Array | None, exponents: Array, x: Array) -> Array:
    """The sum over segments, weighted; those that do not count add nothing, whatever they hold."""
    xp = array_api_compat.array_namespace(x)
    weights = xp.exp(_where(counts, exponents, NO_STABILISER))
    return xp.sum(_where(counts, weights[(..., *(None,) * (len(x.shape) - 3))] * x, 0.0), axis=0)


def summary(results: Mapping[str, Array]) -> Array:
    """What a segment tells the others in the forward pass, from the results of `plan.segment_state`."""
    xp = array_api_compat.array_namespace(results["c_last"])
    decay = xp.sum(results["totals"][:, :, :2, :], axis=(2, 3))
    return pack(results["c_last"], results["n_last"], results["m_last"], decay)


def state_before(problem: Problem, gathered: Array, first: State, index: Any) -> tuple[State, Array]:
    """(c, n, m) before segment `index`, and all segments' sums of log f.

    gathered: of what `summary` packed; first: the state before segment 0.
    """
    xp = array_api_compat.array_namespace(gathered)
    c_own, n_own, (m_own, decays) = unpack(gathered, problem.K, problem.V)
    if isinstance(index, int) and index == 0:
        return first, decays
    c, n, m = first
    earlier, between, (c_own, n_own, m_own, passed) = _select(index, True, decays, c_own, n_own, m_own, decays)
    passed = xp.sum(_where(earlier, passed, 0.0), axis=0)
    if problem.input_gate == "sigmoid":  # without stabiliser, but for the given one of the initial state
        highest = xp.zeros_like(m) if earlier is None else xp.where(earlier[0], xp.zeros_like(m), m)
    else:
        highest = xp.maximum(m + passed, xp.max(_where(earlier, m_own + between, NO_STABILISER), axis=0))
    # Stabilisers may be large: their differences first, which are exact. C and n belong to the rounded `highest` then.
    scale = finite(xp, highest)
    exponents = between - (scale - m_own)
    keep = xp.exp(passed - (scale - m))
    c = keep[..., None, None] * c + _sum(earlier, exponents, c_own)
    n = keep[..., None] * n + _sum(earlier, exponents, n_own)
    return (c, n, highest), decays


def remainder(dlast: State, last: State) -> Array:
    """What is left of a last stabiliser's cotangent: that of the stabiliser beyond its scaling C and n."""
    xp = array_api_compat.array_namespace(last[0])
    (dc, dn, dm), (c, n, _) = dlast, last
    return dm - xp.sum(dc * c, axis=(2, 3)) - xp.sum(dn * n, axis=2)


def share(results: Mapping[str, Array], m_initial: Array, rho: Array | None, picked: Array | None) -> Array:
    """What a segment tells the others in the backward pass, from the results of `plan.segment_cotangent`.

    rho: `remainder` of its own last state, if that has a cotangent. picked: of its forward pass, negative where
    the last stabiliser comes from the initial one, and so its remainder goes on to the segments before.
    """
    xp = array_api_compat.array_namespace(m_initial)
    zeros = xp.zeros_like(m_initial)
    told = (zeros, zeros) if rho is None or picked is None else (rho, picked < 0)
    return pack(results["dc_initial"], results["dn_initial"], m_initial, *told)


def cotangent_after(
    problem: Problem, gathered: Array, decays: Array, m_last: Array, own: State | None, index: Any
) -> tuple[Array, Array, Array | None]:
    """The cotangents of C and n after segment `index`, and what is left of that of m.

    gathered: of what `share` packed; decays: of `state_before`; own: cotangents of its last state as its caller gave
    them, the last one already a `remainder`.
    """
    xp = array_api_compat.array_namespace(gathered)
    dc, dn, (m_initial, rho, passes) = unpack(gathered, problem.K, problem.V)
    if isinstance(index, int) and index == gathered.shape[0] - 1:
        return own or (xp.zeros_like(dc[0]), xp.zeros_like(dn[0]), None)
    # A remainder comes from a segment if each from there to this one lets it pass: it goes by counts as decays do.
    stops = 1.0 - passes
    later, between, (dc, dn, m_initial, rho, own_stops) = _select(index, False, decays, dc, dn, m_initial, rho, stops)
    exponents = m_last - m_initial + between
    dc, dn = _sum(later, exponents, dc), _sum(later, exponents, dn)
    if own is None:
        return dc, dn, None
    stopped = _select(index, False, stops)[1] + own_stops
    reached = xp.where(stopped > 0, xp.zeros_like(rho), rho)
    return own[0] + dc, own[1] + dn, own[2] + xp.sum(_where(later, reached, 0.0), axis=0)
