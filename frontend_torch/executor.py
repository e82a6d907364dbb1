"""Runs a pass on torch tensors: by Triton on a GPU, or by the shared interpreter executor on a CPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_triton import assembler, interpreter
from kernels_triton.launch import Arena, Descriptor, Launch, Operand, Pass

from .schedule import as_descriptor, schedule
from .tensors import dtype_name, dtype_of

Tensors = Mapping[str, Tensor]
SAVED = "saved"  # the name of what one pass saves for another in one tensor
ALIGNMENT = 16  # bytes: what Triton specialises pointers on
NOTHING = contextlib.nullcontext()


def _operand(x: Operand, env: Tensors) -> Any:
    if isinstance(x, Descriptor):
        return as_descriptor(x, env[x.buffer])
    return env[x] if isinstance(x, str) else x


def launch_one(launch: Launch, env: dict[str, Tensor], device: torch.device) -> Any:
    """Run one launch on the tensors of env, through Triton's own dispatch; adds those outputs that env lacks.

    Returns the compiled kernel. Raises RuntimeError instead of launching what a faulty assembler made; later runs of a
    schedule launch what has passed here.
    """
    for buffer, spec in launch.outputs.values():
        if buffer not in env:
            env[buffer] = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device=device)
    return assembler.ours(launch.kernel)[(launch.grid,)](
        *[_operand(x, env) for x in launch.arguments],
        **launch.constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


def _compile_all(program: Pass, env: dict[str, Tensor], device: torch.device) -> list[Any]:
    """The first run: on tensors, whose dtypes Triton needs to know. Returns the compiled kernels.

    None for a kernel that is not finished.
    """
    kernels = []
    for launch, spent in zip(program.launches, program.spent, strict=True):
        compiled = launch_one(launch, env, device)
        kernels.append(compiled if hasattr(compiled, "packed_metadata") else None)
        for name in spent:
            del env[name]
    return kernels


def _views(arena: Arena, memory: Tensor, program: Pass) -> dict[str, Tensor]:
    """The buffers of an arena as tensors."""
    found = {}
    for name, place in arena.places.items():
        spec = program.spec(name)
        dtype = dtype_of(spec.dtype)
        part = memory[place : place + math.prod(spec.shape) * dtype.itemsize]
        found[name] = part.view(dtype).view(spec.shape)
    return found


def _on(device: torch.device) -> Any:
    """Makes a GPU the current one, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return NOTHING
    return torch.cuda.device(device)


def _realigned(saved: Tensor) -> Tensor:
    """What an earlier pass saved, which hooks (offloading, say) may have brought back at any address."""
    return saved if saved.data_ptr() % ALIGNMENT == 0 else saved.clone()


def _aligned(addresses: Sequence[int]) -> bool:
    joint = 0
    for address in addresses:
        joint |= address
    return joint % ALIGNMENT == 0


def launch_all(
    program: Pass, tensors: Tensors, out: Tensors | None = None, earlier: Pass | None = None
) -> dict[str, Tensor]:
    """Run every launch on the tensors' device; returns the pass's results by name. Never synchronises.

    Results that are saved for a later pass, if small, are all in one tensor, SAVED. earlier: the pass that saved what
    `tensors` holds.
    Compiled kernels are kept for a later run on plain addresses, in a tenth of the time. Where dtypes are the same and
    all inputs aligned to ALIGNMENT, as all else is, nothing that Triton specialises a kernel on can differ between two
    runs.
    """
    out = out or {}
    device = next(iter(tensors.values())).device
    own = [torch.empty(x.size, dtype=torch.uint8, device=device) for x in program.arenas if x.size]
    before = earlier if SAVED in tensors else None
    memories = [_realigned(tensors[SAVED]), *own] if before else own
    names = [name for name in program.inputs if name in tensors]
    given = [tensors[name] for name in names]
    key = (device.index, id(before), *[x.dtype for x in given])
    kept = program.kept.get(key)
    addresses = [x.data_ptr() for x in given]
    aligned = _aligned(addresses) and (not out or _aligned([x.data_ptr() for x in out.values()]))
    with _on(device):
        if kept and aligned:
            env = kept.run(addresses, memories, tensors, out)
        else:
            env = {}
            whose = [(before, before.arenas[0])] if before else []
            whose += [(program, x) for x in program.arenas if x.size]
            for (of, arena), memory in zip(whose, memories, strict=True):
                env.update(_views(arena, memory, of))
            env |= dict(zip(names, given, strict=True)) | {n: x for n, x in out.items() if n in program.specs}
            kernels = _compile_all(program, env, device)
            if aligned and None not in kernels:
                program.kept[key] = schedule(program, kernels, names, before)
    saved = program.arenas[0]
    results = {name: env[name] for name in program.results if name not in saved.places and name not in out}
    if saved.size:
        results[SAVED] = own[0]
    return {**results, **out}


def _interpret(
    program: Pass, tensors: Tensors, out: Tensors | None = None, earlier: Pass | None = None
) -> dict[str, Tensor]:
    hosts = {
        name: interpreter.HostArray(tensors[name].data_ptr(), dtype_name(tensors[name].dtype), tensors[name])
        for name in program.inputs
    }
    raw = interpreter.run(program, hosts)
    views = {name: torch.from_numpy(x).view(dtype_of(program.spec(name).dtype))[..., 0] for name, x in raw.items()}
    new = {name: x.clone() for name, x in views.items()}  # autograd forbids writing into a view, as no GPU's result is
    return new | {name: x.copy_(new[name]) for name, x in (out or {}).items()}


def run(
    program: Pass, tensors: Tensors, backend: str, out: Tensors | None = None, earlier: Pass | None = None
) -> dict[str, Tensor]:
    """Execute a pass. Tensors must have the strides that its plan was made for.

    out: tensors for results, by name. earlier: the pass whose saved results are among the tensors.
    """
    return (_interpret if backend == "interpret" else launch_all)(program, tensors, out, earlier)
