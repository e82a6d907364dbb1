"""Packed sequences: which tokens each chunk has. Chunks never cross from one sequence into the next."""

import triton
import triton.language as tl


@triton.jit
def chunk_count(T, sequences, L: tl.constexpr, PACKED: tl.constexpr):
    """The number of chunks; of packed sequences a bound that does not depend on their lengths."""
    if PACKED:
        n_chunks = T // L + sequences
    else:
        n_chunks = tl.cdiv(T, L)
    return n_chunks


@triton.jit
def _tokens_of(chunks, n, n_chunks, T, L: tl.constexpr):
    """Chunk n's first token and how many it has: inside [0, T) and at most L, whatever the table holds."""
    t = tl.minimum(tl.maximum(tl.load(chunks + n), 0), T - 1)
    length = tl.load(chunks + n_chunks + n)
    return t, tl.maximum(tl.minimum(length, tl.minimum(T - t, L)), 0)


@triton.jit
def chunk_span(chunks, n, n_chunks, T, L: tl.constexpr, PACKED: tl.constexpr):
    """Chunk n's first token, how many tokens from there on may be written, and the end of those that may be read.

    An unused chunk has none; of it, as of an empty sequence, one may be read.
    """
    if PACKED:
        t, length = _tokens_of(chunks, n, n_chunks, T, L)
        end = t + tl.maximum(length, 1)
    else:
        t = n * L
        length = T - t
        end = T
    return t, length, end


@triton.jit
def sequence_chunks(chunks, sequence, n_chunks):
    """A packed sequence's first chunk and the end of its chunks: inside [0, n_chunks], whatever the table holds."""
    p_first = chunks + 3 * n_chunks + sequence
    first = tl.minimum(tl.maximum(tl.load(p_first), 0), n_chunks - 1)
    return first, tl.minimum(tl.maximum(tl.load(p_first + 1), first + 1), n_chunks)


@triton.jit
def sequence_span(chunks, sequence, n_chunks, T, L: tl.constexpr, PACKED: tl.constexpr):
    """A sequence's first chunk and the end of its chunks, its first token and the end of its tokens.

    Inside [0, n_chunks] and [0, T], whatever the table holds. An empty sequence has one chunk without tokens.
    """
    if PACKED:
        first, stop = sequence_chunks(chunks, sequence, n_chunks)
        t, _ = _tokens_of(chunks, first, n_chunks, T, L)
        last, length = _tokens_of(chunks, stop - 1, n_chunks, T, L)
        end = last + length
    else:
        first = 0
        stop = n_chunks
        t = 0
        end = T
    return first, stop, t, end


@triton.jit
def walk(first, stop, t_first, t_end, p_gamma, PACKED: tl.constexpr):
    """The end of the chunks to walk along, and the scale of what was before them.

    An empty sequence has none: the one token that may be read is its neighbour's. What was before it goes to its end by
    its only chunk's gamma, at p_gamma.
    """
    scale = tl.full([], 1.0, tl.float32)
    if PACKED:
        if t_end <= t_first:
            stop = first
            scale = tl.exp2(tl.load(p_gamma))
    return stop, scale


@triton.jit
def chunk_sequence(chunks, n, n_chunks, sequences):
    """The packed sequence that chunk n belongs to; -1 for an unused chunk, and where the table holds no sequence."""
    sequence = tl.load(chunks + 2 * n_chunks + n)
    return tl.where(sequence < sequences, sequence, -1)


@triton.jit(do_not_specialize_on_alignment=["T", "sequences"])
def chunk_table(
    cu_seqlens,  # (sequences + 1) tokens before each sequence, and all of them; int32 or int64
    T,
    sequences,
    chunks,  # int32: first token, length, sequence of each chunk (3 * NT); first chunk of each sequence; their end
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK chunks. A sequence has a chunk even if it is empty; chunks that are left have sequence -1.

    Offsets that are no such offsets give wrong results, but never a token outside [0, T) or a chunk outside [0, NT).
    """
    n_chunks = T // L + sequences
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros([BLOCK], tl.int32)
    first = tl.zeros([BLOCK], tl.int32)
    total = tl.full([], 0, tl.int32)
    for s0 in range(0, sequences, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        m_s = s < sequences
        start, stop = _tokens(cu_seqlens, s, m_s, T)
        count = tl.where(m_s, tl.maximum(tl.cdiv(stop - start, L), 1), 0)
        end = total + tl.cumsum(count, 0)
        before = m_s[None, :] & (end[None, :] <= n[:, None])
        sequence += tl.sum(before.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(before, end[None, :], 0), 1))
        total += tl.sum(count, 0)
        if tl.program_id(0) == 0:
            tl.store(chunks + 3 * n_chunks + 1 + s, tl.minimum(end, n_chunks), mask=m_s)
    if tl.program_id(0) == 0:
        tl.store(chunks + 3 * n_chunks, 0)
    m_n = n < n_chunks
    used = m_n & (sequence < sequences)
    start, stop = _tokens(cu_seqlens, sequence, used, T)
    t = tl.minimum(start + (n - first) * L, T - 1)
    length = tl.maximum(tl.minimum(stop - t, L), 0)
    length = tl.where(used & (stop > start), length, 0)
    tl.store(chunks + n, t, mask=m_n)
    tl.store(chunks + n_chunks + n, length, mask=m_n)
    tl.store(chunks + 2 * n_chunks + n, tl.where(used, sequence, -1), mask=m_n)


@triton.jit
def _tokens(cu_seqlens, s, mask, T):
    """The first token of sequence s and the end of its tokens, inside [0, T]."""
    start = tl.load(cu_seqlens + s, mask=mask, other=0).to(tl.int64)
    stop = tl.load(cu_seqlens + s + 1, mask=mask, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), T).to(tl.int32)
    stop = tl.minimum(tl.maximum(stop, 0), T).to(tl.int32)
    return start, tl.maximum(stop, start)
