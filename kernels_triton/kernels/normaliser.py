"""The normaliser's backward: one number per token for each of its two uses."""

import triton
import triton.language as tl

from .common import POINTERS, exp2_difference, load_pair
from .packing import chunk_count, chunk_span
from .tiles import contiguous_rows, load_tokens, token_view


@triton.jit(
    do_not_specialize_on_alignment=[
        "dh_sb", "dh_sh", "dh_st", "sequences", "T",
    ],
)  # fmt: skip
def normaliser_backward(
    h,  # (B, H, T, V) or (B, T, H, V), contiguous, if EXACT
    dh, dh_sb, dh_sh, dh_st,  # (B, H, T, V) in units of UNIT elements
    r,  # (B, H, NT * L) signed normaliser n.q; or the whole positive normaliser d if D_GIVEN; neither without NORMALIZE
    floor,  # (B, H, NT * L) exp(-m)
    a,  # (B, H, NT * L)
    a_low,  # (B, H, NT * L) if PAIRS
    gamma,  # (B, H, NT) if PAIRS
    gamma_low,  # (B, H, NT) likewise
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    e,  # (B, H, NT * L) a + log2 d, infinite from T on; if PAIRS 1 / d, 0 from T on. d = max(|r|, floor) + eps, or 1
    delta,  # (B, H, NT * L) d times the cotangent of r: -(dh . h) sign(r) where |r| > floor, else 0; without its
    # factor dh . h if FACTOR
    state_weight,  # (B, H, NT * L) scale beta / d if PAIRS, else unused, one element
    H: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    EXACT: tl.constexpr,
    FACTOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    D_GIVEN: tl.constexpr,
    BTHD: tl.constexpr,
    PACKED: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """One program per head and tile of BT tokens."""
    pid = tl.program_id(0).to(tl.int64)
    n_chunks = chunk_count(T, sequences, L, PACKED)
    padded = n_chunks.to(tl.int64) * L
    head = pid // (padded // BT)
    row = ((pid % (padded // BT)) * BT).to(tl.int32)
    start, length, end = chunk_span(chunks, row // L, n_chunks, T, L, PACKED)
    start += row % L
    t = start + tl.arange(0, BT)
    m_t = row % L + tl.arange(0, BT) < length
    o_row = head * padded + row + tl.arange(0, BT)
    if not NORMALIZE:
        b_d = tl.full([BT], 1.0, tl.float32)
    elif D_GIVEN:
        b_r = tl.load(r + head * T + t, mask=m_t, other=1.0)
        b_d = b_r
        b_floor = b_r
    else:
        b_r = tl.load(r + o_row)
        b_floor = tl.load(floor + o_row)
        b_d = tl.maximum(tl.abs(b_r), b_floor) + EPS
    b_delta = tl.zeros([BT], tl.float32)
    if FACTOR:
        b_delta = tl.full([BT], 1.0, tl.float32)
    elif EXACT:
        first = tl.minimum(start, end - 1)
        dh_view = token_view(dh, dh_sb, dh_sh, dh_st, head, first, end, H, UNIT, POINTERS)
        o_h, h_row = contiguous_rows(head, first, T, H, V, BTHD)
        h_view = (h + o_h, h_row, end - first)
        for v0 in range(0, V, BV):
            b_h = load_tokens(h_view, 0, v0, BT, V, BV, POINTERS).to(tl.float32)
            b_dh = load_tokens(dh_view, 0, v0, BT, V, BV, POINTERS).to(tl.float32)
            b_delta += tl.sum(b_h * b_dh, 1)
    if EXACT:
        b_delta = tl.where(b_r > 0, -b_delta, b_delta)
        b_delta = tl.where(tl.abs(b_r) > b_floor, b_delta, 0.0)
    b_delta = tl.where(m_t, b_delta, 0.0)
    tl.store(delta + o_row, b_delta)
    if PAIRS:
        b_e = tl.where(m_t, 1.0 / b_d, 0.0)
        a_hi, a_lo = load_pair(a, a_low, o_row, True)
        g_hi, g_lo = load_pair(gamma, gamma_low, head * n_chunks + row // L, True)
        tl.store(state_weight + o_row, b_e * (exp2_difference(g_hi, g_lo, a_hi, a_lo, True) * SCALE))
    else:
        b_e = tl.where(m_t, tl.load(a + o_row) + tl.log2(b_d), float("inf"))
        if pid == 0:
            tl.store(state_weight, 0.0)
    tl.store(e + o_row, b_e)
