"""Prefix sums of the gates inside chunks, and the kernel for them alone."""

import triton
import triton.language as tl

from .common import NEG_INF, store_pair

# A closed forget gate below this cannot be told from -inf in any state; finite, so that prefix sums stay finite.
LOG_FORGET_MIN = tl.constexpr(-1e6)
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def log_forget(x, IS_LOG: tl.constexpr):
    """log(sigmoid(x)) in float64, stable on both sides; x itself where it is that logarithm already."""
    if IS_LOG:
        y = x
    else:
        y = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    y = tl.where(x != x, x, y)
    return tl.where(y < LOG_FORGET_MIN, LOG_FORGET_MIN, y)


@triton.jit
def log_input(i, i_sb, i_sh, i_st, head, t, m_t, H: tl.constexpr, SIGMOID: tl.constexpr):
    """The logarithm of the input gate in float64: its pre-activation, or log(sigmoid) of that; -inf beyond T."""
    p_i = i + (head // H) * i_sb + (head % H) * i_sh
    y = tl.load(p_i + t.to(tl.int64) * i_st, mask=m_t, other=NEG_INF).to(tl.float64)
    if SIGMOID:
        y = tl.where(m_t, log_forget(y, False), NEG_INF)
    return y


@triton.jit
def _as_pair(x):
    """x rounded to what two float32 hold."""
    hi = x.to(tl.float32).to(tl.float64)
    return tl.where(x == hi, hi, hi + (x - hi).to(tl.float32).to(tl.float64))


@triton.jit
def then(total_x, best_x, total_y, best_y):
    """Two stretches of tokens, one after the other: what they add to a stabiliser, and the least they leave."""
    return total_x + total_y, tl.maximum(best_x + total_y, best_y)


@triton.jit
def load_float64(x, o, step):
    """A float64 whose halves are two int32, x[o] and x[o + step]: JAX has no float64 of its own by default."""
    bits = (tl.load(x + o).to(tl.int64) << 32) | (tl.load(x + o + step).to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _store_float64(x, o, step, value):
    bits = value.to(tl.int64, bitcast=True)
    tl.store(x + o, (bits >> 32).to(tl.int32))
    tl.store(x + o + step, bits.to(tl.int32))


@triton.jit
def _last(x, G: tl.constexpr):
    return tl.max(tl.where(tl.arange(0, G) == G - 1, x, NEG_INF), 0)


@triton.jit
def chunk_sums(
    i, i_sb, i_sh, i_st, f, f_sb, f_sh, f_st, head, t, m_t,
    H: tl.constexpr,
    L: tl.constexpr,
    HAS_I: tl.constexpr,
    F_IS_LOG: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    """Of some chunks' tokens t, in float64: prefix sums b of log f, i - b, b's total, the largest i - b, its token."""
    p_f = f + (head // H) * f_sb + (head % H) * f_sh
    if HAS_I:
        b_i = log_input(i, i_sb, i_sh, i_st, head, t, m_t, H, SIGMOID)
    else:
        b_i = tl.where(m_t, 0.0, NEG_INF).to(tl.float64)
    b_f = tl.load(p_f + t.to(tl.int64) * f_st, mask=m_t, other=0.0).to(tl.float64)
    b_logf = tl.where(m_t, log_forget(b_f, F_IS_LOG), 0.0)  # beyond T: remembers all, adds nothing
    b_sum = tl.cumsum(b_logf, 1)
    total = tl.sum(tl.where(tl.arange(0, L)[None, :] == L - 1, b_sum, 0.0), 1)
    b_c = b_i - b_sum
    largest = tl.max(b_c, 1)
    token = tl.min(tl.where(b_c == largest[:, None], t, NO_TOKEN), 1)
    # As pairs, so that one launch and two launches give the same bits.
    b_sum = _as_pair(b_sum)
    return b_sum, b_i - b_sum, _as_pair(total), _as_pair(largest), token


@triton.jit(
    do_not_specialize_on_alignment=[
        "i_sb", "i_sh", "i_st", "f_sb", "f_sh", "f_st", "T",
    ],
)  # fmt: skip
def gates_sums(
    i, i_sb, i_sh, i_st,  # (B, H, T) input gate pre-activations
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations
    T,
    sums,  # (B, H, 2, NT * L) pair: prefix sum of log f inside the chunk
    totals,  # (B, H, 4, NT) pairs: its total; the largest i - b
    tokens,  # (B, H, NT) int32: the token of the latter
    groups,  # (B, H, 4, groups of G chunks) int32, halves of float64: a group's total; the least that it leaves
    H: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    """One program per head and G chunks: what costs time in float64, where one program per head would be too few."""
    n_chunks = tl.cdiv(T, L)
    n_groups = tl.cdiv(n_chunks, G)
    padded = n_chunks.to(tl.int64) * L
    pid = tl.program_id(0).to(tl.int64)
    head = pid // n_groups
    n = (pid % n_groups).to(tl.int32) * G + tl.arange(0, G)
    m_n = n < n_chunks
    t = n[:, None] * L + tl.arange(0, L)[None, :]
    b_sum, _, total, largest, token = chunk_sums(
        i, i_sb, i_sh, i_st, f, f_sb, f_sh, f_st, head, t, t < T, H, L, True, False, SIGMOID
    )
    p_sums = sums + head * 2 * padded
    p_totals = totals + head * 4 * n_chunks
    store_pair(p_sums, p_sums + padded, t, b_sum, m_n[:, None] & (t >= 0))
    store_pair(p_totals, p_totals + n_chunks, n, total, m_n)
    store_pair(p_totals + 2 * n_chunks, p_totals + 3 * n_chunks, n, largest, m_n)
    tl.store(tokens + head * n_chunks + n, token, mask=m_n)
    totals_to, best_to = tl.associative_scan((total, largest + total), 0, then)
    o_group = head * 4 * n_groups + pid % n_groups
    _store_float64(groups, o_group, n_groups, _last(totals_to, G))
    _store_float64(groups, o_group + 2 * n_groups, n_groups, _last(best_to, G))
