"""The recurrence over chunks backward and each chunk's gradients in one kernel, for small heads."""

import triton
import triton.language as tl

from .common import (
    GIVEN,
    POINTERS,
    add_products,
    dot,
    inner_product,
    load_row_decays,
    loaded_inner_product,
    operand,
    row_products,
    state_weight,
    trace,
)
from .keys_backward import keys_backward
from .packing import chunk_count, sequence_span, walk
from .queries_backward import queries_backward
from .tiles import (
    contiguous_rows,
    load_state,
    load_tokens,
    load_vector,
    state_view,
    store_state,
    store_vector,
    token_view,
)
from .values_backward import values_backward


@triton.jit(
    do_not_specialize_on_alignment=[
        "q_sb", "q_sh", "q_st", "k_sb", "k_sh", "k_st", "v_sb", "v_sh", "v_st", "dh_sb", "dh_sh", "dh_st",
        "h_sb", "h_sh", "h_st", "sequences", "T",
    ],
)  # fmt: skip
def fused_backward(
    q, q_sb, q_sh, q_st,  # (B, H, T, K) in units of UNIT elements
    k, k_sb, k_sh, k_st,  # (B, H, T, K) likewise
    v, v_sb, v_sh, v_st,  # (B, H, T, V) likewise
    dh, dh_sb, dh_sh, dh_st,  # (B, H, T, V) likewise
    h, h_sb, h_sh, h_st,  # (B, H, T, V) likewise, if FIND_DELTA: delta lacks the factor dh . h then
    c,  # (B, H, NT * L)
    c_low,  # (B, H, NT * L) if PAIRS
    a,  # (B, H, NT * L) if PAIRS
    a_low,  # (B, H, NT * L) if PAIRS
    gamma,  # (B, H, NT) log2
    gamma_low,  # (B, H, NT) if PAIRS
    e,  # (B, H, NT * L)
    delta,  # (B, H, NT * L)
    states,  # (B, H, NT, K, V)
    norms,  # (B, H, NT, K) if HAS_NORMS
    dc_last,  # (B, H, K, V) if HAS_LAST
    dn_last,  # (B, H, K) likewise
    c_last,  # (B, H, K, V) likewise
    n_last,  # (B, H, K) likewise
    c_initial,  # (B, H, K, V) if HAS_INITIAL
    n_initial,  # (B, H, K) likewise
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    dq,  # (B, H, T, K) or (B, T, H, K)
    dk,  # likewise
    dv,  # (B, H, T, V) or (B, T, H, V)
    rows,  # (B, H, 2, NT * L)
    cols,  # (B, H, 2, NT * L)
    inner,  # (B, H, 1, NT)
    outer,  # (B, H, 1, 2)
    dc_initial,  # (B, H, K, V)
    dn_initial,  # (B, H, K)
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_LAST: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    FIND_DELTA: tl.constexpr,
    BTHD: tl.constexpr,
    PACKED: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head (and packed sequence), from the last chunk to the first; BK and BV cover K and V."""
    state = tl.program_id(0).to(tl.int64)
    head = state % H if PACKED else state
    n_chunks = chunk_count(T, sequences, L, PACKED)
    first, stop, t_first, t_end = sequence_span(chunks, state // H, n_chunks, T, L, PACKED)
    end = tl.maximum(t_end, t_first + 1)  # of what may be read
    padded = n_chunks.to(tl.int64) * L
    o_k = tl.arange(0, BK)
    o_state = state * K * V
    b_state = tl.zeros([BK, BV], tl.float32)
    b_norm = tl.zeros([BK], tl.float32)
    product = tl.full([], 0.0, tl.float32)
    if HAS_LAST:
        b_state = load_state((dc_last + o_state,), 0, 0, K, V, BK, BV, POINTERS).to(tl.float32)
        b_last = load_state((c_last + o_state,), 0, 0, K, V, BK, BV, POINTERS)
        product = loaded_inner_product(b_state, b_last, BK * BV, BF16, PRECISION)
        if HAS_NORMS:
            b_norm = load_vector(dn_last + state * K, o_k, K, BK).to(tl.float32)
            product += tl.sum(b_norm * load_vector(n_last + state * K, o_k, K, BK), 0)
    tl.store(outer + state * 2, product)

    walk_end, scale = walk(first, stop, t_first, t_end, gamma + head * n_chunks + first, PACKED)
    if PACKED:
        b_state *= scale
        b_norm *= scale
    for step in tl.range(first, walk_end, disable_licm=True):  # what it would hoist fills the registers
        n = first + stop - 1 - step
        t = t_first + (n - first) * L
        o_chunk = head * n_chunks + n
        o_row = head * padded + n * L
        o_sums = head * 2 * padded + n * L
        b_q = load_tokens(token_view(q, q_sb, q_sh, q_st, head, t, end, H, UNIT, SOURCE), 0, 0, L, K, BK, SOURCE)
        b_k = load_tokens(token_view(k, k_sb, k_sh, k_st, head, t, end, H, UNIT, SOURCE), 0, 0, L, K, BK, SOURCE)
        b_v = load_tokens(token_view(v, v_sb, v_sh, v_st, head, t, end, H, UNIT, SOURCE), 0, 0, L, V, BV, SOURCE)
        decay = tl.exp2(tl.load(gamma + o_chunk))
        b_delta = tl.load(delta + o_row + tl.arange(0, L))
        if FIND_DELTA:
            b_h = load_tokens(token_view(h, h_sb, h_sh, h_st, head, t, end, H, UNIT, SOURCE), 0, 0, L, V, BV, SOURCE)
        if HAS_NORMS:
            b_n = load_vector(norms + o_chunk * K, o_k, K, BK)
        b_dh = load_tokens(token_view(dh, dh_sb, dh_sh, dh_st, head, t, end, H, UNIT, SOURCE), 0, 0, L, V, BV, SOURCE)
        if FIND_DELTA:
            b_delta *= row_products(b_dh, b_h, L, PRECISION)
        b_c = load_state(state_view(states, o_chunk, K, V, SOURCE), 0, 0, K, V, BK, BV, SOURCE)
        product = trace(add_products(tl.zeros([BV, BV], tl.float32), b_c, b_state, BF16, PRECISION), BV)
        if HAS_NORMS:
            product += tl.sum(b_norm * b_n, 0)
        tl.store(inner + o_chunk, product)
        o_dk, dk_row = contiguous_rows(head, t, T, H, K, BTHD)
        o_dv, dv_row = contiguous_rows(head, t, T, H, V, BTHD)
        queries_backward(
            (b_q,), (b_k,), (b_v,), (b_dh,), c + o_row, c_low + o_row, a + o_row, a_low + o_row,
            e + o_row, b_delta, gamma + o_chunk, gamma_low + o_chunk, (b_c,), norms + o_chunk * K,
            dq + o_dk, dk_row, rows + o_sums, t_end - t, 0, padded,
            K, V, L, BK, BV, L, L, 0, SCALE, HAS_NORMS, PAIRS, GIVEN, GIVEN, BF16, PRECISION,
        )  # fmt: skip
        keys_backward(
            (b_q,), (b_k,), (b_v,), (b_dh,), c + o_row, c_low + o_row, a + o_row, a_low + o_row,
            e + o_row, b_delta, (b_state,), b_norm,
            (b_c,), b_norm, dk + o_dk, dk_row, cols + o_sums, inner, t_end - t, 0, padded,
            K, V, L, BK, BV, L, L, 0, SCALE, HAS_NORMS, False, PAIRS, GIVEN, GIVEN, BF16, PRECISION,
        )  # fmt: skip
        values_backward(
            (b_q,), (b_k,), (b_dh,), c + o_row, c_low + o_row, a + o_row, a_low + o_row, e + o_row, (b_state,),
            dv + o_dv, dv_row, t_end - t, 0,
            K, V, L, BK, BV, L, L, 0, 1, SCALE, PAIRS, GIVEN, GIVEN, BF16, PRECISION,
        )  # fmt: skip
        hi, lo, factor = load_row_decays(a + o_row, a_low + o_row, e + o_row, tl.arange(0, L), PAIRS)
        b_w = state_weight(hi, lo, factor, gamma + o_chunk, gamma_low + o_chunk, SCALE, PAIRS)
        # q again: a tile that is used from registers too would not be fetched ahead for the products above.
        b_q = load_tokens(token_view(q, q_sb, q_sh, q_st, head, t, end, H, UNIT, SOURCE), 0, 0, L, K, BK, SOURCE)
        b_u = b_w * b_delta
        b_qt = tl.trans(b_q).to(tl.float32)
        b_qw = operand(b_qt * b_w[None, :], BF16, PRECISION)
        # Not added up in the product's own accumulator: the assembler would then run every product of the loop one
        # instruction at a time (its remark C7515).
        b_sum = dot(b_qw, operand(b_dh, BF16, PRECISION), tl.zeros([BK, BV], tl.float32), PRECISION)
        b_state = tl.fma(b_state, decay, b_sum)
        if HAS_NORMS:
            b_norm = b_norm * decay + tl.sum(b_qt * b_u[None, :], 1)

    store_state((dc_initial + o_state,), b_state, 0, 0, K, V, BK, BV, POINTERS)
    store_vector(dn_initial + state * K, b_norm, o_k, K, BK)
    product = tl.full([], 0.0, tl.float32)
    if HAS_INITIAL:
        b_c = load_state((c_initial + o_state,), 0, 0, K, V, BK, BV, POINTERS)
        product = inner_product(b_state, b_c, BK * BV)
        if HAS_NORMS:
            product += tl.sum(b_norm * load_vector(n_initial + state * K, o_k, K, BK), 0)
    tl.store(outer + state * 2 + 1, product)
