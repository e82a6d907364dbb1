"""The documented stage functions for PyTorch: thin views of the operator's plan (see kernels_triton/stage_api.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_triton.backend import interpreting
from kernels_triton.stage_api import StageFunctions

from .executor import run
from .tensors import architecture_of, backend_for, describe, materialised

__all__ = [
    "_mlstm_chunkwise__parallel_bw_dQKV",
    "_mlstm_chunkwise__recurrent_bw_dC",
    "_mlstm_chunkwise__recurrent_fw_C",
    "_mlstm_chunkwise_bw",
    "_mlstm_chunkwise_fw",
]


def _run(plan: Callable[..., Any], arrays: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    infos = {name: describe(name, x) for name, x in arrays.items()}
    given = {name: x for name, x in arrays.items() if x is not None}
    if not given:
        plan(infos, "")  # which names the first that lacks
    first = next(iter(given.values()))
    call = plan(infos, architecture_of(first.device))
    backend = backend_for("interpret" if interpreting() else "triton", first)
    read = {buffer: materialised(given[name].detach()).contiguous() for buffer, name in call.arguments.items()}
    results = run(call.program, read, backend)
    return tuple(results[buffer].reshape(shape) if buffer else None for buffer, shape in call.returns)


_stages = StageFunctions(_run, torch.zeros_like)
_mlstm_chunkwise__recurrent_fw_C = _stages._mlstm_chunkwise__recurrent_fw_C
_mlstm_chunkwise_fw = _stages._mlstm_chunkwise_fw
_mlstm_chunkwise__recurrent_bw_dC = _stages._mlstm_chunkwise__recurrent_bw_dC
_mlstm_chunkwise__parallel_bw_dQKV = _stages._mlstm_chunkwise__parallel_bw_dQKV
_mlstm_chunkwise_bw = _stages._mlstm_chunkwise_bw
