"""The operator, readable: the recurrence, and its chunkwise form, against the array API standard (torch and jax.numpy).

Differentiable by the framework's own autodiff; in float64 it is what everything else is held against.
Shapes: q, k (B, H, T, K); v (B, H, T, V); i, f (B, H, T) pre-activations; c (B, H, K, V); n (B, H, K); m (B, H).
Mathematics: m_t = max(log f_t + m_{t-1}, i_t) keeps exponentials at most 1; only c e^m and n e^m have meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat

Array = Any
StopGradient = Callable[[Array], Array]
Scan = Callable[[Callable[[Any, Any], tuple[Any, Array]], Any, Sequence[Array]], tuple[Any, Array]]


def log_sigmoid(xp: Any, x: Array) -> Array:
    """-log(1 + exp(-x)) without overflow; a closed gate of -inf counts as -1e6 so that sums stay finite."""
    x = xp.where(x < -1e6, xp.asarray(-1e6, dtype=x.dtype), x)
    return -xp.logaddexp(xp.zeros_like(x), -x)


def finite(xp: Any, m: Array) -> Array:
    """A stabiliser as a scale: 0 for that of -inf, while nothing has a weight."""
    return xp.where(m > -float("inf"), m, xp.zeros_like(m))


def _normaliser(
    xp: Any, eps: float, normalize: bool, normalizer_grad: str, stop_gradient: StopGradient
) -> Callable[[Array, Array, Array], Array]:
    """The function from h's numerator, the signed normaliser r and the stabiliser to h."""

    def normalised(num: Array, r: Array, m: Array) -> Array:
        if not normalize:
            return num
        d = xp.maximum(xp.abs(r), xp.exp(-m)) + eps
        return num / (stop_gradient(d) if normalizer_grad == "detached" else d)[..., None]

    return normalised


def recurrent(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    c: Array,
    n: Array,
    m: Array,
    *,
    scale: float,
    eps: float,
    normalizer_grad: str,
    stop_gradient: StopGradient,
    input_gate: str = "exponential",
    normalize: bool = True,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Token by token. Returns h (B, H, T, V) and the last (c, n, m).

    input_gate "sigmoid": log(sigmoid(i)) for i, and no stabiliser: m is 0. normalize False: h = c^T (s q); n stays 0.
    """
    xp = array_api_compat.array_namespace(q)
    log_f = log_sigmoid(xp, f)
    sigmoid = input_gate == "sigmoid"
    i = log_sigmoid(xp, i) if sigmoid else i
    n = n if normalize else xp.zeros_like(n)
    normalised = _normaliser(xp, eps, normalize, normalizer_grad, stop_gradient)
    hs = []
    for t in range(q.shape[2]):
        m_new = xp.zeros_like(m) if sigmoid else xp.maximum(log_f[:, :, t] + m, i[:, :, t])
        scale_m = finite(xp, m_new)
        keep = xp.exp(log_f[:, :, t] - (scale_m - m))  # stabilisers may be large, but their difference is exact
        add = xp.exp(i[:, :, t] - scale_m)
        k_t, v_t, q_t = k[:, :, t, :], v[:, :, t, :], q[:, :, t, :] * scale
        c = keep[:, :, None, None] * c + add[:, :, None, None] * k_t[:, :, :, None] * v_t[:, :, None, :]
        n = keep[:, :, None] * n + add[:, :, None] * k_t if normalize else n
        m = m_new
        # h does not depend on how (c, n, m) is scaled: m is a constant here, and `one` carries what that leaves out.
        m_const = stop_gradient(m)
        one = xp.exp(scale_m - stop_gradient(scale_m))
        num = xp.sum(q_t[:, :, :, None] * c, axis=2) * one[:, :, None]
        r = xp.sum(q_t * n, axis=2) * one
        hs.append(normalised(num, r, m_const))
    return xp.stack(hs, axis=2), (c, n, m)


def python_scan(step: Callable[[Any, Any], tuple[Any, Array]], carry: Any, xs: Sequence[Array]) -> tuple[Any, Array]:
    """The meaning of `lax.scan` over the first axis, as a loop."""
    xp = array_api_compat.array_namespace(xs[0])
    ys = []
    for n in range(xs[0].shape[0]):
        carry, y = step(carry, tuple(x[n] for x in xs))
        ys.append(y)
    return carry, xp.stack(ys)


def chunkwise(
    q: Array,
    k: Array,
    v: Array,
    i: Array,
    f: Array,
    c: Array,
    n: Array,
    m: Array,
    *,
    chunk_size: int,
    scale: float,
    eps: float,
    normalizer_grad: str,
    stop_gradient: StopGradient,
    scan: Scan = python_scan,
    input_gate: str = "exponential",
    normalize: bool = True,
    held: bool = False,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Chunk by chunk: attention inside a chunk, a state between chunks. Same result as `recurrent` to rounding.

    held: stabilisers between chunks are constants in the backward pass, as the kernels have them. The same gradients,
    since h does not depend on them; but other terms cancel, and other roundings are left.
    """
    xp = array_api_compat.array_namespace(q)
    B, H, T, _ = q.shape
    L = min(chunk_size, T)
    n_chunks = -(-T // L)
    log_f = log_sigmoid(xp, f)
    sigmoid = input_gate == "sigmoid"
    i = log_sigmoid(xp, i) if sigmoid else i
    n = n if normalize else xp.zeros_like(n)
    normalised = _normaliser(xp, eps, normalize, normalizer_grad, stop_gradient)
    o = xp.arange(L, device=array_api_compat.device(q)) if array_api_compat.is_torch_array(q) else xp.arange(L)
    causal, after = o[None, :] <= o[:, None], o[None, :] < o[:, None]

    def chunks(x: Array, fill: float) -> Array:
        """(B, H, T, ...) -> (n_chunks, B, H, L, ...), the tail filled."""
        missing = n_chunks * L - T
        if missing:
            tail = xp.zeros_like(x[:, :, :1, ...]) + fill
            x = xp.concat([x, *[tail] * missing], axis=2)
        x = xp.reshape(x, (B, H, n_chunks, L, *x.shape[3:]))
        return xp.permute_dims(x, (2, 0, 1, *range(3, len(x.shape))))

    def step(state: tuple[Array, Array, Array], chunk: tuple[Array, ...]) -> tuple[Any, Array]:
        c, n, m_exact = state
        m = stop_gradient(m_exact) if held else m_exact
        q_c, k_c, v_c, i_c, log_f_c = chunk
        b = xp.cumulative_sum(log_f_c, axis=-1)  # [B, H, L]
        # log f summed over j < t <= i, each sum for itself: differences of b would lose digits behind a closed gate.
        between = xp.where(after, log_f_c[..., :, None], xp.asarray(0.0, dtype=q.dtype))
        passed = xp.cumulative_sum(between, axis=-2)  # [B, H, L, L]
        log_d = xp.where(causal, passed + i_c[..., None, :], xp.asarray(-float("inf"), dtype=q.dtype))
        m_row = xp.zeros_like(b)
        if not sigmoid:
            m_row = stop_gradient(xp.maximum(b + m[..., None], xp.max(log_d, axis=-1)))  # h is independent of it
        # Gates and stabilisers may be large: their differences first, which are exact, then the sums of log f.
        scale_row = finite(xp, m_row)
        weights = xp.where(causal, passed - (scale_row[..., None] - i_c[..., None, :]), log_d)
        s = (q_c @ xp.matrix_transpose(k_c)) * scale * xp.exp(weights)
        from_state = xp.exp(b - (scale_row - m[..., None])) * scale
        num = s @ v_c + from_state[..., None] * (q_c @ c)
        r = xp.sum(s, axis=-1) + from_state * xp.sum(q_c * n[..., None, :], axis=-1)
        h = normalised(num, r, m_row)

        total, after_token = b[..., -1], passed[..., -1, :]
        m_new = xp.zeros_like(m) if sigmoid else xp.maximum(total + m_exact, xp.max(after_token + i_c, axis=-1))
        scale_new = finite(xp, stop_gradient(m_new) if held else m_new)
        keep = xp.exp(total - (scale_new - m))
        k_a = k_c * xp.exp(after_token - (scale_new[..., None] - i_c))[..., None]
        c = keep[..., None, None] * c + xp.matrix_transpose(k_a) @ v_c
        n = keep[..., None] * n + xp.sum(k_a, axis=-2) if normalize else n
        return (c, n, m_new), h

    # The tail remembers everything (log f = 0) and adds nothing (i = -inf, but finite).
    xs = (chunks(q, 0.0), chunks(k, 0.0), chunks(v, 0.0), chunks(i, -1e30), chunks(log_f, 0.0))

    def weighted(c: Array, n: Array, m: Array, sign: float) -> tuple[Array, Array, Array]:
        """The same state; its derivative by m that of C e^m and n e^m, or of C e^-m and n e^-m."""
        known = finite(xp, m)
        one = xp.exp(sign * (known - stop_gradient(known)))
        return c * one[..., None, None], n * one[..., None], m

    (c, n, m), hs = scan(step, weighted(c, n, m, 1.0) if held else (c, n, m), xs)
    state = weighted(c, n, m, -1.0) if held else (c, n, m)
    h = xp.reshape(xp.permute_dims(hs, (1, 2, 0, 3, 4)), (B, H, n_chunks * L, v.shape[-1]))
    return h[:, :, :T, :], state
