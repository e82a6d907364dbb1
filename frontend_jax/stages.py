"""The documented stage functions for JAX: thin views of the operator's plan (see kernels_triton/stage_api.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from kernels_triton.backend import choose_backend, interpreting
from kernels_triton.stage_api import StageFunctions

from .arrays import architecture_of, describe, platform_of
from .executor import run

__all__ = [
    "_mlstm_chunkwise__parallel_bw_dQKV",
    "_mlstm_chunkwise__recurrent_bw_dC",
    "_mlstm_chunkwise__recurrent_fw_C",
    "_mlstm_chunkwise_bw",
    "_mlstm_chunkwise_fw",
]


def _run(plan: Callable[..., Any], arrays: dict[str, Array | None]) -> tuple[Array | None, ...]:
    infos = {name: describe(name, x) for name, x in arrays.items()}
    given = {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}
    if not given:
        plan(infos, "")  # which names the first that lacks
    first = next(iter(given.values()))
    call = plan(infos, architecture_of(first))
    backend = choose_backend("interpret" if interpreting() else "triton", platform_of(first))
    results = run(call.program, {buffer: given[name] for buffer, name in call.arguments.items()}, backend)
    return tuple(results[buffer].reshape(shape) if buffer else None for buffer, shape in call.returns)


_stages = StageFunctions(_run, jnp.zeros_like)
_mlstm_chunkwise__recurrent_fw_C = _stages._mlstm_chunkwise__recurrent_fw_C
_mlstm_chunkwise_fw = _stages._mlstm_chunkwise_fw
_mlstm_chunkwise__recurrent_bw_dC = _stages._mlstm_chunkwise__recurrent_bw_dC
_mlstm_chunkwise__parallel_bw_dQKV = _stages._mlstm_chunkwise__parallel_bw_dQKV
_mlstm_chunkwise_bw = _stages._mlstm_chunkwise_bw
