"""Sums over keys: dQ and dK of one chunk, with the row and column sums that dI and dF need, in one kernel."""

import triton
import triton.language as tl

from .common import contiguous_head, dot, exp2_difference, load_tile, load_tile_t, load_vector, operand, store_tile


@triton.jit(
    do_not_specialize_on_alignment=[
        "x_sb", "x_sh", "x_st", "y_sb", "y_sh", "y_st", "xv_sb", "xv_sh", "xv_st", "yv_sb", "yv_sh", "yv_st", "T",
    ],
)  # fmt: skip
def mix_keys(
    x, x_sb, x_sh, x_st,  # (B, H, T, K) in units of UNIT elements: q for dq; k for dk
    y, y_sb, y_sh, y_st,  # (B, H, T, K) likewise: k; q
    xv, xv_sb, xv_sh, xv_st,  # (B, H, T, V) likewise: dh; v
    yv, yv_sb, yv_sh, yv_st,  # (B, H, T, V) likewise: v; dh
    c,  # (B, H, 2, NT * L)
    a,  # (B, H, 2, NT * L)
    ends,  # (B, H, 4, NT)
    d_inverse,  # (B, H, NT * L)
    delta,  # (B, H, NT * L)
    states,  # (B, H, NT, K, V) C; dC'
    norms,  # (B, H, NT, K) n; dn', if HAS_NORMS
    T,
    out,  # (B, H, T, K) or (B, T, H, K): dq; dk
    sums,  # (B, H, 2 * NKT, NT * L) for each key tile: sum_j<i X_ij + P_i and X_ii; dk: sum_i>j X_ij and U_j
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
    KEYS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    BTHD: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head, chunk, tile of BT tokens and tile of BK keys.

    dq_i = scale (sum_j<=i dS_ij D_ij k_j + beta_i (C dh_i / d_i + delta_i n)),
    dk_j = scale sum_i>=j dS_ij D_ij q_i + alpha_j (dC' v_j + dn'), with dS_ij = dh_i . v_j / d_i + delta_i, X = S dS.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    NRT: tl.constexpr = L // BT
    pid = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(T, L)
    padded = n_chunks.to(tl.int64) * L
    kt = pid % NKT
    row_tile = (pid // NKT) % NRT
    n = ((pid // (NKT * NRT)) % n_chunks).to(tl.int32)
    head = pid // (n_chunks.to(tl.int64) * (NKT * NRT))

    first = n * L + (row_tile * BT).to(tl.int32)
    t_x = first + tl.arange(0, BT)
    o_k = (kt * BK + tl.arange(0, BK)).to(tl.int32)
    o_v = tl.arange(0, BV)
    p_x = x + ((head // H) * x_sb + (head % H) * x_sh) * UNIT
    p_y = y + ((head // H) * y_sb + (head % H) * y_sh) * UNIT
    p_xv = xv + ((head // H) * xv_sb + (head % H) * xv_sh) * UNIT
    p_yv = yv + ((head // H) * yv_sb + (head % H) * yv_sh) * UNIT
    p_c = c + head * 2 * padded
    p_a = a + head * 2 * padded
    p_end = ends + head * 4 * n_chunks + n
    p_state = states + (head * n_chunks + n) * K * V
    p_inverse = d_inverse + head * padded
    p_delta = delta + head * padded

    # What the state adds: its product with these rows, K on the columns.
    b_x = load_tile(p_x, t_x, x_st * UNIT, T, o_k, K, BK)
    b_norm = tl.zeros([BK], tl.float32)
    if HAS_NORMS:
        b_norm = load_vector(norms + (head * n_chunks + n) * K, o_k, K, BK)
    b_out = tl.zeros([BT, BK], tl.float32)
    for v0 in range(0, V, BV):
        b_xv = load_tile(p_xv, t_x, xv_st * UNIT, T, v0 + o_v, V, BV)
        b_state = load_tile_t(p_state, o_k, V, K, v0 + o_v, V, BV)  # [BV, BK]
        b_out = dot(operand(b_xv, BF16, PRECISION), operand(b_state, BF16, PRECISION), b_out, PRECISION)
    if KEYS:
        x_hi = tl.load(p_c + t_x)
        x_lo = tl.load(p_c + padded + t_x)
        b_factor = exp2_difference(x_hi, x_lo, tl.load(p_end + 2 * n_chunks), tl.load(p_end + 3 * n_chunks))
        b_out = (b_out + b_norm[None, :]) * b_factor[:, None]
        begin = first // BS * BS
        stop = tl.minimum(n * L + L, T)
    else:
        x_hi = tl.load(p_a + t_x)
        x_lo = tl.load(p_a + padded + t_x)
        b_factor = exp2_difference(tl.load(p_end), tl.load(p_end + n_chunks), x_hi, x_lo) * SCALE
        b_out = b_out * tl.load(p_inverse + t_x)[:, None] + tl.load(p_delta + t_x)[:, None] * b_norm[None, :]
        b_out = b_out * b_factor[:, None]
        begin = n * L
        stop = tl.minimum(first + BT, T)
    b_inter = tl.sum(b_x.to(tl.float32) * b_out, 1)

    # What the tokens of the chunk add. The diagonal of X would cancel in dlogf but leave its rounding: it stays apart.
    b_sum = tl.zeros([BT], tl.float32)
    b_diag = tl.zeros([BT], tl.float32)
    for y0 in range(begin, stop, BS):
        t_y = y0 + tl.arange(0, BS)
        b_ds = tl.zeros([BT, BS], tl.float32)
        for v0 in range(0, V, BV):
            b_xv = load_tile(p_xv, t_x, xv_st * UNIT, T, v0 + o_v, V, BV)
            b_yv = load_tile_t(p_yv, t_y, yv_st * UNIT, T, v0 + o_v, V, BV)  # [BV, BS]
            b_ds = dot(b_xv, b_yv, b_ds, PRECISION)
        if KEYS:
            y_hi = tl.load(p_a + t_y)
            y_lo = tl.load(p_a + padded + t_y)
            b_d = exp2_difference(x_hi[:, None], x_lo[:, None], y_hi[None, :], y_lo[None, :]) * SCALE
            b_ds = b_ds * tl.load(p_inverse + t_y)[None, :] + tl.load(p_delta + t_y)[None, :]
            m_d = t_y[None, :] >= t_x[:, None]
        else:
            y_hi = tl.load(p_c + t_y)
            y_lo = tl.load(p_c + padded + t_y)
            b_d = exp2_difference(y_hi[None, :], y_lo[None, :], x_hi[:, None], x_lo[:, None]) * SCALE
            b_ds = b_ds * tl.load(p_inverse + t_x)[:, None] + tl.load(p_delta + t_x)[:, None]
            m_d = t_y[None, :] <= t_x[:, None]
        b_w = tl.where(m_d, b_ds * b_d, 0.0)
        b_y = load_tile(p_y, t_y, y_st * UNIT, T, o_k, K, BK)  # [BS, BK]
        b_yt = load_tile_t(p_y, t_y, y_st * UNIT, T, o_k, K, BK)  # [BK, BS]
        b_s = dot(b_x, b_yt, tl.zeros([BT, BS], tl.float32), PRECISION)
        m_diag = t_y[None, :] == t_x[:, None]
        b_sum += tl.sum(tl.where(m_diag, 0.0, b_s * b_w), 1)
        if not KEYS:
            b_diag += tl.sum(tl.where(m_diag, b_s * b_w, 0.0), 1)
        b_out = dot(operand(b_w, BF16, PRECISION), operand(b_y, BF16, PRECISION), b_out, PRECISION)

    offset, stride = contiguous_head(head, T, H, K, BTHD)
    store_tile(out + offset, b_out, t_x, stride, T, o_k, K, BK)
    p_sums = sums + (head * 2 * NKT + 2 * kt) * padded + t_x
    if KEYS:
        tl.store(p_sums, b_sum)
        tl.store(p_sums + padded, b_inter)
    else:
        tl.store(p_sums, b_sum + b_inter)
        tl.store(p_sums + padded, b_diag)
