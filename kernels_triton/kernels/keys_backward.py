"""The gradient of one tile of keys, with the column sums that dI and dF need."""

import triton
import triton.language as tl

from .common import (
    add_products,
    dot,
    exp2_difference,
    load_pair,
    load_row_decays,
    operand,
    rows_times_accumulator,
    trace,
    zeros_tuple,
)
from .tiles import load_norm, load_state, load_tokens, store_tokens, vector


@triton.jit
def keys_backward(
    q, k, v, dh, p_c, p_c_low, p_a, p_a_low, p_e, p_delta, dstate, dnorm,
    state, norm, p_dk, dk_row, p_sums, p_inner, length, key_tile, padded,
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
    INNER: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    STATES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of the chunk's tile TILE, against its rows from there on, for BK keys; <dC', C> + dn'.n too if INNER.

    Scores are computed transposed, keys on the rows, so that no product's result is ever transposed.
    """
    FIRST: tl.constexpr = TILE * BT // BS  # tiles of rows before this one lie wholly in the past
    COUNT: tl.constexpr = L // BS - FIRST
    ROW: tl.constexpr = TILE * BT
    t_k = ROW + tl.arange(0, BT)
    k_first = key_tile * BK
    o_k = k_first + tl.arange(0, BK)

    products = zeros_tuple(COUNT, BT, BS)
    b_dk = tl.zeros([BT, BK], tl.float32)
    b_product = tl.zeros([BV, BV], tl.float32)
    for v0 in range(0, V, BV):
        b_v = load_tokens(v, ROW, v0, BT, V, BV, SOURCE)
        updated = ()
        for y in tl.static_range(COUNT):
            b_dh = load_tokens(dh, (FIRST + y) * BS, v0, BS, V, BV, SOURCE)
            updated = updated + (dot(b_v, tl.trans(b_dh), products[y], PRECISION),)
        products = updated
        b_dc = load_state(dstate, k_first, v0, K, V, BK, BV, STATES)
        b_dk = dot(operand(b_v, BF16, PRECISION), tl.trans(operand(b_dc, BF16, PRECISION)), b_dk, PRECISION)
        if INNER:
            b_c = load_state(state, k_first, v0, K, V, BK, BV, STATES)
            b_product = add_products(b_product, b_c, b_dc, BF16, PRECISION)
    if INNER:
        product = trace(b_product, BV)
        if HAS_NORMS:
            product += tl.sum(load_norm(norm, o_k, K, BK, STATES) * load_norm(dnorm, o_k, K, BK, STATES), 0)
        tl.store(p_inner, product)

    b_k = load_tokens(k, ROW, k_first, BT, K, BK, SOURCE)
    queries = ()  # all loads before the first use: their latencies overlap
    for y in tl.static_range(COUNT):
        queries = queries + (load_tokens(q, (FIRST + y) * BS, k_first, BS, K, BK, SOURCE),)
    c_hi, c_lo = load_pair(p_c, p_c_low, t_k, PAIRS)
    if HAS_NORMS:
        b_dk += load_norm(dnorm, o_k, K, BK, STATES)[None, :]
    b_dk *= exp2_difference(c_hi, c_lo, 0.0, 0.0, PAIRS)[:, None]
    tl.store(p_sums + padded + t_k, rows_times_accumulator(b_k, b_dk, PRECISION, SOURCE))

    b_cols = tl.zeros([BT], tl.float32)
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        b_q = queries[y]
        a_hi, a_lo, b_scale = load_row_decays(p_a, p_a_low, p_e, t_q, PAIRS)
        b_scale *= SCALE
        b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS)
        b_ds = (products[y] * b_scale[None, :] + (vector(p_delta, t_q) * b_scale)[None, :]) * b_d
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BT, BS], tl.float32), PRECISION)
        if (FIRST + y) * BS < ROW + BT:
            b_ds = tl.where(t_q[None, :] >= t_k[:, None], b_ds, 0.0)
            b_cols += tl.sum(tl.where(t_q[None, :] == t_k[:, None], 0.0, b_s * b_ds), 1)
        else:
            b_cols += tl.sum(b_s * b_ds, 1)
        b_dk = dot(operand(b_ds, BF16, PRECISION), operand(b_q, BF16, PRECISION), b_dk, PRECISION)
    tl.store(p_sums + t_k, b_cols)
    store_tokens(p_dk, b_dk, ROW, dk_row, length, k_first, BT, K, BK)
