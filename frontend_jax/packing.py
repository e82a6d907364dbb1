"""Packed sequences for JAX: chunk tables, and offsets from document numbers."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Int32

from kernels_triton import packing
from kernels_triton.backend import choose_backend
from kernels_triton.validation import check_table

from .executor import run
from .explicit import explicit_mesh, on_every_device
from .operator import check_known_offsets, describe, platform_of


def make_chunk_table(
    cu_seqlens: Int[Array, " offsets"],
    T: int,
    chunk_size: int,
    *,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Int32[Array, " table"]:
    """Which tokens each chunk has, on the device of cu_seqlens; for `mlstm_chunkwise(..., cu_seqlens, chunk_table)`.

    T: tokens of all sequences; chunk_size as the operator's. The reference backend needs none: its table is all zeros.
    """
    L, sequences = check_table(describe("cu_seqlens", cu_seqlens), T, chunk_size)
    check_known_offsets(cu_seqlens, T)
    used = choose_backend(backend, platform_of(cu_seqlens))
    if used == "reference":
        return jnp.zeros(packing.table_size(T, sequences, L), jnp.int32)
    program, arrays = packing.table_pass(T, sequences, L), {"cu_seqlens": jnp.asarray(cu_seqlens)}
    mesh = explicit_mesh(arrays)
    found = (
        run(program, arrays, used) if mesh is None else on_every_device(lambda x: run(program, x, used), mesh, arrays)
    )
    return found["chunks"]


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
