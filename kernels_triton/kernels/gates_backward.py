"""The gates' gradients, from the sums that the kernels with products leave."""

import triton
import triton.language as tl

from .common import cast
from .gates_backward_sums import token_sums
from .packing import chunk_count, chunk_sequence, chunk_span, sequence_chunks

CHUNKS = tl.constexpr(64)  # later chunks' gains that are added up at a time


@triton.jit(
    do_not_specialize_on_alignment=[
        "f_sb", "f_sh", "f_st", "i_sb", "i_sh", "i_st", "sequences", "T",
    ],
)  # fmt: skip
def gates_backward(
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations
    i, i_sb, i_sh, i_st,  # (B, H, T) input gate pre-activations if SIGMOID
    gamma,  # (B, H, NT) log2
    rows,  # (B, H, 2 * NKT, NT * L) per key tile: sum_j<i X_ij + P_i; X_ii
    cols,  # (B, H, 2 * NKT, NT * L) per key tile: sum_i>j X_ij; U_j
    inner,  # (B, H, NW, NT) partial <dC', C> + dn'.n per chunk
    outer,  # (B, H, NP, 2) likewise at the last state; at the initial state
    dm_last,  # (B, H) if HAS_DM_LAST; without HAS_DLAST what is left of it, rho
    picked,  # (B, H)
    gains,  # (B, H, 3, NT) if HAS_DLAST: see gates_backward_sums.py
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    di,  # (B, H, T) or (B, T, H)
    df,  # likewise
    dm_initial,  # (B, H)
    H: tl.constexpr,
    L: tl.constexpr,
    NKT: tl.constexpr,
    NW: tl.constexpr,
    NP: tl.constexpr,
    HAS_DLAST: tl.constexpr,
    HAS_DM_LAST: tl.constexpr,
    SIGMOID: tl.constexpr,
    BTHD: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program per head and chunk: dI and dF from per-token sums, added in float64 in a fixed order."""
    n_chunks = chunk_count(T, sequences, L, PACKED)
    pid = tl.program_id(0).to(tl.int64)
    head = pid // n_chunks
    n = pid % n_chunks
    padded = n_chunks.to(tl.int64) * L
    o = tl.arange(0, L)
    start, length, _ = chunk_span(chunks, n, n_chunks, T, L, PACKED)
    t = (start + o).to(tl.int64)
    m_t = o < length
    row = n * L + o
    state = head  # whose states' cotangents these are
    first_chunk = 0
    last_chunk = n_chunks - 1
    if PACKED:
        sequence = chunk_sequence(chunks, n, n_chunks, sequences)
        if sequence < 0:
            return
        state = sequence.to(tl.int64) * H + head
        first_chunk, stop = sequence_chunks(chunks, sequence, n_chunks)
        last_chunk = stop - 1

    b_row, b_diag, b_col, b_u = token_sums(rows, cols, head, row, padded, NKT, L)
    w = tl.full([], 0.0, tl.float64)
    for part in range(0, NW):
        w += tl.load(inner + (head * NW + part) * n_chunks + n).to(tl.float64)
    at_last = tl.full([], 0.0, tl.float64)
    at_initial = tl.full([], 0.0, tl.float64)
    for part in range(0, NP):
        at_last += tl.load(outer + (state * NP + part) * 2).to(tl.float64)
        at_initial += tl.load(outer + (state * NP + part) * 2 + 1).to(tl.float64)
    w = w * tl.exp2(tl.load(gamma + head * n_chunks + n)).to(tl.float64)

    b_di = b_col + b_diag + b_u
    b_dlogf = tl.cumsum(b_row - b_col, 0, reverse=True) + (tl.cumsum(b_u, 0) - b_u) + w
    dm0 = at_initial
    if (HAS_DLAST or HAS_DM_LAST) and not SIGMOID:  # the last stabiliser's own goes where its maximum came from
        rho = tl.full([], 0.0, tl.float64)
        if HAS_DLAST:
            rho -= at_last
        if HAS_DM_LAST:
            rho += tl.load(dm_last + state).to(tl.float64)
        pick = tl.load(picked + state)
        dm0 += tl.where(pick < 0, rho, 0.0)
        if HAS_DLAST:
            # <dC, C> of the last state is w, what this chunk's tokens add and what later ones gain. If those are small,
            # it is taken from these sums, so that the rounding of w, which rho is to cancel, cancels too. Where nothing
            # is to cancel (cotangents of zeros) there are other bits to keep: those of no cotangents.
            gained = tl.full([], 0.0, tl.float64)
            squares = tl.full([], 0.0, tl.float64)
            for n0 in range(n + 1, last_chunk + 1, CHUNKS):
                later = n0 + tl.arange(0, CHUNKS)
                m_n = later <= last_chunk
                p_gains = gains + head * 3 * n_chunks + later
                gain = tl.load(p_gains, mask=m_n, other=0.0).to(tl.float64)
                gained += tl.sum(gain + tl.load(p_gains + n_chunks, mask=m_n, other=0.0).to(tl.float64), 0)
                squares += tl.sum(tl.load(p_gains + 2 * n_chunks, mask=m_n, other=0.0).to(tl.float64), 0)
            if (rho != 0.0) & (squares < w * w + tl.sum(b_u * b_u, 0)):
                rho += at_last - (w + tl.sum(b_u, 0) + gained)
        b_di += tl.where(t == pick, rho, 0.0)
        b_dlogf += tl.where(t > pick, rho, 0.0)

    p_f = f + (head // H) * f_sb + (head % H) * f_sh
    b_f = tl.load(p_f + t * f_st, mask=m_t, other=0.0).to(tl.float64)
    b_df = b_dlogf / (1.0 + tl.exp(b_f))
    if SIGMOID:
        p_i = i + (head // H) * i_sb + (head % H) * i_sh
        b_di = b_di / (1.0 + tl.exp(tl.load(p_i + t * i_st, mask=m_t, other=0.0).to(tl.float64)))
    if BTHD:
        o_out = ((head // H) * T + t) * H + head % H
    else:
        o_out = head * T + t
    tl.store(di + o_out, cast(b_di, di.dtype.element_ty), mask=m_t)
    tl.store(df + o_out, cast(b_df, df.dtype.element_ty), mask=m_t)
    if n == first_chunk:
        tl.store(dm_initial + state, dm0.to(tl.float32))
