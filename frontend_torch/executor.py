"""Runs a pass on torch tensors: by Triton on a GPU, or by the shared interpreter executor on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels_triton import interpreter
from kernels_triton.launch import Descriptor, Launch, Operand, Pass, Spec


def dtype_name(dtype: torch.dtype) -> str:
    """The shared name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _empty(spec: Spec, device: torch.device) -> Tensor:
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


def _operand(x: Operand, env: Mapping[str, Tensor]) -> Any:
    if isinstance(x, Descriptor):
        from triton.tools.tensor_descriptor import TensorDescriptor  # only where there is a GPU

        return TensorDescriptor(env[x.buffer], list(x.shape), list(x.strides), list(x.block))
    return env[x] if isinstance(x, str) else x


def launch_one(launch: Launch, env: dict[str, Tensor], device: torch.device) -> None:
    """Run one launch on the tensors of env, and add its outputs to them."""
    operands = [_operand(x, env) for x in launch.operands.values()]
    for buffer, spec in launch.outputs.values():
        env[buffer] = _empty(spec, device)
    outputs = [env[buffer] for buffer, _ in launch.outputs.values()]
    launch.kernel[(launch.grid,)](
        *operands,
        *outputs,
        **launch.constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


def launch_all(program: Pass, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run every launch on the tensors' device; returns the pass's results by name. Never synchronises."""
    env = {name: tensors[name] for name in program.inputs}
    device = env["q"].device
    with torch.cuda.device_of(env["q"]):
        for launch, needed in zip(program.launches, program.needed, strict=True):
            launch_one(launch, env, device)
            env = {name: x for name, x in env.items() if name in needed}
    return env


def _interpret(program: Pass, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    hosts = {
        name: interpreter.HostArray(tensors[name].data_ptr(), dtype_name(tensors[name].dtype), tensors[name])
        for name in program.inputs
    }
    raw = interpreter.run(program, hosts)
    return {name: torch.from_numpy(x).view(getattr(torch, program.spec(name).dtype))[..., 0] for name, x in raw.items()}


def run(program: Pass, tensors: Mapping[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Execute a pass. Tensors must have the strides that its plan was made for."""
    return (_interpret if backend == "interpret" else launch_all)(program, tensors)
