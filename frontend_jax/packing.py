"""Packed sequences for JAX: chunk tables, and offsets from document numbers."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Int32

from kernels_triton import packing
from kernels_triton.backend import choose_backend
from kernels_triton.packing import ChunkTable
from kernels_triton.problem import OFFSET_DTYPES
from kernels_triton.validation import check_given_table, check_table

from .arrays import describe, platform_of
from .executor import run
from .explicit import explicit_mesh, on_every_device

# Arrays are leaves, so that a table goes through jit and vmap; its numbers are static. `source` is PyTorch's.
jax.tree_util.register_dataclass(
    ChunkTable, data_fields=["table", "cu_seqlens"], meta_fields=["T", "chunk_size"], drop_fields=["source"]
)


def check_known_offsets(cu_seqlens: Any, T: int) -> None:
    """Raises ValueError where offsets are wrong and it can be seen without waiting for a device: NumPy's."""
    if isinstance(cu_seqlens, np.ndarray):
        packing.check_offsets(cu_seqlens.tolist(), T)


def make_chunk_table(
    cu_seqlens: Int[Array, " offsets"],
    T: int,
    chunk_size: int,
    *,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> ChunkTable:
    """Which tokens each chunk has, on the device of cu_seqlens; for `mlstm_chunkwise(..., chunk_table=)`.

    T: tokens of all sequences; chunk_size as the operator's. The reference backend needs none: its table is all zeros.
    The result has cu_seqlens and what else it was made for: a call that it does not suit is refused. A pytree.
    """
    L, sequences = check_table(describe("cu_seqlens", cu_seqlens), T, chunk_size)
    check_known_offsets(cu_seqlens, T)
    used = choose_backend(backend, platform_of(cu_seqlens))
    offsets = _kept(cu_seqlens)
    if used == "reference":
        return ChunkTable(jnp.zeros(packing.table_size(T, sequences, L), jnp.int32), offsets, T, L)
    program, arrays = packing.table_pass(T, sequences, L), {"cu_seqlens": jnp.asarray(offsets)}
    mesh = explicit_mesh(arrays)
    found = (
        run(program, arrays, used) if mesh is None else on_every_device(lambda x: run(program, x, used), mesh, arrays)
    )
    return ChunkTable(found["chunks"], offsets, T, L)


def _kept(x: Any) -> Any:
    """NumPy's offsets stay on the host, to compare a call's with; a copy, since their owner may write there."""
    return x.copy() if isinstance(x, np.ndarray) else jnp.asarray(x)


def packed_arguments(
    cu_seqlens: Any, chunk_table: Any, q: Any, i: Any, chunk_size: Any, layout: Any
) -> tuple[Any, Any, Any]:
    """Offsets, the raw chunk table, and i: NaN where the table was made from other offsets, found on the device.

    Raises where the host can see that the table was not made for the call. Arguments that are no offsets, no arrays or
    of a wrong rank are handed on for `check_call` to name.
    """
    if chunk_table is None:
        return cu_seqlens, None, i
    shapes = [tuple(getattr(x, "shape", ())) if x is not None else None for x in (q, cu_seqlens)]
    check_given_table(chunk_table, shapes[0] or (), chunk_size, layout, shapes[1])
    own = chunk_table.cu_seqlens
    if cu_seqlens is None:
        return own, chunk_table.table, i
    if _has_offsets(cu_seqlens) and cu_seqlens is not own:
        if _on_host(cu_seqlens) and _on_host(own):
            packing.check_same_offsets(np.asarray(cu_seqlens).tolist(), np.asarray(own).tolist())
        elif isinstance(i, Array | np.ndarray) and jnp.issubdtype(i.dtype, jnp.floating):
            # A sum: the NaN is in i's gradient too.
            i = i + jnp.where(jnp.any(cu_seqlens != own), jnp.nan, 0.0).astype(i.dtype)
    return cu_seqlens, chunk_table.table, i


def _has_offsets(x: Any) -> bool:
    """Whether x is what `check_call` takes for offsets."""
    is_array = isinstance(x, Array | np.ndarray)
    return is_array and x.ndim == 1 and len(x) > 1 and str(x.dtype) in OFFSET_DTYPES


def _on_host(x: Any) -> bool:
    """Whether x's values can be read without waiting for a GPU."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, Array):
        return isinstance(x, np.ndarray)
    return x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())


def cu_seqlens_from_document_ids(
    ids: Int[Array, "*batch T"], num_documents: int | None = None
) -> Int32[Array, " offsets"]:
    """Offsets of packed sequences from each token's document number: a document is a run of equal numbers.

    ids: (T,) or (1, T). num_documents: how many offsets to make, less one; documents that lack are empty, those beyond
    join the last. None: as many as there are, which must be known: not while ids are traced.
    """
    if num_documents is None and isinstance(ids, jax.core.Tracer):
        raise ValueError("num_documents: expected an int where ids are traced, got None")
    return packing.cu_seqlens_from_document_ids(ids, num_documents)
