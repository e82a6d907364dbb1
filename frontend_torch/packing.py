"""Packed sequences for PyTorch: chunk tables, and offsets from document numbers."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from kernels_triton import packing
from kernels_triton.packing import ChunkTable
from kernels_triton.problem import OFFSET_DTYPES
from kernels_triton.validation import check_given_table, check_table

from .executor import run
from .library import is_plain
from .registry import register
from .tensors import backend_for, describe, dtype_name, materialised


def make_chunk_table(
    cu_seqlens: Int[Tensor, " offsets"],
    T: int,
    chunk_size: int,
    *,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> ChunkTable:
    """Which tokens each chunk has, on the device of cu_seqlens; for `mlstm_chunkwise(..., chunk_table=)`.

    T: tokens of all sequences; chunk_size as the operator's. The reference backend needs none: its table is all zeros.
    The result has a copy of cu_seqlens and what else it was made for: a call that it does not suit is refused.
    """
    L, sequences = check_table(describe("cu_seqlens", cu_seqlens), T, chunk_size)
    cu_seqlens = materialised(cu_seqlens)
    if _on_host(cu_seqlens):
        packing.check_offsets(cu_seqlens.tolist(), T)
    used = backend_for(backend, cu_seqlens)
    if used == "reference":
        table = cu_seqlens.new_zeros(packing.table_size(T, sequences, L), dtype=torch.int32)
    else:
        table = torch.ops.mlstm_dual.chunk_table(cu_seqlens, T, L, used)
    version = _version(cu_seqlens)
    source = None if version is None else (cu_seqlens, version)
    return ChunkTable(table, cu_seqlens.detach().clone(), T, L, source)


def _on_host(x: Tensor) -> bool:
    """Whether the host can read x without waiting for a GPU."""
    return x.device.type == "cpu" and is_plain((x,))


def _version(x: Tensor) -> int | None:
    """How often x was changed in place; None where nothing counts that, or a compiler would have to."""
    return None if not is_plain((x,)) or x.is_inference() else x._version


def packed_arguments(
    cu_seqlens: Any, chunk_table: Any, q: Any, i: Any, chunk_size: Any, layout: Any
) -> tuple[Any, Any, Any]:
    """Offsets on q's device, the raw chunk table, and i: NaN where the table was made from other offsets on a GPU.

    Raises where the host can see that offsets are wrong, or that the table was not made for the call. Arguments that
    are no offsets, no tensors or of a wrong rank are handed on for `check_call` to name.
    """
    if chunk_table is None:
        return _checked_offsets(cu_seqlens, q, layout), None, i
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in (q, cu_seqlens)]
    check_given_table(chunk_table, shapes[0] or (), chunk_size, layout, shapes[1])
    if cu_seqlens is None:
        return chunk_table.cu_seqlens, chunk_table.table, i
    offsets = _checked_offsets(cu_seqlens, q, layout)
    if _has_offsets(offsets) and not _is_source(chunk_table, cu_seqlens):
        if _on_host(offsets) and _on_host(chunk_table.cu_seqlens):
            packing.check_same_offsets(offsets.tolist(), chunk_table.cu_seqlens.tolist())
        else:
            i = _spoilt(i, offsets, chunk_table.cu_seqlens)
    return offsets, chunk_table.table, i


def _has_offsets(x: Any) -> bool:
    """Whether x is what `check_call` takes for offsets."""
    return isinstance(x, Tensor) and x.dim() == 1 and len(x) > 1 and dtype_name(x.dtype) in OFFSET_DTYPES


def _checked_offsets(cu_seqlens: Any, q: Any, layout: Any) -> Any:
    """Offsets on q's device; checked first where the host can read them without waiting for a GPU."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.device.type != "cpu" or not isinstance(q, Tensor):
        return cu_seqlens
    cu_seqlens = materialised(cu_seqlens)
    if _on_host(cu_seqlens) and _has_offsets(cu_seqlens) and q.dim() == 4 and layout == "bthd":
        packing.check_offsets(cu_seqlens.tolist(), q.shape[1])
    return cu_seqlens.to(q.device, non_blocking=True)


def _is_source(table: ChunkTable, cu_seqlens: Tensor) -> bool:
    """Whether these are the table's own offsets, by identity: unchanged since it was made."""
    if cu_seqlens is table.cu_seqlens:
        return True
    if table.source is None or not is_plain((cu_seqlens,)):  # a compiler knows no versions
        return False
    source, version = table.source
    return cu_seqlens is source and cu_seqlens._version == version


def _spoilt(i: Any, x: Tensor, y: Tensor) -> Any:
    """i, NaN if offsets x and y differ; the host does not learn it. A sum: the NaN is in i's gradient too."""
    if not isinstance(i, Tensor) or not i.is_floating_point() or not i.device == x.device == y.device:
        return i  # for `check_call` to name
    return i + torch.where((x != y).any(), math.nan, 0.0)


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
