"""Runs a pass on torch tensors: by Triton on a GPU, or by the shared interpreter executor on a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels_triton import interpreter
from kernels_triton.launch import Arena, Descriptor, Launch, Operand, Pass

Tensors = Mapping[str, Tensor]
SAVED = "saved"  # the name of what one pass saves for another in one tensor
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


def launch_one(launch: Launch, env: dict[str, Tensor], device: torch.device) -> Any:
    """Run one launch on the tensors of env, through Triton's own dispatch; adds those outputs that env lacks.

    Returns the compiled kernel.
    """
    arguments = [env[x] if isinstance(x, str) else _operand(x, env) for x in launch.operands.values()]
    for buffer, spec in launch.outputs.values():
        if buffer not in env:
            env[buffer] = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device=device)
        arguments.append(env[buffer])
    return launch.kernel[(launch.grid,)](
        *arguments,
        **launch.constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


def _compile_all(program: Pass, env: dict[str, Tensor], device: torch.device, out: Tensors, aligned: bool) -> None:
    """The first run: on tensors, whose dtypes Triton needs to know. Keeps the compiled kernels."""
    for launch, spent in zip(program.launches, program.spent, strict=True):
        env.update((name, x) for name, x in out.items() if name in program.specs)
        compiled = launch_one(launch, env, device)
        if aligned and hasattr(compiled, "packed_metadata"):  # a finished kernel, not one that is still being compiled
            launch.compiled[device.index] = compiled[(launch.grid, 1, 1)]
        for name in spent:
            del env[name]


def _launch_compiled(program: Pass, env: dict[str, Tensor], device: torch.device, addresses: dict[str, int]) -> None:
    """A later run: compiled kernels take plain addresses, in a tenth of the time. `addresses`: of arenas and `out`."""
    from triton.runtime.driver import driver

    stream = driver.active.get_current_stream(device.index)
    addresses.update((name, x.data_ptr()) for name, x in env.items())
    for launch, spent in zip(program.launches, program.spent, strict=True):
        for buffer, spec in launch.outputs.values():
            if buffer not in addresses:
                env[buffer] = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device=device)
                addresses[buffer] = env[buffer].data_ptr()
        if launch.reads_descriptors:
            arguments = [addresses[x] if isinstance(x, str) else _operand(x, env) for x in launch.arguments]
        else:
            arguments = [addresses[x] if x.__class__ is str else x for x in launch.arguments]
        launch.compiled[device.index](*arguments, *launch.constants, stream=stream)
        for name in spent:
            if env.pop(name, None) is not None:
                del addresses[name]


def _views(arena: Arena, memory: Tensor, program: Pass) -> dict[str, Tensor]:
    """The buffers of an arena as tensors."""
    found = {}
    for name, place in arena.places.items():
        spec = program.spec(name)
        dtype = dtype_of(spec.dtype)
        part = memory[place : place + math.prod(spec.shape) * dtype.itemsize]
        found[name] = part.view(dtype).view(spec.shape)
    return found


def launch_all(
    program: Pass, tensors: Tensors, out: Tensors | None = None, earlier: Pass | None = None
) -> dict[str, Tensor]:
    """Run every launch on the tensors' device; returns the pass's results by name. Never synchronises.

    Results that are saved for a later pass, if small, are all in one tensor, SAVED. earlier: the pass that saved what
    `tensors` holds.
    Where all inputs are aligned to ALIGNMENT, as all else is, nothing that Triton specialises a kernel on can differ
    between two runs.
    """
    env = {name: tensors[name] for name in program.inputs if name in tensors}
    out = out or {}
    device = env[program.inputs[0]].device
    aligned = all(x.data_ptr() % ALIGNMENT == 0 for x in (*env.values(), *out.values()))
    memories = [(earlier.arenas[0], tensors[SAVED], earlier)] if earlier and SAVED in tensors else []
    memories += [(x, torch.empty(x.size, dtype=torch.uint8, device=device), program) for x in program.arenas if x.size]
    with torch.cuda.device_of(env[program.inputs[0]]):
        if aligned and all(device.index in launch.compiled for launch in program.launches):
            addresses = {name: x.data_ptr() for name, x in out.items()}
            for arena, memory, _ in memories:
                start = memory.data_ptr()
                addresses.update((name, start + place) for name, place in arena.places.items())
            _launch_compiled(program, env, device, addresses)
        else:
            for arena, memory, of in memories:
                env.update(_views(arena, memory, of))
            _compile_all(program, env, device, out, aligned)
    saved = program.arenas[0]
    results = {name: env[name] for name in program.results if name not in saved.places and name not in out}
    if saved.size:
        results[SAVED] = next(memory for arena, memory, _ in memories if arena is saved)
    return {**results, **out}


def _interpret(
    program: Pass, tensors: Tensors, out: Tensors | None = None, earlier: Pass | None = None
) -> dict[str, Tensor]:
    hosts = {
        name: interpreter.HostArray(tensors[name].data_ptr(), dtype_name(tensors[name].dtype), tensors[name])
        for name in program.inputs
    }
    raw = interpreter.run(program, hosts)
    new = {name: torch.from_numpy(x).view(getattr(torch, program.spec(name).dtype))[..., 0] for name, x in raw.items()}
    return new | {name: x.copy_(new[name]) for name, x in (out or {}).items()}


def run(
    program: Pass, tensors: Tensors, backend: str, out: Tensors | None = None, earlier: Pass | None = None
) -> dict[str, Tensor]:
    """Execute a pass. Tensors must have the strides that its plan was made for.

    out: tensors for results, by name. earlier: the pass whose saved results are among the tensors.
    """
    return (_interpret if backend == "interpret" else launch_all)(program, tensors, out, earlier)
