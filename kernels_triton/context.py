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


def _segments(gathered: Array) -> Array:
    """The segments' numbers, 0 to P - 1."""
    xp = array_api_compat.array_namespace(gathered)
    on = {"device": array_api_compat.device(gathered)} if array_api_compat.is_torch_array(gathered) else {}
    return xp.arange(gathered.shape[0], **on)


def _where(condition: Array, x: Array, other: float) -> Array:
    """x where the condition, on x's first axes, holds."""
    xp = array_api_compat.array_namespace(x)
    condition = xp.reshape(condition, (*condition.shape, *(1,) * (len(x.shape) - len(condition.shape))))
    return xp.where(condition, x, xp.asarray(other, dtype=x.dtype))


def _sum(counts: Array, exponents: Array, x: Array) -> Array:
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
    c, n, m = first
    o = _segments(gathered)
    earlier = o < index
    between = earlier[None, :] & (o[:, None] < o[None, :])
    exponents = m_own + xp.sum(_where(between, decays[None], 0.0), axis=1)
    start = m + xp.sum(_where(earlier, decays, 0.0), axis=0)
    if problem.input_gate == "sigmoid":  # without stabiliser, but for the given one of the initial state
        highest = xp.where(earlier[0], xp.zeros_like(m), m)
    else:
        highest = xp.maximum(start, xp.max(_where(earlier, exponents, NO_STABILISER), axis=0))
    keep = xp.exp(start - highest)
    c = keep[..., None, None] * c + _sum(earlier, exponents - highest, c_own)
    n = keep[..., None] * n + _sum(earlier, exponents - highest, n_own)
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
    o = _segments(gathered)
    later = o > index
    between = later[None, :] & (o[None, :] < o[:, None])
    exponents = m_last - m_initial + xp.sum(_where(between, decays[None], 0.0), axis=1)
    dc, dn = _sum(later, exponents, dc), _sum(later, exponents, dn)
    if own is None:
        return dc, dn, None
    through = later[None, :] & (o[None, :] <= o[:, None])
    stopped = xp.sum(_where(through, 1.0 - passes[None], 0.0), axis=1)
    reached = xp.where(stopped > 0, xp.zeros_like(rho), rho)
    return own[0] + dc, own[1] + dn, own[2] + xp.sum(_where(later, reached, 0.0), axis=0)
