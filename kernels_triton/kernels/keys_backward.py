"""The gradients of one tile of keys and values, with the column sums that dI and dF need."""

import triton
import triton.language as tl

from .common import (
    dot,
    exp2_difference,
    load_norm,
    load_pair,
    load_state,
    load_tokens,
    operand,
    rows_times_accumulator,
    store_tokens,
    zeros_tuple,
)


@triton.jit
def _add_scores(
    scores, q, k, k0,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK keys' part of k.q, keys on the rows, against each tile; k's block too."""
    b_k = load_tokens(k, ROW, k0, BT, K, BK, SOURCE)
    queries = ()
    for y in tl.static_range(COUNT):
        queries = queries + (load_tokens(q, (FIRST + y) * BS, k0, BS, K, BK, SOURCE),)
    updated = ()
    for y in tl.static_range(COUNT):
        updated = updated + (dot(b_k, tl.trans(queries[y]), scores[y], PRECISION),)
    return updated, b_k


@triton.jit
def keys_values_backward(
    q, k, v, dh, p_c, p_c_low, p_a, p_a_low, p_inverse, p_delta, dstate, dnorm,
    p_dk, dk_row, p_dv, dv_row, p_sums, length, key_tile, padded,
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
    """dk and dv of the chunk's tile TILE, against the rows from there on; dk for BK keys, dv for its share of values.

    Scores are computed transposed, keys on the rows, so that no product's result is ever transposed.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    FIRST: tl.constexpr = TILE * BT // BS  # column tiles before this one lie wholly in the past
    COUNT: tl.constexpr = L // BS - FIRST
    ROW: tl.constexpr = TILE * BT
    t_k = ROW + tl.arange(0, BT)
    k_first = key_tile * BK
    o_k = k_first + tl.arange(0, BK)
    c_hi, c_lo = load_pair(p_c, p_c_low, t_k, PAIRS)
    b_alpha = exp2_difference(c_hi, c_lo, 0.0, 0.0, PAIRS)

    scores = zeros_tuple(COUNT, BT, BS)
    if NKT == 1:
        scores, b_k = _add_scores(scores, q, k, 0, K, BT, BK, BS, ROW, FIRST, COUNT, SOURCE, PRECISION)
    else:
        for k0 in range(0, K, BK):
            scores, _ = _add_scores(scores, q, k, k0, K, BT, BK, BS, ROW, FIRST, COUNT, SOURCE, PRECISION)
    weighted = ()
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        a_hi, a_lo = load_pair(p_a, p_a_low, t_q, PAIRS)
        b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS)
        b_s = scores[y] * b_d * (tl.load(p_inverse + t_q) * SCALE)[None, :]
        if (FIRST + y) * BS < ROW + BT:
            b_s = tl.where(t_q[None, :] >= t_k[:, None], b_s, 0.0)
        weighted = weighted + (operand(b_s, BF16, PRECISION),)

    products = zeros_tuple(COUNT, BT, BS)
    b_dk = tl.zeros([BT, BK], tl.float32)
    for v0 in range(0, V, BV):
        b_v = load_tokens(v, ROW, v0, BT, V, BV, SOURCE)
        b_dc = load_state(dstate, k_first, v0, K, V, BK, BV, STATES)
        b_dk = dot(operand(b_v, BF16, PRECISION), tl.trans(operand(b_dc, BF16, PRECISION)), b_dk, PRECISION)
        if NKT == 1:
            b_dv = dot(
                operand(b_k, BF16, PRECISION), operand(b_dc, BF16, PRECISION), tl.zeros([BT, BV], tl.float32), PRECISION
            )
            b_dv *= b_alpha[:, None]
        updated = ()
        for y in tl.static_range(COUNT):
            b_dh = load_tokens(dh, (FIRST + y) * BS, v0, BS, V, BV, SOURCE)
            updated = updated + (dot(b_v, tl.trans(b_dh), products[y], PRECISION),)
            if NKT == 1:
                b_dv = dot(weighted[y], operand(b_dh, BF16, PRECISION), b_dv, PRECISION)
        products = updated
        if NKT == 1:
            store_tokens(p_dv, b_dv, ROW, dv_row, length, v0, BT, V, BV)

    # q and k again: kept since above, they would cost registers in the loop.
    queries = ()
    for y in tl.static_range(COUNT):
        queries = queries + (load_tokens(q, (FIRST + y) * BS, k_first, BS, K, BK, SOURCE),)
    b_k = load_tokens(k, ROW, k_first, BT, K, BK, SOURCE)
    if HAS_NORMS:
        b_dk += load_norm(dnorm, o_k, K, BK, STATES)[None, :]
    b_dk = b_dk * b_alpha[:, None]
    tl.store(p_sums + padded + t_k, rows_times_accumulator(b_k, b_dk, PRECISION, SOURCE))
    b_cols = tl.zeros([BT], tl.float32)
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        b_q = queries[y]
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BT, BS], tl.float32), PRECISION)
        a_hi, a_lo = load_pair(p_a, p_a_low, t_q, PAIRS)
        b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS)
        b_inverse = tl.load(p_inverse + t_q) * SCALE
        b_ds = (products[y] * b_inverse[None, :] + (tl.load(p_delta + t_q) * SCALE)[None, :]) * b_d
        if (FIRST + y) * BS < ROW + BT:
            b_ds = tl.where(t_q[None, :] >= t_k[:, None], b_ds, 0.0)
            b_cols += tl.sum(tl.where(t_q[None, :] == t_k[:, None], 0.0, b_s * b_ds), 1)
        else:
            b_cols += tl.sum(b_s * b_ds, 1)
        b_dk = dot(operand(b_ds, BF16, PRECISION), operand(b_q, BF16, PRECISION), b_dk, PRECISION)
    tl.store(p_sums + t_k, b_cols)
    store_tokens(p_dk, b_dk, ROW, dk_row, length, k_first, BT, K, BK)

    if NKT > 1:  # dv needs all keys: its values are shared out among the programs of the key tiles
        SHARE: tl.constexpr = (V + BV * NKT - 1) // (BV * NKT) * BV
        for v0 in range(key_tile * SHARE, tl.minimum(key_tile * SHARE + SHARE, V), BV):
            b_dv = tl.zeros([BT, BV], tl.float32)
            for k0 in range(0, K, BK):
                b_kk = load_tokens(k, ROW, k0, BT, K, BK, SOURCE)
                b_dc = load_state(dstate, k0, v0, K, V, BK, BV, STATES)
                b_dv = dot(operand(b_kk, BF16, PRECISION), operand(b_dc, BF16, PRECISION), b_dv, PRECISION)
            b_dv *= b_alpha[:, None]
            for y in tl.static_range(COUNT):
                b_dh = load_tokens(dh, (FIRST + y) * BS, v0, BS, V, BV, SOURCE)
                b_dv = dot(weighted[y], operand(b_dh, BF16, PRECISION), b_dv, PRECISION)
            store_tokens(p_dv, b_dv, ROW, dv_row, length, v0, BT, V, BV)
