"""The gradients of one chunk's queries, keys and values, with the row and column sums that dI and dF need."""

import triton
import triton.language as tl

from .common import (
    contiguous_rows,
    dot,
    exp2_difference,
    load_pair,
    load_rows,
    load_state,
    load_vector,
    operand,
    store_rows,
    strided_rows,
    zeros_tuple,
)


@triton.jit
def _queries(
    p_q, q_row, p_k, k_row, p_v, v_row, p_dh, dh_row, p_c, p_a, p_inverse, p_delta, p_state_inverse, p_state_delta, p_state, p_norm,
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
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the chunk's tile TILE, against its columns up to there, for BK keys."""
    COUNT: tl.constexpr = ((TILE + 1) * BT + BS - 1) // BS
    t_q = TILE * BT + tl.arange(0, BT)
    o_k = key_tile * BK + tl.arange(0, BK)

    products = zeros_tuple(COUNT, BT, BS)
    b_dq = tl.zeros([BT, BK], tl.float32)
    for v0 in range(0, V, BV):
        o_v = v0 + tl.arange(0, BV)
        b_dh = load_rows(p_dh, t_q, dh_row, length, o_v, V, BV)
        updated = ()
        for y in tl.static_range(COUNT):
            b_v = load_rows(p_v, y * BS + tl.arange(0, BS), v_row, length, o_v, V, BV)
            updated = updated + (dot(b_dh, tl.trans(b_v), products[y], PRECISION),)
        products = updated
        b_c = load_state(p_state, o_k, o_v, K, V, BK, BV)
        b_dq = dot(operand(b_dh, BF16, PRECISION), tl.trans(operand(b_c, BF16, PRECISION)), b_dq, PRECISION)

    b_q = load_rows(p_q, t_q, q_row, length, o_k, K, BK)
    keys = ()  # all loads before the first use: their latencies overlap
    for y in tl.static_range(COUNT):
        keys = keys + (load_rows(p_k, y * BS + tl.arange(0, BS), k_row, length, o_k, K, BK),)
    b_inverse = tl.load(p_inverse + t_q)
    b_delta = tl.load(p_delta + t_q)
    a_hi, a_lo = load_pair(p_a, t_q, padded)
    b_dq *= tl.load(p_state_inverse + t_q)[:, None]
    if HAS_NORMS:
        b_dq += tl.load(p_state_delta + t_q)[:, None] * load_vector(p_norm, o_k, K, BK)[None, :]
    b_rows = tl.sum(b_q.to(tl.float32) * b_dq, 1)

    b_diagonal = tl.zeros([BT], tl.float32)
    for y in tl.static_range(COUNT):
        t_k = y * BS + tl.arange(0, BS)
        c_hi, c_lo = load_pair(p_c, t_k, padded)
        b_d = exp2_difference(c_hi[None, :], c_lo[None, :], a_hi[:, None], a_lo[:, None], PAIRS) * SCALE
        b_ds = (products[y] * b_inverse[:, None] + b_delta[:, None]) * b_d
        b_k = keys[y]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BT, BS], tl.float32), PRECISION)
        if (y + 1) * BS > TILE * BT:
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
    store_rows(p_dq, b_dq, t_q, dq_row, length, o_k, K, BK)


@triton.jit
def _state_product(
    p_state, p_dstate, p_norm, p_dnorm, p_inner, key_tile,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """<dC', C> + dn' . n over BK keys."""
    o_k = key_tile * BK + tl.arange(0, BK)
    b_sum = tl.zeros([BK, BV], tl.float32)
    for v0 in tl.range(0, V, BV, num_stages=3):
        o_v = v0 + tl.arange(0, BV)
        b_c = load_state(p_state, o_k, o_v, K, V, BK, BV).to(tl.float32)
        b_sum += b_c * load_state(p_dstate, o_k, o_v, K, V, BK, BV).to(tl.float32)
    b_sum = tl.sum(b_sum, 1)
    if HAS_NORMS:
        b_sum += load_vector(p_norm, o_k, K, BK) * load_vector(p_dnorm, o_k, K, BK)
    tl.store(p_inner, tl.sum(b_sum, 0))


@triton.jit
def _keys_values(
    p_q, q_row, p_k, k_row, p_v, v_row, p_dh, dh_row, p_c, p_a, p_alpha, p_inverse, p_delta, p_dstate, p_dnorm,
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
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the chunk's tile TILE, against the rows from there on; dk for BK keys, dv for its share of values.

    Scores are computed transposed, keys on the rows, so that no product's result is ever transposed.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    FIRST: tl.constexpr = TILE * BT // BS  # column tiles before this one lie wholly in the past
    COUNT: tl.constexpr = L // BS - FIRST
    t_k = TILE * BT + tl.arange(0, BT)
    o_k = key_tile * BK + tl.arange(0, BK)
    c_hi, c_lo = load_pair(p_c, t_k, padded)
    b_alpha = tl.load(p_alpha + t_k)

    scores = zeros_tuple(COUNT, BT, BS)
    for k0 in tl.static_range(0, K, BK):
        b_k = load_rows(p_k, t_k, k_row, length, k0 + tl.arange(0, BK), K, BK)
        queries = ()
        for y in tl.static_range(COUNT):
            t_q = (FIRST + y) * BS + tl.arange(0, BS)
            queries = queries + (load_rows(p_q, t_q, q_row, length, k0 + tl.arange(0, BK), K, BK),)
        updated = ()
        for y in tl.static_range(COUNT):
            updated = updated + (dot(b_k, tl.trans(queries[y]), scores[y], PRECISION),)
        scores = updated
    weighted = ()
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        a_hi, a_lo = load_pair(p_a, t_q, padded)
        b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS) * SCALE
        b_s = scores[y] * b_d * tl.load(p_inverse + t_q)[None, :]
        if (FIRST + y) * BS < (TILE + 1) * BT:
            b_s = tl.where(t_q[None, :] >= t_k[:, None], b_s, 0.0)
        weighted = weighted + (operand(b_s, BF16, PRECISION),)

    products = zeros_tuple(COUNT, BT, BS)
    b_dk = tl.zeros([BT, BK], tl.float32)
    for v0 in range(0, V, BV):
        o_v = v0 + tl.arange(0, BV)
        b_v = load_rows(p_v, t_k, v_row, length, o_v, V, BV)
        b_dc = load_state(p_dstate, o_k, o_v, K, V, BK, BV)
        b_dk = dot(operand(b_v, BF16, PRECISION), tl.trans(operand(b_dc, BF16, PRECISION)), b_dk, PRECISION)
        if NKT == 1:
            b_dv = dot(
                operand(b_k, BF16, PRECISION), operand(b_dc, BF16, PRECISION), tl.zeros([BT, BV], tl.float32), PRECISION
            )
            b_dv *= b_alpha[:, None]
        updated = ()
        for y in tl.static_range(COUNT):
            t_q = (FIRST + y) * BS + tl.arange(0, BS)
            b_dh = load_rows(p_dh, t_q, dh_row, length, o_v, V, BV)
            updated = updated + (dot(b_v, tl.trans(b_dh), products[y], PRECISION),)
            if NKT == 1:
                b_dv = dot(weighted[y], operand(b_dh, BF16, PRECISION), b_dv, PRECISION)
        products = updated
        if NKT == 1:
            store_rows(p_dv, b_dv, t_k, dv_row, length, o_v, V, BV)

    # q and k again: kept since above, they would cost registers in the loop.
    queries = ()
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        queries = queries + (load_rows(p_q, t_q, q_row, length, o_k, K, BK),)
    b_k = load_rows(p_k, t_k, k_row, length, o_k, K, BK)
    if HAS_NORMS:
        b_dk += load_vector(p_dnorm, o_k, K, BK)[None, :]
    b_dk = b_dk * b_alpha[:, None]
    tl.store(p_sums + padded + t_k, tl.sum(b_k.to(tl.float32) * b_dk, 1))
    b_cols = tl.zeros([BT], tl.float32)
    for y in tl.static_range(COUNT):
        t_q = (FIRST + y) * BS + tl.arange(0, BS)
        b_q = queries[y]
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BT, BS], tl.float32), PRECISION)
        a_hi, a_lo = load_pair(p_a, t_q, padded)
        b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS) * SCALE
        b_ds = (products[y] * tl.load(p_inverse + t_q)[None, :] + tl.load(p_delta + t_q)[None, :]) * b_d
        if (FIRST + y) * BS < (TILE + 1) * BT:
            b_ds = tl.where(t_q[None, :] >= t_k[:, None], b_ds, 0.0)
            b_cols += tl.sum(tl.where(t_q[None, :] == t_k[:, None], 0.0, b_s * b_ds), 1)
        else:
            b_cols += tl.sum(b_s * b_ds, 1)
        b_dk = dot(operand(b_ds, BF16, PRECISION), operand(b_q, BF16, PRECISION), b_dk, PRECISION)
    tl.store(p_sums + t_k, b_cols)
    store_rows(p_dk, b_dk, t_k, dk_row, length, o_k, K, BK)

    if NKT > 1:  # dv needs all keys: its values are shared out among the programs of the key tiles
        SHARE: tl.constexpr = (V + BV * NKT - 1) // (BV * NKT) * BV
        for v0 in range(key_tile * SHARE, tl.minimum(key_tile * SHARE + SHARE, V), BV):
            o_v = v0 + tl.arange(0, BV)
            b_dv = tl.zeros([BT, BV], tl.float32)
            for k0 in tl.static_range(0, K, BK):
                b_kk = load_rows(p_k, t_k, k_row, length, k0 + tl.arange(0, BK), K, BK)
                b_dc = load_state(p_dstate, k0 + tl.arange(0, BK), o_v, K, V, BK, BV)
                b_dv = dot(operand(b_kk, BF16, PRECISION), operand(b_dc, BF16, PRECISION), b_dv, PRECISION)
            b_dv *= b_alpha[:, None]
            for y in tl.static_range(COUNT):
                b_dh = load_rows(p_dh, (FIRST + y) * BS + tl.arange(0, BS), dh_row, length, o_v, V, BV)
                b_dv = dot(weighted[y], operand(b_dh, BF16, PRECISION), b_dv, PRECISION)
            store_rows(p_dv, b_dv, t_k, dv_row, length, o_v, V, BV)


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st", "dh_sb", "dh_sh", "dh_st", "T",
    ],
)  # fmt: skip
def chunk_backward(
    q, q_sb, q_sh, q_st,  # (B, H, T, K) in units of UNIT elements
    k, k_sb, k_sh, k_st,  # (B, H, T, K) likewise
    v, v_sb, v_sh, v_st,  # (B, H, T, V) likewise
    dh, dh_sb, dh_sh, dh_st,  # (B, H, T, V) likewise
    c,  # (B, H, 2, NT * L)
    a,  # (B, H, 2, NT * L)
    alpha,  # (B, H, NT * L)
    d_inverse,  # (B, H, NT * L) 1 / normaliser
    delta,  # (B, H, NT * L) cotangent of the signed normaliser
    state_inverse,  # (B, H, NT * L) scale beta / normaliser
    state_delta,  # (B, H, NT * L) scale beta delta
    states,  # (B, H, NT, K, V) C
    norms,  # (B, H, NT, K) n, if HAS_NORMS
    dstates,  # (B, H, NT, K, V) dC'
    dnorms,  # (B, H, NT, K) dn', if HAS_NORMS
    T,
    dq,  # (B, H, T, K) or (B, T, H, K)
    dk,  # likewise
    dv,  # (B, H, T, V) or (B, T, H, V)
    rows,  # (B, H, 2 * NKT, NT * L) for each key tile: sum_j<i X_ij + P_i; X_ii
    cols,  # (B, H, 2 * NKT, NT * L) for each key tile: sum_i>j X_ij; U_j
    inner,  # (B, H, NKT, NT) <dC', C> + dn'.n of each key tile
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_INNER: tl.constexpr,
    BTHD: tl.constexpr,
    PAIRS: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTS programs per head, chunk and tile of BK keys share out its dq tiles and its dk and dv tiles of BT tokens.

    dq_i = scale (sum_j<=i dS_ij D_ij k_j + beta_i (C dh_i / d_i + delta_i n)),
    dk_j = scale sum_i>=j dS_ij D_ij q_i + alpha_j (dC' v_j + dn'), with dS_ij = dh_i . v_j / d_i + delta_i, X = S dS,
    dv_j = sum_i>=j S_ij dh_i / d_i + alpha_j dC'^T k_j. The programs of a chunk are neighbours: they share its tiles in
    the L2 cache.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    NRT: tl.constexpr = L // BT
    pid = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cdiv(T, L)
    padded = n_chunks.to(tl.int64) * L
    key_tile = (pid % NKT).to(tl.int32)
    part = ((pid // NKT) % PARTS).to(tl.int32)
    n = ((pid // (PARTS * NKT)) % n_chunks).to(tl.int32)
    head = pid // (n_chunks.to(tl.int64) * (PARTS * NKT))

    # All tokens are counted from the chunk's start from here on.
    t = n * L
    o_q, q_row = strided_rows(head, t, q_sb, q_sh, q_st, H, UNIT)
    o_k, k_row = strided_rows(head, t, k_sb, k_sh, k_st, H, UNIT)
    o_v, v_row = strided_rows(head, t, v_sb, v_sh, v_st, H, UNIT)
    o_dh, dh_row = strided_rows(head, t, dh_sb, dh_sh, dh_st, H, UNIT)
    o_dk, dk_row = contiguous_rows(head, t, T, H, K, BTHD)
    o_dv, dv_row = contiguous_rows(head, t, T, H, V, BTHD)
    o_pair = head * 2 * padded + t
    o_row = head * padded + t
    o_sums = (head * 2 * NKT + 2 * key_tile) * padded + t
    o_chunk = head * n_chunks + n
    p_state = states + o_chunk * K * V
    p_norm = norms + o_chunk * K
    p_dstate = dstates + o_chunk * K * V
    p_dnorm = dnorms + o_chunk * K
    for tile in tl.static_range(NRT):
        if PARTS == 1 or part == tile * PARTS // (2 * NRT):
            _queries(
                q + o_q, q_row, k + o_k, k_row, v + o_v, v_row, dh + o_dh, dh_row, c + o_pair, a + o_pair,
                d_inverse + o_row, delta + o_row, state_inverse + o_row, state_delta + o_row, p_state, p_norm,
                dq + o_dk, dk_row, rows + o_sums, T - t, key_tile, padded, K, V, BT, BK, BV, L, BS, tile, SCALE, HAS_NORMS, PAIRS, BF16, PRECISION,
            )  # fmt: skip
            if HAS_INNER and tile == 0:  # the program with the least to do
                p_inner = inner + (head * NKT + key_tile) * n_chunks + n
                _state_product(p_state, p_dstate, p_norm, p_dnorm, p_inner, key_tile, K, V, BK, BV, HAS_NORMS)
        if PARTS == 1 or part == (NRT + tile) * PARTS // (2 * NRT):
            _keys_values(
                q + o_q, q_row, k + o_k, k_row, v + o_v, v_row, dh + o_dh, dh_row, c + o_pair, a + o_pair,
                alpha + o_row, d_inverse + o_row, delta + o_row, p_dstate, p_dnorm, dk + o_dk, dk_row, dv + o_dv, dv_row,
                cols + o_sums, T - t, key_tile,
                padded, K, V, BT, BK, BV, L, BS, tile, SCALE, HAS_NORMS, PAIRS, BF16, PRECISION,
            )  # fmt: skip
