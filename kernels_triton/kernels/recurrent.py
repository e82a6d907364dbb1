"""The recurrence token by token, for short sequences: the state is read once and written once."""

import triton
import triton.language as tl

from .common import NEG_INF, cast
from .gates_sums import log_forget
from .tiles import contiguous_rows, load_vector, store_vector


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st",
        "i_sb", "i_sh", "i_st", "f_sb", "f_sh", "f_st", "T",
    ],
)  # fmt: skip
def recurrent(
    q, q_sb, q_sh, q_st,  # (B, H, T, K)
    k, k_sb, k_sh, k_st,  # (B, H, T, K)
    v, v_sb, v_sh, v_st,  # (B, H, T, V)
    i, i_sb, i_sh, i_st,  # (B, H, T) input gate pre-activations
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations
    c_initial,  # (B, H, K, V) if HAS_INITIAL
    n_initial,  # (B, H, K) if HAS_INITIAL and NORMALIZE
    m_initial,  # (B, H) if HAS_INITIAL
    T,
    h,  # (B, H, T, V) or (B, T, H, V)
    c_last,  # (B, H, K, V)
    n_last,  # (B, H, K)
    m_last,  # (B, H)
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BTHD: tl.constexpr,
):  # fmt: skip
    """One program per head and tile of BV values; BK covers K. c_last may be c_initial: each owns its tile."""
    NVT: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    head = pid // NVT
    vt = (pid % NVT).to(tl.int32)
    batch, h_ = head // H, head % H
    o_k = tl.arange(0, BK)
    o_v = vt * BV + tl.arange(0, BV)
    o_c = head * K * V + o_k[:, None] * V + o_v[None, :]
    m_c = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_c = tl.zeros([BK, BV], tl.float32)
    b_n = tl.zeros([BK], tl.float32)
    m = tl.full([], 0.0, tl.float32)
    if HAS_INITIAL:
        b_c = tl.load(c_initial + o_c, mask=m_c, other=0.0).to(tl.float32)
        m = tl.load(m_initial + head)
        if NORMALIZE:
            b_n = load_vector(n_initial + head * K, o_k, K, BK)
    p_h, h_row = contiguous_rows(head, 0, T, H, V, BTHD)

    t = tl.full([], 0, tl.int64)
    for _ in range(0, T):
        b_q = load_vector(q + batch * q_sb + h_ * q_sh + t * q_st, o_k, K, BK).to(tl.float32) * SCALE
        b_k = load_vector(k + batch * k_sb + h_ * k_sh + t * k_st, o_k, K, BK).to(tl.float32)
        b_v = load_vector(v + batch * v_sb + h_ * v_sh + t * v_st, o_v, V, BV).to(tl.float32)
        log_i = tl.load(i + batch * i_sb + h_ * i_sh + t * i_st).to(tl.float64)
        log_f = log_forget(tl.load(f + batch * f_sb + h_ * f_sh + t * f_st).to(tl.float64), False)
        before = log_f + m.to(tl.float64)
        if SIGMOID:
            log_i = log_forget(log_i, False)
            m = tl.full([], 0.0, tl.float32)
        else:
            m = tl.maximum(before, log_i).to(tl.float32)
        # Of the rounded m: what rounding takes from it, the state keeps. While nothing has a weight m is -inf.
        scale = tl.where(m > NEG_INF, m, 0.0).to(tl.float64)
        keep = tl.exp(before - scale).to(tl.float32)
        b_k *= tl.exp(log_i - scale).to(tl.float32)
        b_c = b_c * keep + b_k[:, None] * b_v[None, :]
        b_h = tl.sum(b_c * b_q[:, None], 0)
        if NORMALIZE:
            b_n = b_n * keep + b_k
            b_h = b_h / (tl.maximum(tl.abs(tl.sum(b_n * b_q, 0)), tl.exp(-m)) + EPS)
        store_vector(h + p_h + t * h_row, cast(b_h, h.dtype.element_ty), o_v, V, BV)
        t += 1

    tl.store(c_last + o_c, cast(b_c, c_last.dtype.element_ty), mask=m_c)
    if vt == 0:
        store_vector(n_last + head * K, b_n, o_k, K, BK)
        tl.store(m_last + head, m)
