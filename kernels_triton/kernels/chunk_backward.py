"""The gradients of one chunk's queries, keys and values, with what dI and dF need of it."""

import triton
import triton.language as tl

from .keys_backward import keys_backward
from .packing import chunk_count, chunk_span
from .queries_backward import queries_backward
from .tiles import contiguous_rows, load_state, load_vector, state_view, token_view
from .values_backward import values_backward


@triton.jit
def _state_product(
    state, dstate, p_norm, p_dnorm, p_inner, key_tile,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    SOURCE: tl.constexpr,
):  # fmt: skip
    """<dC', C> + dn' . n over BK keys."""
    k_first = key_tile * BK
    o_k = k_first + tl.arange(0, BK)
    b_sum = tl.zeros([BK, BV], tl.float32)
    for v0 in tl.range(0, V, BV, num_stages=3):
        b_c = load_state(state, k_first, v0, K, V, BK, BV, SOURCE).to(tl.float32)
        b_sum += b_c * load_state(dstate, k_first, v0, K, V, BK, BV, SOURCE).to(tl.float32)
    b_sum = tl.sum(b_sum, 1)
    if HAS_NORMS:
        b_sum += load_vector(p_norm, o_k, K, BK) * load_vector(p_dnorm, o_k, K, BK)
    tl.store(p_inner, tl.sum(b_sum, 0))


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st", "dh_sb", "dh_sh", "dh_st",
        "sequences", "T",
    ],
)  # fmt: skip
def chunk_backward(
    q, q_sb, q_sh, q_st,  # (B, H, T, K) in units of UNIT elements
    k, k_sb, k_sh, k_st,  # (B, H, T, K) likewise
    v, v_sb, v_sh, v_st,  # (B, H, T, V) likewise
    dh, dh_sb, dh_sh, dh_st,  # (B, H, T, V) likewise
    c,  # (B, H, NT * L)
    c_low,  # (B, H, NT * L) if PAIRS
    a,  # (B, H, NT * L) if PAIRS
    a_low,  # (B, H, NT * L) if PAIRS
    gamma,  # (B, H, NT) log2
    gamma_low,  # (B, H, NT) if PAIRS
    e,  # (B, H, NT * L) a + log2 d, d the normaliser; if PAIRS 1 / d
    delta,  # (B, H, NT * L) d times the cotangent of the signed normaliser
    states,  # (B, H, NT, K, V) C
    norms,  # (B, H, NT, K) n, if HAS_NORMS
    dstates,  # (B, H, NT, K, V) dC'
    dnorms,  # (B, H, NT, K) dn', if HAS_NORMS
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
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
    SPAN: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_INNER: tl.constexpr,
    TRACE: tl.constexpr,
    ROLES: tl.constexpr,
    BTHD: tl.constexpr,
    PACKED: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head, chunk, role (dq, dk or dv), tile of BT tokens and tile of BK keys (dv: as many parts of V).

    dq_i = scale (sum_j<=i dS_ij D_ij k_j + beta_i (C dh_i + delta_i n) / d_i),
    dk_j = scale sum_i>=j dS_ij D_ij q_i + alpha_j (dC' v_j + dn'), with dS_ij = (dh_i . v_j + delta_i) / d_i, X = S dS,
    dv_j = sum_i>=j S_ij dh_i / d_i + alpha_j dC'^T k_j. The programs of a chunk are neighbours: they share its tiles in
    the L2 cache. A program of dv takes SPAN tiles of tokens. <dC', C> is found with the last tile of dk if
    TRACE, else by the last of the chunk's ROLES, dv's or one of its own.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    NRT: tl.constexpr = L // BT
    pid = tl.program_id(0).to(tl.int64)
    n_chunks = chunk_count(T, sequences, L, PACKED)
    padded = n_chunks.to(tl.int64) * L
    key_tile = (pid % NKT).to(tl.int32)
    role = ((pid // NKT) % ROLES).to(tl.int32)
    n = ((pid // (ROLES * NKT)) % n_chunks).to(tl.int32)
    head = pid // (n_chunks.to(tl.int64) * (ROLES * NKT))

    # All tokens are counted from the chunk's start from here on.
    t, length, end = chunk_span(chunks, n, n_chunks, T, L, PACKED)
    q_view = token_view(q, q_sb, q_sh, q_st, head, t, end, H, UNIT, SOURCE)
    k_view = token_view(k, k_sb, k_sh, k_st, head, t, end, H, UNIT, SOURCE)
    v_view = token_view(v, v_sb, v_sh, v_st, head, t, end, H, UNIT, SOURCE)
    dh_view = token_view(dh, dh_sb, dh_sh, dh_st, head, t, end, H, UNIT, SOURCE)
    o_dk, dk_row = contiguous_rows(head, t, T, H, K, BTHD)
    o_dv, dv_row = contiguous_rows(head, t, T, H, V, BTHD)
    o_row = head * padded + n * L
    o_sums = (head * 2 * NKT + 2 * key_tile) * padded + n * L
    o_chunk = head * n_chunks + n
    state = state_view(states, o_chunk, K, V, SOURCE)
    p_norm = norms + o_chunk * K
    dstate = state_view(dstates, o_chunk, K, V, SOURCE)
    p_dnorm = dnorms + o_chunk * K
    p_inner = inner + (head * NKT + key_tile) * n_chunks + n
    if PACKED:
        if length <= 0:
            return
    for tile in tl.static_range(NRT):
        if role == tile:
            queries_backward(
                q_view, k_view, v_view, dh_view, c + o_row, c_low + o_row, a + o_row, a_low + o_row,
                e + o_row, delta + o_row, gamma + o_chunk, gamma_low + o_chunk, state, p_norm,
                dq + o_dk, dk_row, rows + o_sums, length, key_tile, padded,
                K, V, BT, BK, BV, L, BS, tile, SCALE, HAS_NORMS, PAIRS, SOURCE, SOURCE, BF16, PRECISION,
            )  # fmt: skip
        if role == NRT + tile:
            keys_backward(
                q_view, k_view, v_view, dh_view, c + o_row, c_low + o_row, a + o_row, a_low + o_row,
                e + o_row, delta + o_row, dstate, p_dnorm,
                state, p_norm, dk + o_dk, dk_row, cols + o_sums, p_inner, length, key_tile, padded,
                K, V, BT, BK, BV, L, BS, tile, SCALE, HAS_NORMS, TRACE and tile == NRT - 1, PAIRS, SOURCE, SOURCE,
                BF16, PRECISION,
            )  # fmt: skip
        if tile % SPAN == 0:
            if role == 2 * NRT + tile // SPAN:
                values_backward(
                    q_view, k_view, dh_view, c + o_row, c_low + o_row, a + o_row, a_low + o_row, e + o_row,
                    dstate, dv + o_dv, dv_row, length, key_tile,
                    K, V, BT, BK, BV, L, BS, tile, SPAN, SCALE, PAIRS, SOURCE, SOURCE, BF16, PRECISION,
                )  # fmt: skip
    if HAS_INNER and not TRACE:
        if role == ROLES - 1:  # the program with the least to do
            _state_product(state, dstate, p_norm, p_dnorm, p_inner, key_tile, K, V, BK, BV, HAS_NORMS, SOURCE)
