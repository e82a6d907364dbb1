"""Packed sequences on the host: offsets, the size of a chunk table and its launch, and the readable reference.

Sequences of any lengths, one after the other in T tokens; sequence s has tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat

from .launch import Launch, Pass, Spec

Array = Any

BLOCK = 128  # chunks that one program of the chunk table's kernel finds
CLOSED, OPEN = -1e30, 1e30  # gates' pre-activations of a token that adds nothing and forgets nothing


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """Which tokens each chunk of packed sequences has, and what that was found for: `make_chunk_table` makes it.

    table: int32 (`table_size` elements), as the kernels read it. cu_seqlens: (N + 1,), the offsets it was made from, in
    memory that nobody else writes. T: tokens of all sequences. chunk_size: tokens per chunk.
    source: in PyTorch, whose tensors can change in place, the tensor that cu_seqlens is a copy of and its version then.
    """

    table: Array
    cu_seqlens: Array
    T: int
    chunk_size: int
    source: tuple[Array, int] | None = None

    @property
    def sequences(self) -> int:
        """N."""
        return self.cu_seqlens.shape[0] - 1


def packed_chunks(T: int, sequences: int, L: int) -> int:
    """How many chunks of L tokens there are room for: enough for any lengths, and one for each empty sequence."""
    return T // L + sequences


def table_size(T: int, sequences: int, L: int) -> int:
    """Elements of a chunk table (kernels/packing.py)."""
    return 3 * packed_chunks(T, sequences, L) + sequences + 1


def chunk_table(T: int, sequences: int, L: int) -> Launch:
    """The launch that finds which tokens each chunk has."""
    from .kernels import chunk_table

    return Launch(
        kernel=chunk_table,
        operands={"cu_seqlens": "cu_seqlens", "T": T, "sequences": sequences},
        outputs={"chunks": ("chunks", Spec((table_size(T, sequences, L),), "int32"))},
        grid=-(-packed_chunks(T, sequences, L) // BLOCK),
        constexprs={"L": L, "BLOCK": BLOCK},
        num_warps=4,
        num_stages=1,
    )


@functools.lru_cache(maxsize=256)
def table_pass(T: int, sequences: int, L: int) -> Pass:
    """The chunk table alone, for several calls with the same sequences."""
    return Pass((chunk_table(T, sequences, L),), ("cu_seqlens",), ("chunks",))


def check_offsets(offsets: Sequence[int], T: int) -> None:
    """Raises ValueError unless offsets go from 0 to T and never down."""
    if offsets[0] != 0 or offsets[-1] != T:
        raise ValueError(f"cu_seqlens: expected offsets from 0 to T = {T}, got {offsets[0]} to {offsets[-1]}")
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if stop < start:
            raise ValueError(f"cu_seqlens: expected offsets that never go down, got {start}, {stop} at sequence {s}")


def check_same_offsets(given: Sequence[int], made_for: Sequence[int]) -> None:
    """Raises ValueError where a call's offsets are not those of its chunk table."""
    for s, (x, y) in enumerate(zip(given, made_for, strict=True)):
        if x != y:
            raise ValueError(f"cu_seqlens: expected the offsets of the chunk_table, {y} at {s}, got {x}")


def cu_seqlens_from_document_ids(ids: Array, num_documents: int | None) -> Array:
    """See the frontends' function of this name."""
    if not array_api_compat.is_array_api_obj(ids):
        raise TypeError(f"ids: expected an array of whole numbers, got {type(ids).__name__}")
    xp = array_api_compat.array_namespace(ids)
    if "int" not in str(ids.dtype):
        raise TypeError(f"ids: expected an array of whole numbers, got dtype {ids.dtype}")
    if len(ids.shape) not in (1, 2) or (len(ids.shape) == 2 and ids.shape[0] != 1) or 0 in ids.shape:
        raise ValueError(f"ids: expected shape (T,) or (1, T) with T >= 1, got {tuple(ids.shape)}")
    ids = xp.reshape(ids, (-1,))
    T = ids.shape[0]
    places = xp.cumulative_sum(xp.ones_like(ids, dtype=xp.int32), dtype=xp.int32)  # 1, 2, ..., where ids are
    starts = xp.concat([places[:1] - 1, xp.where(ids[1:] != ids[:-1], places[:-1], T)])
    if num_documents is None:
        num_documents = int(xp.sum(xp.astype(starts < T, xp.int32)))
    if isinstance(num_documents, bool) or not isinstance(num_documents, int) or num_documents < 1:
        raise ValueError(f"num_documents: expected an int >= 1, got {num_documents!r}")
    starts = xp.sort(starts)[:num_documents]
    return xp.concat([starts, *[places[-1:]] * (num_documents + 1 - starts.shape[0])])  # T


def reference(cell: Callable[..., Any], cu_seqlens: Array, tensors: Sequence[Array], states: Sequence[Array]) -> Any:
    """h and the last states by `cell`, a function of reference.py, with each sequence as one element of the batch.

    tensors: q, k, v, i, f, (1, H, T, ...); states (N, H, ...). All sequences get T tokens, those that they lack with
    closed gates: slow and large, but no length need be known.
    """
    xp = array_api_compat.array_namespace(tensors[0])
    H, T = tensors[0].shape[1:3]
    start, stop = cu_seqlens[:-1], cu_seqlens[1:]
    N = start.shape[0]
    on = {"device": array_api_compat.device(start)} if array_api_compat.is_torch_array(start) else {}
    o = xp.arange(T, dtype=start.dtype, **on)
    token = start[:, None] + o[None, :]  # [N, T]
    inside = token < stop[:, None]
    flat = xp.reshape(xp.where(inside, token, 0), (-1,))

    def spread(x: Array, fill: float) -> Array:
        """(1, H, T, ...) -> (N, H, T, ...)."""
        y = xp.reshape(xp.take(x[0, ...], flat, axis=1), (H, N, T, *x.shape[3:]))
        mask = xp.reshape(inside, (1, N, T, *(1,) * (len(x.shape) - 3)))
        y = xp.where(mask, y, xp.asarray(fill, dtype=x.dtype))
        return xp.permute_dims(y, (1, 0, *range(2, len(y.shape))))

    h, last = cell(*map(spread, tensors, (0.0, 0.0, 0.0, CLOSED, OPEN)), *states)
    sequence = xp.sum(xp.astype(stop[:, None] <= o[None, :], o.dtype), axis=0)
    sequence = xp.where(sequence < N, sequence, N - 1)
    rows = xp.reshape(xp.permute_dims(h, (0, 2, 1, 3)), (N * T, *h.shape[1:2], h.shape[3]))
    h = xp.take(rows, sequence * T + o - xp.take(start, sequence), axis=0)
    return xp.permute_dims(h, (1, 0, 2))[None, ...], last
