"""The gradient of one tile of queries, with the row sums that dF needs."""

import triton
import triton.language as tl

from .common import (
    GIVEN,
    dot,
    exp2_difference,
    load_pair,
    load_row_decays,
    operand,
    rows_times_accumulator,
    state_weight,
    zeros_tuple,
)
from .tiles import load_state, load_tokens, load_vector, store_tokens, vector


@triton.jit
def queries_backward(
    q, k, v, dh, p_c, p_c_low, p_a, p_a_low, p_e, p_delta, p_gamma, p_gamma_low, state, p_norm,
    p_dq, dq_row, p_sums, length, key_tile, padded,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    L: tl.constexpr,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    STATES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the chunk's tile TILE, against its columns up to there, for BK keys."""
    COUNT: tl.constexpr = ((TILE + 1) * BT + BS - 1) // BS
    ROW: tl.constexpr = TILE * BT
    t_q = ROW + tl.arange(0, BT)
    k_first = key_tile * BK
    o_k = k_first + tl.arange(0, BK)

    if SOURCE == GIVEN:  # early: with their tiles there, these loads are all that the products would wait for
        a_hi, a_lo, b_scale = load_row_decays(p_a, p_a_low, p_e, t_q, PAIRS)
    products = zeros_tuple(COUNT, BT, BS)
    b_dq = tl.zeros([BT, BK], tl.float32)
    for v0 in range(0, V, BV):
        b_dh = load_tokens(dh, ROW, v0, BT, V, BV, SOURCE)
        updated = ()
        for y in tl.static_range(COUNT):
            b_v = load_tokens(v, y * BS, v0, BS, V, BV, SOURCE)
            updated = updated + (dot(b_dh, tl.trans(b_v), products[y], PRECISION),)
        products = updated
        b_c = load_state(state, k_first, v0, K, V, BK, BV, STATES)
        b_dq = dot(operand(b_dh, BF16, PRECISION), tl.trans(operand(b_c, BF16, PRECISION)), b_dq, PRECISION)

    b_q = load_tokens(q, ROW, k_first, BT, K, BK, SOURCE)
    keys = ()  # all loads before the first use: their latencies overlap
    for y in tl.static_range(COUNT):
        keys = keys + (load_tokens(k, y * BS, k_first, BS, K, BK, SOURCE),)
    if SOURCE != GIVEN:
        a_hi, a_lo, b_scale = load_row_decays(p_a, p_a_low, p_e, t_q, PAIRS)
    b_state_weight = state_weight(a_hi, a_lo, b_scale, p_gamma, p_gamma_low, SCALE, PAIRS)
    b_scale *= SCALE
    b_delta = vector(p_delta, t_q)
    b_dq *= b_state_weight[:, None]
    if HAS_NORMS:
        b_dq += (b_state_weight * b_delta)[:, None] * load_vector(p_norm, o_k, K, BK)[None, :]
    b_delta *= b_scale
    b_rows = rows_times_accumulator(b_q, b_dq, PRECISION, SOURCE)

    b_diagonal = tl.zeros([BT], tl.float32)
    for y in tl.static_range(COUNT):
        t_k = y * BS + tl.arange(0, BS)
        c_hi, c_lo = load_pair(p_c, p_c_low, t_k, PAIRS)
        b_d = exp2_difference(c_hi[None, :], c_lo[None, :], a_hi[:, None], a_lo[:, None], PAIRS)
        b_ds = (products[y] * b_scale[:, None] + b_delta[:, None]) * b_d
        b_k = keys[y]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], tl.float32), PRECISION)
        if (y + 1) * BS > ROW:
            # The diagonal of X would cancel in dlogf but leave its rounding: it stays apart.
            b_ds = tl.where(t_k[None, :] <= t_q[:, None], b_ds, 0.0)
            b_x = b_s * b_ds
            m_diagonal = t_k[None, :] == t_q[:, None]
            b_rows += tl.sum(tl.where(m_diagonal, 0.0, b_x), 1)
            b_diagonal += tl.sum(tl.where(m_diagonal, b_x, 0.0), 1)
        else:
            b_rows += tl.sum(b_s * b_ds, 1)
        b_dq = dot(operand(b_ds, BF16, PRECISION), operand(b_k, BF16, PRECISION), b_dq, PRECISION)
    tl.store(p_sums + t_q, b_rows)
    tl.store(p_sums + padded + t_q, b_diagonal)
    store_tokens(p_dq, b_dq, ROW, dq_row, length, k_first, BT, K, BK)
