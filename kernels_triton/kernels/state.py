"""The recurrence over chunks: states forward, their cotangents backward, in one kernel."""

import triton
import triton.language as tl

from .common import (
    DESCRIPTORS,
    POINTERS,
    dot,
    exp2_difference,
    inner_product,
    load_pair,
    load_row_decays,
    loaded_inner_product,
    operand,
    state_weight,
)
from .packing import chunk_count, sequence_span, walk
from .segments import FOLLOW, LAST, ONE, SUM, segment_chunks, state_before, sums_offset
from .tiles import load_state, load_tokens, load_vector, state_view, store_state, store_vector, token_view


@triton.jit
def _to_one(x):
    """The power of two that brings a positive x to (0.5, 1], and its inverse.

    float16 has few digits for weights below 6e-5, as all weights of a chunk may be while nothing else has one yet.
    """
    bits = tl.minimum(tl.abs(x).to(tl.int32, bitcast=True), 0x7E800000)  # what is not finite stays harmless, and so
    bits = tl.maximum((bits + 0x7FFFFF) & 0x7F800000, 0x00800000)  # does 0
    return (0x7F000000 - bits).to(tl.float32, bitcast=True), bits.to(tl.float32, bitcast=True)


@triton.jit
def norm_product(b_norm, p_n, o_k, vt, K: tl.constexpr, BK: tl.constexpr):
    """dn . n of one key tile; the first value tile's programs own it."""
    return tl.where(vt == 0, tl.sum(b_norm * load_vector(p_n, o_k, K, BK), 0), 0.0)


@triton.jit(
    do_not_specialize_on_alignment=[
        "x_sb", "x_sh", "x_st", "y_sb", "y_sh", "y_st", "segment", "sequences", "T",
    ],
)  # fmt: skip
def state_scan(
    x, x_sb, x_sh, x_st,  # (B, H, T, K) in units of UNIT elements: k; backward: q
    y, y_sb, y_sh, y_st,  # (B, H, T, V) likewise: v; backward: dh
    w,  # (B, H, NT * L) log2 of a token's weight in S and n, c; backward, if PAIRS: its weight in S, scale beta / d
    w_low,  # (B, H, NT * L) forward, if PAIRS: c_low
    e,  # (B, H, NT * L) backward, unless PAIRS: scale beta / d follows from it and gamma
    u,  # (B, H, NT * L) backward: a token's weight in n over that in S, delta
    gamma,  # (B, H, NT) log2
    state_in,  # (B, H, K, V) if HAS_STATE_IN: c_initial; backward: the cotangent of c_last
    norm_in,  # (B, H, K) likewise for n, if HAS_NORM_IN
    fw_last,  # (B, H, K, V) backward, if HAS_STATE_IN: c_last
    fw_norm_last,  # (B, H, K) backward, if HAS_STATE_IN: n_last
    fw_initial,  # (B, H, K, V) backward, if HAS_INITIAL: c_initial
    fw_norm_initial,  # (B, H, K) backward, if HAS_INITIAL
    sums,  # (B, H, segments - 1, K, V), packed (H, NT // 4 + 1, K, V); if SEGMENTS >= FOLLOW: what each adds to S;
    # of the first one where it ends
    norm_sums,  # (B, H, segments - 1, K) likewise for n
    decays,  # (B, H, segments - 1) likewise: what it leaves of S and n
    begun,  # states, with those of the first segment: the same memory, if SEGMENTS == FOLLOW
    begun_norms,  # norms likewise, if HAS_NORMS
    states_view,  # states, for a store through a descriptor if SOURCE says so
    segment,  # chunks per segment, unless SEGMENTS == ONE or PACKED
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    states,  # (B, H, NT, K, V) state at each chunk's start; backward: cotangent of the state after each chunk; if KEEP
    norms,  # (B, H, NT, K) likewise for n if HAS_NORMS too. What is not kept has one element
    state_out,  # (B, H, K, V) c_last; backward: the cotangent of c_initial. SUM: sums
    norm_out,  # (B, H, K). SUM: norm_sums
    outer,  # (B, H, NKT * NVT, 2) backward: partial <dC, C> + dn.n at the last and the initial state. SUM: decays
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEEP: tl.constexpr,
    PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr,
    HAS_STATE_IN: tl.constexpr,
    HAS_NORM_IN: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    FEW: tl.constexpr,
    MOST: tl.constexpr,
    UNCUT: tl.constexpr,
    PACKED: tl.constexpr,
    SOURCE: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head (and packed sequence), segment of chunks and (BK, BV) tile of the state.

    S <- gamma S + sum_t w_t x_t y_t^T and n <- gamma n + sum_t u_t x_t, chunk by chunk; backward from the last one.
    Where heads are few, the scan is cut into segments that run side by side: a first launch (SUM) runs the first one
    and finds what each other but the last adds, a second (FOLLOW) starts the others from what those before them leave.
    A packed sequence is cut as it would be alone: if it has more than UNCUT chunks, into MOST segments at most, into
    more than FEW of them only where it is long.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    NVT: tl.constexpr = (V + BV - 1) // BV
    PER: tl.constexpr = L // BT  # steps per chunk
    pid = tl.program_id(0).to(tl.int64)
    vt = pid % NVT
    kt = (pid // NVT) % NKT
    state = pid // (NVT * NKT)
    n_chunks = chunk_count(T, sequences, L, PACKED)
    if (not KEEP or not HAS_NORMS) and pid == 0:
        tl.store(norms, 0.0)
    if not KEEP and pid == 0:
        tl.store(states, 0.0)
    if SEGMENTS != SUM and not HAS_OUTER and pid == 0:
        tl.store(outer, 0.0)
    rank = 0
    if SEGMENTS == LAST:  # of packed sequences there is none
        rank = ((n_chunks - 1) // segment).to(tl.int32)
    elif SEGMENTS != ONE:
        count = MOST - (SEGMENTS == SUM) if PACKED else (n_chunks - 1) // segment
        rank = (state % count).to(tl.int32) + (SEGMENTS == FOLLOW and not PACKED)
        state = state // count
    head = state % H if PACKED else state
    begin, finish, t_first, t_end = sequence_span(chunks, state // H, n_chunks, T, L, PACKED)
    first = begin
    stop = finish
    others = 0
    if SEGMENTS != ONE:
        if PACKED:
            segment = segment_chunks(finish - begin, FEW, MOST, UNCUT)
        first = begin + rank * segment
        stop = tl.minimum(first + segment, finish)
        others = (finish - begin - 1) // segment  # all segments but the last
        if PACKED:
            if SEGMENTS == SUM:
                if rank >= others:
                    return
            elif rank > others or (rank == 0 and others > 0):
                return
        o_sums = sums_offset(head, n_chunks, others, PACKED)
    padded = n_chunks.to(tl.int64) * L
    k0 = (kt * BK).to(tl.int32)
    v0 = (vt * BV).to(tl.int32)
    o_k = k0 + tl.arange(0, BK)
    o_t = tl.arange(0, BT)
    p_outer = outer + (state * NKT * NVT + kt * NVT + vt) * 2
    o_state = state * K * V

    b_state = tl.zeros([BK, BV], tl.float32)
    b_norm = tl.zeros([BK], tl.float32)
    if HAS_STATE_IN:
        if rank == 0:
            b_state = load_state((state_in + o_state,), k0, v0, K, V, BK, BV, POINTERS).to(tl.float32)
    if HAS_NORM_IN:
        if rank == 0:
            b_norm = load_vector(norm_in + state * K, o_k, K, BK).to(tl.float32)
    if HAS_OUTER:
        if rank == (others > 0):  # one program of each tile: of two launches it is the second one's first
            product = tl.full([], 0.0, tl.float32)
            if HAS_STATE_IN:
                b_in = load_state((state_in + o_state,), k0, v0, K, V, BK, BV, POINTERS).to(tl.float32)
                b_c = load_state((fw_last + o_state,), k0, v0, K, V, BK, BV, POINTERS)
                product = loaded_inner_product(b_in, b_c, BK * BV, BF16, PRECISION)
                if HAS_NORMS and HAS_NORM_IN:
                    b_in = load_vector(norm_in + state * K, o_k, K, BK).to(tl.float32)
                    product += norm_product(b_in, fw_norm_last + state * K, o_k, vt, K, BK)
            tl.store(p_outer, product)

    if SEGMENTS >= FOLLOW:
        b_state, b_norm = state_before(
            b_state, b_norm, sums, norm_sums, decays, o_sums, rank, begin, segment, o_k, k0, v0,
            K, V, BK, BV, HAS_NORMS, PACKED,
        )  # fmt: skip
    left = tl.full([], 1.0, tl.float32)
    end = tl.maximum(t_end, t_first + 1)  # of what may be read

    walk_end, scale = walk(first, stop, t_first, t_end, gamma + head * n_chunks + first, PACKED)
    if PACKED:
        b_state *= scale
        b_norm *= scale
    for step in range(first * PER, walk_end * PER):
        n = step // PER
        if BACKWARD:
            n = begin + finish - 1 - n
        o_chunk = head * n_chunks + n
        decay = tl.exp2(tl.load(gamma + o_chunk))
        if PER > 1:
            decay = tl.where(step % PER == 0, decay, 1.0)
        if PER == 1 or step % PER == 0:
            if KEEP:
                if SEGMENTS != SUM or rank == 0:
                    if SOURCE == DESCRIPTORS:
                        kept = states_view
                    else:
                        kept = states
                    store_state(state_view(kept, o_chunk, K, V, SOURCE), b_state, k0, v0, K, V, BK, BV, SOURCE)
                    if HAS_NORMS and vt == 0:
                        store_vector(norms + o_chunk * K, b_norm, o_k, K, BK)
        b_state *= decay
        b_norm *= decay
        left *= decay

        t = t_first + (n - begin) * L + step % PER * BT
        o_w = head * padded + n * L + step % PER * BT + o_t
        if BACKWARD:
            if PAIRS:  # stored: where it is computed here from pairs, ptxas spills kilobytes for heads of 64
                b_w = tl.load(w + o_w)
            else:
                hi, lo, factor = load_row_decays(w, w, e, o_w, False)
                b_w = state_weight(hi, lo, factor, gamma + o_chunk, gamma + o_chunk, SCALE, False)
            if HAS_NORMS:
                b_u = b_w * tl.load(u + o_w)
        else:
            hi, lo = load_pair(w, w_low, o_w, PAIRS)
            b_w = exp2_difference(hi, lo, 0.0, 0.0, PAIRS)
            b_u = b_w
        t = tl.minimum(t, end - 1)
        x_view = token_view(x, x_sb, x_sh, x_st, head, t, end, H, UNIT, SOURCE)
        y_view = token_view(y, y_sb, y_sh, y_st, head, t, end, H, UNIT, SOURCE)
        b_x = load_tokens(x_view, 0, k0, BT, K, BK, SOURCE)
        b_y = load_tokens(y_view, 0, v0, BT, V, BV, SOURCE)
        b_xw = tl.trans(b_x).to(tl.float32) * b_w[None, :]  # [BK, BT]
        # Forward no weight exceeds 1. Backward float16 would have to hold any, and beside it the smallest that counts.
        if not BACKWARD and b_y.dtype == tl.float16:
            up, down = _to_one(tl.max(b_w, 0))
            b_new = dot((b_xw * up).to(tl.float16), b_y, tl.zeros([BK, BV], tl.float32), PRECISION)
            b_state = tl.fma(b_new, down, b_state)
        else:
            b_state = dot(operand(b_xw, BF16, PRECISION), operand(b_y, BF16, PRECISION), b_state, PRECISION)
        if HAS_NORMS and vt == 0:
            b_norm += tl.sum(b_x.to(tl.float32) * b_u[:, None], 0)

    if SEGMENTS == SUM:
        o_sum = o_sums + (first // 4 if PACKED else rank)
        store_state((state_out + o_sum * K * V,), b_state, k0, v0, K, V, BK, BV, POINTERS)
        if vt == 0:
            store_vector(norm_out + o_sum * K, b_norm, o_k, K, BK)
            if kt == 0:
                tl.store(outer + o_sum, left)
    elif stop == finish:
        store_state((state_out + o_state,), b_state, k0, v0, K, V, BK, BV, POINTERS)
        if vt == 0:
            store_vector(norm_out + state * K, b_norm, o_k, K, BK)
    if HAS_OUTER and stop == finish:
        product = tl.full([], 0.0, tl.float32)
        if HAS_INITIAL:
            b_c = load_state((fw_initial + o_state,), k0, v0, K, V, BK, BV, POINTERS).to(tl.float32)
            product = inner_product(b_state, b_c, BK * BV)
            if HAS_NORMS:
                product += norm_product(b_norm, fw_norm_initial + state * K, o_k, vt, K, BK)
        tl.store(p_outer + 1, product)
