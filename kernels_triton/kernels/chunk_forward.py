"""The outputs of one chunk: h and the signed normaliser."""

import triton
import triton.language as tl

from .common import GIVEN, dot, exp2_difference, load_pair, operand, times_vector, zeros_tuple
from .packing import chunk_count, chunk_span
from .tiles import contiguous_rows, load_norm, load_state, load_tokens, state_view, store_tokens, token_view, vector


@triton.jit
def _add_scores(
    scores, b_r, q, k, norm, k0,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    COUNT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SOURCE: tl.constexpr,
    STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK keys' part of q.k against each tile, and of n.q; q's block too."""
    b_q = load_tokens(q, (COUNT - 1) * BT, k0, BT, K, BK, SOURCE)
    keys = ()  # all loads before the first use: their latencies overlap
    for y in tl.static_range(COUNT):
        keys = keys + (load_tokens(k, y * BT, k0, BT, K, BK, SOURCE),)
    if NORMALIZE:
        b_norm = load_norm(norm, k0 + tl.arange(0, BK), K, BK, STATES)
        if STATES == GIVEN:  # a kernel of a chunk waits for memory, and would hold its queries twice
            b_r += times_vector(b_q, b_norm, PRECISION)
        else:
            b_r += tl.sum(b_q.to(tl.float32) * b_norm[None, :], 1)
    updated = ()
    for y in tl.static_range(COUNT):
        updated = updated + (dot(b_q, tl.trans(keys[y]), scores[y], PRECISION),)
    return updated, b_r, b_q


@triton.jit
def rows_forward(
    q, k, v, p_c, p_c_low, p_a, p_a_low, gamma, gamma_low, p_floor, state, norm, p_h, h_row, p_r, p_d,
    length, v_first,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SHARE: tl.constexpr,
    COUNT: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    STORE_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SOURCE: tl.constexpr,
    STATES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows of the chunk's tile COUNT - 1 against the tiles up to there. Scores once, then blocks of values.

    SHARE values from v_first on; r only with the first ones. gamma, gamma_low: the decay up to these rows, or where it
    is.
    """
    t_q = (COUNT - 1) * BT + tl.arange(0, BT)

    # All loads before the first product: their latencies overlap.
    a_hi, a_lo = load_pair(p_a, p_a_low, t_q, True)
    g_hi = vector(gamma, 0)
    g_lo = vector(gamma_low, 0)
    if NORMALIZE:
        b_floor = tl.load(p_floor + t_q)
    scores = zeros_tuple(COUNT, BT, BT)
    b_r = tl.zeros([BT], tl.float32)
    if BK >= K:
        scores, b_r, b_q = _add_scores(
            scores, b_r, q, k, norm, 0, K, BT, BK, COUNT, NORMALIZE, SOURCE, STATES, PRECISION
        )
    else:  # not pipelined: Triton 3.6 races where a sum stands beside a product in a pipelined loop
        for k0 in tl.range(0, K, BK, num_stages=1):
            scores, b_r, _ = _add_scores(
                scores, b_r, q, k, norm, k0, K, BT, BK, COUNT, NORMALIZE, SOURCE, STATES, PRECISION
            )

    b_beta = exp2_difference(g_hi, g_lo, a_hi, a_lo, True)
    b_r = b_r * b_beta
    weighted = ()
    for y in tl.static_range(COUNT):
        t_k = y * BT + tl.arange(0, BT)
        c_hi, c_lo = load_pair(p_c, p_c_low, t_k, True)
        # Of pairs: where r nearly cancels it shows any error of its terms, and the gradients show it twice.
        b_s = exp2_difference(c_hi[None, :], c_lo[None, :], a_hi[:, None], a_lo[:, None], True) * scores[y]
        if y == COUNT - 1:
            b_s = tl.where(t_k[None, :] <= t_q[:, None], b_s, 0.0)
        if NORMALIZE:
            b_r += tl.sum(b_s, 1)
        weighted = weighted + (operand(b_s, BF16, PRECISION),)
    b_inverse = tl.full([BT], SCALE, tl.float32)
    if NORMALIZE:
        b_r *= SCALE
        b_normaliser = tl.maximum(tl.abs(b_r), b_floor) + EPS
        if v_first == 0:
            tl.store(p_r + t_q, b_r)
        if STORE_D:
            tl.store(p_d + t_q, b_normaliser, mask=t_q < length)
        b_inverse = SCALE / b_normaliser

    for start in range(0, SHARE, BV):
        v0 = v_first + start
        b_h = tl.zeros([BT, BV], tl.float32)
        if BK >= K:
            b_state = load_state(state, 0, v0, K, V, BK, BV, STATES)
            b_h = dot(operand(b_q, BF16, PRECISION), operand(b_state, BF16, PRECISION), b_h, PRECISION)
        else:
            for k0 in range(0, K, BK):
                b_qk = load_tokens(q, (COUNT - 1) * BT, k0, BT, K, BK, SOURCE)
                b_state = load_state(state, k0, v0, K, V, BK, BV, STATES)
                b_h = dot(operand(b_qk, BF16, PRECISION), operand(b_state, BF16, PRECISION), b_h, PRECISION)
        b_h *= b_beta[:, None]
        for y in tl.static_range(COUNT):
            b_v = load_tokens(v, y * BT, v0, BT, V, BV, SOURCE)
            b_h = dot(weighted[y], operand(b_v, BF16, PRECISION), b_h, PRECISION)
        store_tokens(p_h, b_h * b_inverse[:, None], (COUNT - 1) * BT, h_row, length, v0, BT, V, BV)


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st", "sequences", "T",
    ],
)  # fmt: skip
def chunk_forward(
    q, q_sb, q_sh, q_st,  # (B, H, T, K) in units of UNIT elements
    k, k_sb, k_sh, k_st,  # (B, H, T, K) likewise
    v, v_sb, v_sh, v_st,  # (B, H, T, V) likewise
    c,  # (B, H, NT * L)
    c_low,  # (B, H, NT * L)
    a,  # (B, H, NT * L)
    a_low,  # (B, H, NT * L)
    gamma,  # (B, H, NT)
    gamma_low,  # (B, H, NT)
    floor,  # (B, H, NT * L)
    states,  # (B, H, NT, K, V)
    norms,  # (B, H, NT, K) if NORMALIZE
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    h,  # (B, H, T, V) or (B, T, H, V)
    r,  # (B, H, NT * L) signed normaliser if NORMALIZE, else unused, one element
    d,  # (B, H, T) normaliser if STORE_D, else unused, one element
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    STORE_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BTHD: tl.constexpr,
    PACKED: tl.constexpr,
    SOURCE: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head, chunk and tile of BT tokens.

    h_i = (sum_j<=i S_ij v_j + scale beta_i C^T q_i) / d_i.
    """
    NRT: tl.constexpr = L // BT
    pid = tl.program_id(0).to(tl.int64)
    n_chunks = chunk_count(T, sequences, L, PACKED)
    padded = n_chunks.to(tl.int64) * L
    role = (pid % NRT).to(tl.int32)
    n = ((pid // NRT) % n_chunks).to(tl.int32)
    head = pid // (n_chunks.to(tl.int64) * NRT)

    # All tokens are counted from the chunk's start from here on.
    t, length, end = chunk_span(chunks, n, n_chunks, T, L, PACKED)
    q_view = token_view(q, q_sb, q_sh, q_st, head, t, end, H, UNIT, SOURCE)
    k_view = token_view(k, k_sb, k_sh, k_st, head, t, end, H, UNIT, SOURCE)
    v_view = token_view(v, v_sb, v_sh, v_st, head, t, end, H, UNIT, SOURCE)
    o_chunk = head * n_chunks + n
    state = state_view(states, o_chunk, K, V, SOURCE)
    o_h, h_row = contiguous_rows(head, t, T, H, V, BTHD)
    o_row = head * padded + n * L
    p_norm = norms + o_chunk * K
    if not STORE_D and pid == 0:
        tl.store(d, 0.0)
    if not NORMALIZE and pid == 0:
        tl.store(r, 0.0)
    if PACKED:
        if length <= 0:
            return
    for tile in tl.static_range(NRT):
        if role == tile:
            rows_forward(
                q_view, k_view, v_view, c + o_row, c_low + o_row, a + o_row, a_low + o_row, gamma + o_chunk,
                gamma_low + o_chunk, floor + o_row, state, p_norm, h + o_h, h_row, r + o_row, d + head * T + t,
                length, 0,
                K, V, BT, BK, BV, V, tile + 1, SCALE, EPS, STORE_D, NORMALIZE, SOURCE, SOURCE, BF16, PRECISION,
            )  # fmt: skip
