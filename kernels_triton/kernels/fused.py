"""The recurrence over chunks and each chunk's outputs in one kernel, for many heads.

The state stays in registers: chunks' states are not read again, nor written where nobody needs them. A head whose state
is more than registers hold is walked by several programs, each with a part of its values; they repeat the scores.
"""

import triton
import triton.language as tl

from .chunk_forward import rows_forward
from .common import GIVEN, POINTERS, dot, load_pair, operand, times_vector
from .packing import chunk_count, sequence_span, walk
from .segments import FOLLOW, segment_chunks, state_before, sums_offset
from .tiles import contiguous_rows, load_state, load_tokens, load_vector, store_state, store_vector, token_view


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st", "segment", "sequences",
        "T",
    ],
)  # fmt: skip
def fused_forward(
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
    c_initial,  # (B, H, K, V) if HAS_INITIAL
    n_initial,  # (B, H, K) likewise
    sums,  # (B, H, segments - 1, K, V), packed (H, NT // 4 + 1, K, V), if SEGMENTS == FOLLOW: what a segment adds to S;
    # of the first one where it ends
    norm_sums,  # (B, H, segments - 1, K) likewise for n, if NORMALIZE
    decays,  # (B, H, segments - 1) likewise: what it leaves of S and n
    segment,  # chunks per segment, if SEGMENTS == FOLLOW and not PACKED
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    h,  # (B, H, T, V) or (B, T, H, V)
    r,  # (B, H, NT * L) signed normaliser if NORMALIZE, else unused, one element
    states,  # (B, H, NT, K, V) if SAVE, else unused, one element
    norms,  # (B, H, NT, K) if SAVE and NORMALIZE, likewise
    c_last,  # (B, H, K, V)
    n_last,  # (B, H, K)
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
    HAS_INITIAL: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FEW: tl.constexpr,
    MOST: tl.constexpr,
    UNCUT: tl.constexpr,
    SAVE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BTHD: tl.constexpr,
    PACKED: tl.constexpr,
    SOURCE: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head (and packed sequence), segment of chunks and BV values, BT tokens at a time; BK covers K.

    Where heads are few they are cut into segments, if SEGMENTS == FOLLOW: state_scan has found what each of them adds.
    """
    NVT: tl.constexpr = (V + BV - 1) // BV
    PER: tl.constexpr = L // BT
    pid = tl.program_id(0).to(tl.int64)
    v0 = (pid % NVT * BV).to(tl.int32)
    state = pid // NVT
    n_chunks = chunk_count(T, sequences, L, PACKED)
    rank = 0
    if SEGMENTS == FOLLOW:
        count = MOST if PACKED else (n_chunks - 1) // segment + 1
        rank = (state % count).to(tl.int32)
        state = state // count
    head = state % H if PACKED else state
    begin, finish, t_first, t_end = sequence_span(chunks, state // H, n_chunks, T, L, PACKED)
    first = begin
    stop = finish
    if SEGMENTS == FOLLOW:
        if PACKED:
            segment = segment_chunks(finish - begin, FEW, MOST, UNCUT)
        others = (finish - begin - 1) // segment  # all segments but the last
        if PACKED:
            if rank > others:
                return
        first = begin + rank * segment
        stop = tl.minimum(first + segment, finish)
    end = tl.maximum(t_end, t_first + 1)  # of what may be read
    padded = n_chunks.to(tl.int64) * L
    o_k = tl.arange(0, BK)
    b_state = tl.zeros([BK, BV], tl.float32)
    b_norm = tl.zeros([BK], tl.float32)
    if HAS_INITIAL:
        if SEGMENTS != FOLLOW or rank == 0:
            b_state = load_state((c_initial + state * K * V,), 0, v0, K, V, BK, BV, POINTERS).to(tl.float32)
            if NORMALIZE:
                b_norm = load_vector(n_initial + state * K, o_k, K, BK).to(tl.float32)
    if SEGMENTS == FOLLOW:
        b_state, b_norm = state_before(
            b_state, b_norm, sums, norm_sums, decays, sums_offset(head, n_chunks, others, PACKED), rank, begin, segment,
            o_k, 0, v0, K, V, BK, BV, NORMALIZE, PACKED,
        )  # fmt: skip
    if not SAVE and pid == 0:
        tl.store(states, 0.0)
    if not (SAVE and NORMALIZE) and pid == 0:
        tl.store(norms, 0.0)
    if not NORMALIZE and pid == 0:
        tl.store(r, 0.0)

    walk_end, scale = walk(first, stop, t_first, t_end, gamma + head * n_chunks + first, PACKED)
    if PACKED:
        b_state *= scale
        b_norm *= scale
    for step in tl.range(first * PER, walk_end * PER, disable_licm=True):
        n = step // PER
        within = step % PER * BT
        o_chunk = head * n_chunks + n
        o_row = head * padded + n * L + within
        t = t_first + (n - begin) * L + within
        if PER > 1:
            t = tl.minimum(t, end - 1)
        b_q = load_tokens(token_view(q, q_sb, q_sh, q_st, head, t, end, H, UNIT, SOURCE), 0, 0, BT, K, BK, SOURCE)
        b_k = load_tokens(token_view(k, k_sb, k_sh, k_st, head, t, end, H, UNIT, SOURCE), 0, 0, BT, K, BK, SOURCE)
        b_v = load_tokens(token_view(v, v_sb, v_sh, v_st, head, t, end, H, UNIT, SOURCE), 0, v0, BT, V, BV, SOURCE)
        # log2 of the state's scale before and after these tokens: gamma and 0 at a chunk's ends, inside it the largest
        # a so far, that of the last token.
        g_hi, g_lo = load_pair(gamma, gamma_low, o_chunk, True)
        e_hi = 0.0
        e_lo = 0.0
        if PER > 1:
            a_hi, a_lo = load_pair(a, a_low, tl.maximum(o_row - 1, 0), True)
            g_hi = tl.where(within > 0, a_hi, g_hi)
            g_lo = tl.where(within > 0, a_lo, g_lo)
            e_hi, e_lo = load_pair(a, a_low, o_row + BT - 1, True)
            e_hi = tl.where(within == L - BT, 0.0, e_hi)
            e_lo = tl.where(within == L - BT, 0.0, e_lo)
        if SAVE:
            if within == 0:
                store_state((states + o_chunk * K * V,), b_state, 0, v0, K, V, BK, BV, POINTERS)
                if NORMALIZE and v0 == 0:
                    store_vector(norms + o_chunk * K, b_norm, o_k, K, BK)
        o_h, h_row = contiguous_rows(head, t, T, H, V, BTHD)
        rows_forward(
            (b_q,), (b_k,), (b_v,), c + o_row, c_low + o_row, a + o_row, a_low + o_row, g_hi, g_lo, floor + o_row,
            (b_state,), b_norm, h + o_h, h_row, r + o_row, r, t_end - t, v0,
            K, V, BT, BK, BV, BV, 1, SCALE, EPS, False, NORMALIZE, GIVEN, GIVEN, BF16, PRECISION,
        )  # fmt: skip
        c_hi, c_lo = load_pair(c, c_low, o_row + tl.arange(0, BT), True)
        decay = tl.exp2((g_hi - e_hi) + (g_lo - e_lo))
        b_alpha = tl.exp2((c_hi - e_hi) + (c_lo - e_lo))
        b_kt = operand(tl.trans(b_k), BF16, PRECISION)
        b_vw = operand(b_v.to(tl.float32) * b_alpha[:, None], BF16, PRECISION)
        b_state = dot(b_kt, b_vw, b_state * decay, PRECISION)
        if NORMALIZE:
            b_norm = b_norm * decay + times_vector(tl.trans(b_k), b_alpha, PRECISION)
    if SEGMENTS != FOLLOW or stop == finish:
        store_state((c_last + state * K * V,), b_state, 0, v0, K, V, BK, BV, POINTERS)
        if v0 == 0:
            store_vector(n_last + state * K, b_norm, o_k, K, BK)
