"""Sums over values: h (forward) and dV (backward) of one chunk, in one kernel."""

import triton
import triton.language as tl

from .common import contiguous_head, dot, exp2_difference, load_tile, load_tile_t, load_vector, operand, store_tile


@triton.jit(
    do_not_specialize_on_alignment=["x_sb", "x_sh", "x_st", "y_sb", "y_sh", "y_st", "z_sb", "z_sh", "z_st", "T"],
)
def mix_values(
    x, x_sb, x_sh, x_st,  # (B, H, T, K) in units of UNIT elements: q; backward: k
    y, y_sb, y_sh, y_st,  # (B, H, T, K) likewise: k; backward: q
    z, z_sb, z_sh, z_st,  # (B, H, T, V) likewise: v; backward: dh
    c,  # (B, H, 2, NT * L)
    a,  # (B, H, 2, NT * L)
    ends,  # (B, H, 4, NT)
    floor,  # (B, H, NT * L) forward
    d_inverse,  # (B, H, NT * L) backward: 1 / normaliser
    states,  # (B, H, NT, K, V) C; backward: dC'
    norms,  # (B, H, NT, K) forward: n
    T,
    out,  # (B, H, T, V) or (B, T, H, V): h; backward: dv
    r,  # (B, H, NT * L) forward: signed normaliser; backward: unused, one element
    d,  # (B, H, T) normaliser if STORE_D, else unused, one element
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    BACKWARD: tl.constexpr,
    STORE_D: tl.constexpr,
    BTHD: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head, chunk, tile of BT tokens and tile of BV values.

    h_i = (sum_j<=i S_ij v_j + scale beta_i C^T q_i) / d_i, and dv_j = sum_i>=j S_ij dh_i / d_i + alpha_j dC'^T k_j.
    """
    NVT: tl.constexpr = (V + BV - 1) // BV
    NRT: tl.constexpr = L // BT
    pid = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(T, L)
    padded = n_chunks.to(tl.int64) * L
    vt = pid % NVT
    row_tile = (pid // NVT) % NRT
    n = ((pid // (NVT * NRT)) % n_chunks).to(tl.int32)
    head = pid // (n_chunks.to(tl.int64) * (NVT * NRT))

    first = n * L + (row_tile * BT).to(tl.int32)
    t_x = first + tl.arange(0, BT)
    o_v = (vt * BV + tl.arange(0, BV)).to(tl.int32)
    o_k = tl.arange(0, BK)
    p_x = x + ((head // H) * x_sb + (head % H) * x_sh) * UNIT
    p_y = y + ((head // H) * y_sb + (head % H) * y_sh) * UNIT
    p_z = z + ((head // H) * z_sb + (head % H) * z_sh) * UNIT
    p_c = c + head * 2 * padded
    p_a = a + head * 2 * padded
    p_end = ends + head * 4 * n_chunks + n
    p_state = states + (head * n_chunks + n) * K * V
    p_norm = norms + (head * n_chunks + n) * K

    # What the state adds to these rows.
    b_out = tl.zeros([BT, BV], tl.float32)
    b_r = tl.zeros([BT], tl.float32)
    for k0 in range(0, K, BK):
        b_x = load_tile(p_x, t_x, x_st * UNIT, T, k0 + o_k, K, BK)
        b_state = load_tile(p_state, k0 + o_k, V, K, o_v, V, BV)
        b_out = dot(operand(b_x, BF16, PRECISION), operand(b_state, BF16, PRECISION), b_out, PRECISION)
    if not BACKWARD:
        # A loop of its own: reduced beside the product, Triton 3.6 on Hopper overwrites b_x while the product reads it.
        for k0 in range(0, K, BK):
            b_x = load_tile(p_x, t_x, x_st * UNIT, T, k0 + o_k, K, BK).to(tl.float32)
            b_r += tl.sum(b_x * load_vector(p_norm, k0 + o_k, K, BK)[None, :], 1)
    if BACKWARD:
        x_hi = tl.load(p_c + t_x)
        x_lo = tl.load(p_c + padded + t_x)
        b_factor = exp2_difference(x_hi, x_lo, tl.load(p_end + 2 * n_chunks), tl.load(p_end + 3 * n_chunks))
        begin = first // BS * BS
        stop = tl.minimum(n * L + L, T)
    else:
        x_hi = tl.load(p_a + t_x)
        x_lo = tl.load(p_a + padded + t_x)
        b_factor = exp2_difference(tl.load(p_end), tl.load(p_end + n_chunks), x_hi, x_lo) * SCALE
        begin = n * L
        stop = tl.minimum(first + BT, T)
    b_out *= b_factor[:, None]
    b_r *= b_factor

    # What the tokens of the chunk add.
    for y0 in range(begin, stop, BS):
        t_y = y0 + tl.arange(0, BS)
        b_s = tl.zeros([BT, BS], tl.float32)
        for k0 in range(0, K, BK):
            b_x = load_tile(p_x, t_x, x_st * UNIT, T, k0 + o_k, K, BK)
            b_y = load_tile_t(p_y, t_y, y_st * UNIT, T, k0 + o_k, K, BK)  # [BK, BS]
            b_s = dot(b_x, b_y, b_s, PRECISION)
        if BACKWARD:
            y_hi = tl.load(p_a + t_y)
            y_lo = tl.load(p_a + padded + t_y)
            b_d = exp2_difference(x_hi[:, None], x_lo[:, None], y_hi[None, :], y_lo[None, :]) * SCALE
            b_d = b_d * tl.load(d_inverse + head * padded + t_y)[None, :]
            m_s = t_y[None, :] >= t_x[:, None]
        else:
            y_hi = tl.load(p_c + t_y)
            y_lo = tl.load(p_c + padded + t_y)
            b_d = exp2_difference(y_hi[None, :], y_lo[None, :], x_hi[:, None], x_lo[:, None]) * SCALE
            m_s = t_y[None, :] <= t_x[:, None]
        b_s = tl.where(m_s, b_s * b_d, 0.0)
        if not BACKWARD:
            b_r += tl.sum(b_s, 1)
        b_z = load_tile(p_z, t_y, z_st * UNIT, T, o_v, V, BV)
        b_out = dot(operand(b_s, BF16, PRECISION), operand(b_z, BF16, PRECISION), b_out, PRECISION)

    if BACKWARD:
        if pid == 0:
            tl.store(r, 0.0)
    else:
        o_row = head * padded + t_x
        b_d = tl.maximum(tl.abs(b_r), tl.load(floor + o_row)) + EPS
        b_out = b_out / b_d[:, None]
        if vt == 0:
            tl.store(r + o_row, b_r)
            if STORE_D:
                tl.store(d + head * T + t_x, b_d, mask=t_x < T)
    if not STORE_D and pid == 0:
        tl.store(d, 0.0)
    offset, stride = contiguous_head(head, T, H, V, BTHD)
    store_tile(out + offset, b_out, t_x, stride, T, o_v, V, BV)
