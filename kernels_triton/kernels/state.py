"""The recurrence over chunks: states forward, their cotangents backward, in one kernel."""

import triton
import triton.language as tl

from .common import dot, exp2_difference, load_tile, load_tile_t, load_vector, operand, store_tile, store_vector


@triton.jit
def inner_product(x, y, SIZE: tl.constexpr):
    """sum x y. Through a vector: Triton 3.6 fails for sm_100 where it reduces a product's accumulator axis by axis."""
    return tl.sum(tl.reshape(x * y, [SIZE]), 0)


@triton.jit
def norm_product(b_norm, p_n, o_k, vt, K: tl.constexpr, BK: tl.constexpr):
    """dn . n of one key tile; the first value tile's programs own it."""
    return tl.where(vt == 0, tl.sum(b_norm * load_vector(p_n, o_k, K, BK), 0), 0.0)


@triton.jit(
    do_not_specialize_on_alignment=["x_sb", "x_sh", "x_st", "y_sb", "y_sh", "y_st", "T"],
)
def state_scan(
    x, x_sb, x_sh, x_st,  # (B, H, T, K) in units of UNIT elements: k; backward: q
    y, y_sb, y_sh, y_st,  # (B, H, T, V) likewise: v; backward: dh
    c,  # (B, H, 2, NT * L)
    a,  # (B, H, 2, NT * L)
    ends,  # (B, H, 4, NT)
    d_inverse,  # (B, H, NT * L) backward: 1 / normaliser
    delta,  # (B, H, NT * L) backward: cotangent of the signed normaliser
    state_in,  # (B, H, K, V) if HAS_STATE_IN: c_initial; backward: the cotangent of c_last
    norm_in,  # (B, H, K) likewise for n, if HAS_NORM_IN
    fw_states,  # (B, H, NT, K, V) backward: the states
    fw_norms,  # (B, H, NT, K) backward
    fw_last,  # (B, H, K, V) backward, if HAS_STATE_IN: c_last
    fw_norm_last,  # (B, H, K) backward, if HAS_STATE_IN: n_last
    fw_initial,  # (B, H, K, V) backward, if HAS_INITIAL: c_initial
    fw_norm_initial,  # (B, H, K) backward, if HAS_INITIAL
    T,
    states,  # (B, H, NT, K, V) state at each chunk's start; backward: cotangent of the state after each chunk
    norms,  # (B, H, NT, K)
    state_out,  # (B, H, K, V) c_last; backward: the cotangent of c_initial
    norm_out,  # (B, H, K)
    inner,  # (B, H, NKT * NVT, NT + 2) backward: partial <dC', C> + dn'.n; forward: unused, one element
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_STATE_IN: tl.constexpr,
    HAS_NORM_IN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_INNER: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head and (BK, BV) tile of the state.

    S <- gamma S + sum_t w_t x_t y_t^T and n <- gamma n + sum_t u_t x_t, chunk by chunk.
    Forward w = u = alpha. Backward, from the last chunk to the first, w = scale beta / d and u = scale beta delta.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    NVT: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0).to(tl.int64)
    vt = pid % NVT
    kt = (pid // NVT) % NKT
    head = pid // (NVT * NKT)
    n_chunks = tl.cdiv(T, L)
    padded = n_chunks.to(tl.int64) * L
    o_k = (kt * BK + tl.arange(0, BK)).to(tl.int32)
    o_v = (vt * BV + tl.arange(0, BV)).to(tl.int32)
    o_t = tl.arange(0, BT)
    p_x = x + ((head // H) * x_sb + (head % H) * x_sh) * UNIT
    p_y = y + ((head // H) * y_sb + (head % H) * y_sh) * UNIT
    p_inner = inner + (head * NKT * NVT + kt * NVT + vt) * (n_chunks + 2)
    o_state = head * K * V

    b_state = tl.zeros([BK, BV], tl.float32)
    b_norm = tl.zeros([BK], tl.float32)
    if HAS_STATE_IN:
        b_state = load_tile(state_in + o_state, o_k, V, K, o_v, V, BV).to(tl.float32)
    if HAS_NORM_IN:
        b_norm = load_vector(norm_in + head * K, o_k, K, BK).to(tl.float32)
    if HAS_INNER:
        product = tl.full([], 0.0, tl.float32)
        if HAS_STATE_IN:
            b_c = load_tile(fw_last + o_state, o_k, V, K, o_v, V, BV)
            product = inner_product(b_state, b_c, BK * BV)
            if HAS_NORMS:
                product += norm_product(b_norm, fw_norm_last + head * K, o_k, vt, K, BK)
        tl.store(p_inner + n_chunks, product)

    for step in range(0, n_chunks):
        n = step
        if BACKWARD:
            n = n_chunks - 1 - step
        o_chunk = head * n_chunks + n
        store_tile(states + o_chunk * K * V, b_state, o_k, V, K, o_v, V, BV)
        if vt == 0:
            store_vector(norms + o_chunk * K, b_norm, o_k, K, BK)
        if HAS_INNER:
            b_c = load_tile(fw_states + o_chunk * K * V, o_k, V, K, o_v, V, BV).to(tl.float32)
            product = inner_product(b_state, b_c, BK * BV)
            if HAS_NORMS:
                product += norm_product(b_norm, fw_norms + o_chunk * K, o_k, vt, K, BK)
            tl.store(p_inner + n, product)

        p_end = ends + head * 4 * n_chunks + n
        start_hi = tl.load(p_end)
        start_lo = tl.load(p_end + n_chunks)
        end_hi = tl.load(p_end + 2 * n_chunks)
        end_lo = tl.load(p_end + 3 * n_chunks)
        gamma = exp2_difference(start_hi, start_lo, end_hi, end_lo)
        b_state *= gamma
        b_norm *= gamma
        for t0 in range(0, L, BT):
            t = n * L + t0 + o_t
            o_pair = head * 2 * padded + t
            if BACKWARD:
                b_w = exp2_difference(start_hi, start_lo, tl.load(a + o_pair), tl.load(a + o_pair + padded)) * SCALE
                b_u = b_w * tl.load(delta + head * padded + t)
                b_w = b_w * tl.load(d_inverse + head * padded + t)
            else:
                b_w = exp2_difference(tl.load(c + o_pair), tl.load(c + o_pair + padded), end_hi, end_lo)
                b_u = b_w
            b_x = load_tile_t(p_x, t, x_st * UNIT, T, o_k, K, BK).to(tl.float32)  # [BK, BT]
            b_y = load_tile(p_y, t, y_st * UNIT, T, o_v, V, BV)  # [BT, BV]
            b_xw = operand(b_x * b_w[None, :], BF16, PRECISION)
            b_state = dot(b_xw, operand(b_y, BF16, PRECISION), b_state, PRECISION)
            if vt == 0:
                b_norm += tl.sum(b_x * b_u[None, :], 1)

    store_tile(state_out + o_state, b_state, o_k, V, K, o_v, V, BV)
    if vt == 0:
        store_vector(norm_out + head * K, b_norm, o_k, K, BK)
    if HAS_INNER:
        product = tl.full([], 0.0, tl.float32)
        if HAS_INITIAL:
            b_c = load_tile(fw_initial + o_state, o_k, V, K, o_v, V, BV).to(tl.float32)
            product = inner_product(b_state, b_c, BK * BV)
            if HAS_NORMS:
                product += norm_product(b_norm, fw_norm_initial + head * K, o_k, vt, K, BK)
        tl.store(p_inner + n_chunks + 1, product)
    else:
        if pid == 0:
            tl.store(inner, 0.0)
