"""Packed sequences for PyTorch: chunk tables, and offsets from document numbers."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from kernels_triton import packing
from kernels_triton.backend import choose_backend
from kernels_triton.validation import check_table

from .executor import run
from .library import is_plain
from .registry import register
from .tensors import describe, platform_of


def make_chunk_table(
    cu_seqlens: Int[Tensor, " offsets"],
    T: int,
    chunk_size: int,
    *,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Int32[Tensor, " table"]:
    """Which tokens each chunk has, on the device of cu_seqlens; for `mlstm_chunkwise(..., cu_seqlens, chunk_table)`.

    T: tokens of all sequences; chunk_size as the operator's. The reference backend needs none: its table is all zeros.
    """
    L, sequences = check_table(describe("cu_seqlens", cu_seqlens), T, chunk_size)
    if cu_seqlens.device.type == "cpu" and is_plain((cu_seqlens,)):
        packing.check_offsets(cu_seqlens.tolist(), T)
    used = choose_backend(backend, platform_of(cu_seqlens))
    if used == "reference":
        return cu_seqlens.new_zeros(packing.table_size(T, sequences, L), dtype=torch.int32)
    table: Tensor = torch.ops.mlstm_dual.chunk_table(cu_seqlens, T, L, used)
    return table


def _make(cu_seqlens: Tensor, T: int, L: int, backend: str) -> Tensor:
    program = packing.table_pass(T, cu_seqlens.shape[0] - 1, L)
    return run(program, {"cu_seqlens": cu_seqlens.contiguous()}, backend)["chunks"]


def _make_fake(cu_seqlens: Tensor, T: int, L: int, backend: str) -> Tensor:
    return cu_seqlens.new_empty(packing.table_size(T, cu_seqlens.shape[0] - 1, L), dtype=torch.int32)


register("chunk_table", "(Tensor cu_seqlens, SymInt T, int chunk_size, str backend) -> Tensor", _make, _make_fake)


def cu_seqlens_from_document_ids(
    ids: Int[Tensor, "*batch T"], num_documents: int | None = None
) -> Int32[Tensor, " offsets"]:
    """Offsets of packed sequences from each token's document number: a document is a run of equal numbers.

    ids: (T,) or (1, T). num_documents: how many offsets to make, less one; documents that lack are empty, those beyond
    join the last. None: as many as there are, for which the host waits for a GPU.
    """
    describe("ids", ids)
    return packing.cu_seqlens_from_document_ids(ids, num_documents)
