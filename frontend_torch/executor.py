"""Runs a pass on torch tensors: by Triton on a GPU, or by the shared interpreter executor on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels_triton import interpreter
from kernels_triton.launch import Descriptor, Launch, Operand, Pass

Tensors = Mapping[str, Tensor]
ALIGNMENT = 16  # bytes: what Triton specialises pointers on


def dtype_name(dtype: torch.dtype) -> str:
    """The shared name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def dtype_of(name: str) -> torch.dtype:
    """The dtype of a shared name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _operand(x: Operand, env: Tensors) -> Any:
    if isinstance(x, Descriptor):
        from triton.tools.tensor_descriptor import TensorDescriptor  # only where there is a GPU

        return TensorDescriptor(env[x.buffer], list(x.shape), list(x.strides), list(x.block))
    return env[x] if isinstance(x, str) else x


def launch_one(
    launch: Launch, env: dict[str, Tensor], device: torch.device, aligned: bool = False, out: Tensors | None = None
) -> None:
    """Run one launch on the tensors of env, and add its outputs to them.

    out: tensors that outputs are written to, by name; others are new.

    aligned: all inputs are aligned to ALIGNMENT, as the outputs are. Then nothing that Triton specialises a kernel on
    can differ between two runs of a launch: the second one goes to the compiled kernel, in a tenth of the time.
    """
    arguments = [env[x] if isinstance(x, str) else _operand(x, env) for x in launch.operands.values()]
    for buffer, spec in launch.outputs.values():
        x = out.get(buffer) if out else None
        env[buffer] = x = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device=device) if x is None else x
        arguments.append(x)
    compiled = launch.compiled.get(device.index) if aligned else None
    if compiled is not None:
        compiled[(launch.grid, 1, 1)](*arguments, *launch.constants)
        return
    compiled = launch.kernel[(launch.grid,)](
        *arguments,
        **launch.constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )
    if aligned and hasattr(compiled, "packed_metadata"):  # a finished kernel, not one that is still being compiled
        launch.compiled[device.index] = compiled


def launch_all(program: Pass, tensors: Tensors, out: Tensors | None = None) -> dict[str, Tensor]:
    """Run every launch on the tensors' device; returns the pass's results by name. Never synchronises."""
    env = {name: tensors[name] for name in program.inputs}
    first = env[program.inputs[0]]
    device = first.device
    aligned = all(x.data_ptr() % ALIGNMENT == 0 for x in (*env.values(), *(out or {}).values()))
    with torch.cuda.device_of(first):
        for launch, spent in zip(program.launches, program.spent, strict=True):
            launch_one(launch, env, device, aligned, out)
            for name in spent:
                del env[name]
    return env


def _interpret(program: Pass, tensors: Tensors, out: Tensors | None = None) -> dict[str, Tensor]:
    hosts = {
        name: interpreter.HostArray(tensors[name].data_ptr(), dtype_name(tensors[name].dtype), tensors[name])
        for name in program.inputs
    }
    raw = interpreter.run(program, hosts)
    new = {name: torch.from_numpy(x).view(getattr(torch, program.spec(name).dtype))[..., 0] for name, x in raw.items()}
    return new | {name: x.copy_(new[name]) for name, x in (out or {}).items()}


def run(program: Pass, tensors: Tensors, backend: str, out: Tensors | None = None) -> dict[str, Tensor]:
    """Execute a pass. Tensors must have the strides that its plan was made for. out: tensors for results, by name."""
    return (_interpret if backend == "interpret" else launch_all)(program, tensors, out)
