"""The gates' gradients, from the sums that the kernels with products leave."""

import triton
import triton.language as tl

from .common import cast
from .packing import chunk_count, chunk_sequence, chunk_span


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
        first_chunk = tl.load(chunks + 3 * n_chunks + sequence)
        last_chunk = tl.load(chunks + 3 * n_chunks + sequence + 1) - 1

    b_row = tl.zeros([L], tl.float64)
    b_diag = tl.zeros([L], tl.float64)
    b_col = tl.zeros([L], tl.float64)
    b_u = tl.zeros([L], tl.float64)
    for kt in tl.static_range(NKT):
        p_rows = rows + (head * 2 * NKT + 2 * kt) * padded + row
        b_row += tl.load(p_rows).to(tl.float64)
        b_diag += tl.load(p_rows + padded).to(tl.float64)
        p_cols = cols + (head * 2 * NKT + 2 * kt) * padded + row
        b_col += tl.load(p_cols).to(tl.float64)
        b_u += tl.load(p_cols + padded).to(tl.float64)

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
            # In the last chunk <dC, C> of the last state is w and U's sum: of them, whose rounding cancels then.
            if n == last_chunk:
                rho += at_last - (w + tl.sum(b_u, 0))
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
