"""What each chunk's tokens add to <dC, C>: for the gates' gradients where the last state has a cotangent."""

import triton
import triton.language as tl

from .common import store_pair
from .packing import chunk_count, chunk_span


@triton.jit
def token_sums(rows, cols, head, row, padded, NKT: tl.constexpr, L: tl.constexpr):
    """Of a chunk's tokens, in float64, over all key tiles: sum_j<i X_ij + P_i; X_ii; sum_i>j X_ij; U_j."""
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
    return b_row, b_diag, b_col, b_u


@triton.jit(do_not_specialize_on_alignment=["sequences", "T"])
def gates_backward_sums(
    rows,  # (B, H, 2 * NKT, NT * L) per key tile: sum_j<i X_ij + P_i; X_ii
    cols,  # (B, H, 2 * NKT, NT * L) per key tile: sum_i>j X_ij; U_j
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    gains,  # (B, H, 3, NT) a pair: sum U - sum P of the chunk's tokens; the sum of all terms' squares
    H: tl.constexpr,
    L: tl.constexpr,
    NKT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program per head and chunk.

    <dC, C> + dn . n grows from a chunk's start to its end by sum U - sum P. Row sums less column sums of X are 0 over a
    whole chunk, so that rows less cols come to sum P.
    """
    n_chunks = chunk_count(T, sequences, L, PACKED)
    padded = n_chunks.to(tl.int64) * L
    pid = tl.program_id(0).to(tl.int64)
    head = pid // n_chunks
    n = pid % n_chunks
    o = tl.arange(0, L)
    _, length, _ = chunk_span(chunks, n, n_chunks, T, L, PACKED)
    b_row, _, b_col, b_u = token_sums(rows, cols, head, n * L + o, padded, NKT, L)
    m_t = o < length  # of an empty chunk nothing has written them
    gain = tl.sum(tl.where(m_t, b_u - b_row + b_col, 0.0), 0)
    squares = tl.sum(tl.where(m_t, b_u * b_u + b_row * b_row + b_col * b_col, 0.0), 0)
    p_gains = gains + head * 3 * n_chunks + n
    store_pair(p_gains, p_gains + n_chunks, 0, gain, True)
    tl.store(p_gains + 2 * n_chunks, squares.to(tl.float32))
