"""One process under the sanitizer, or that fills Triton's cache for it: runs shapes through the PyTorch frontend.

    python -m tools.sanitize_child SHAPE ...

Prints a line per shape, `RESULT {"shape": ..., "kernels": [...], "error": ""}`: the kernels that were launched, and
what was wrong with the results, if anything was. Exit code 1 if anything was.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton import knobs

import frontend_torch
from frontend_torch import calls
from frontend_torch.tensors import architecture_of, dtype_of
from kernels_triton import launch

from .sanitize_shapes import BY_NAME, Shape, array_shapes, kernels

RESULT = "RESULT "
DEVICE = torch.device("cuda:0")
RUNS = 2  # the second one is on kept kernels and plain addresses


def make_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    """A call's tensors, random ones; drawn on the host, so that fewer of PyTorch's kernels are checked with ours."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, size in array_shapes(shape).items():
        x = torch.randn(size, generator=generator) + (3.0 if name == "f" else 0.0)
        dtype = dtype_of(shape.dtype) if name in ("q", "k", "v") else torch.float32
        found[name] = x.to(dtype).to(DEVICE)
    return found


def run(shape: Shape) -> dict[str, torch.Tensor]:
    """Results and gradients of one call by name."""
    calls.descriptors = "1" if shape.descriptors else "0"
    tensors = make_tensors(shape)
    if shape.form == "step":
        step: Any = frontend_torch.mlstm_step
        h, states = step(**tensors, **shape.options)
        return {"h": h, **dict(zip(("c", "n", "m"), states, strict=True))}
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    options: dict[str, Any] = {**shape.options, "return_last_states": shape.initial, "layout": shape.layout}
    if shape.lengths:
        options["cu_seqlens"] = torch.tensor(shape.offsets, dtype=torch.int32, device=DEVICE)
    operator: Any = frontend_torch.mlstm_recurrent if shape.form == "recurrent" else frontend_torch.mlstm_chunkwise
    out = operator(**leaves, **options)
    outputs = (out[0], *out[1]) if shape.initial else (out,)
    # The sigmoid gate's m_last is a constant.
    outputs = tuple(x for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(x) for x in outputs])
    named = dict(zip(("h", "c_last", "n_last", "m_last"), outputs, strict=False))
    return named | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def problem_with(shape: Shape, launched: list[str], runs: list[dict[str, torch.Tensor]]) -> str:
    """What is wrong with a shape's runs; nothing if nothing is."""
    expected = kernels(shape, architecture_of(DEVICE))
    if set(launched) != set(expected):
        return f"expected the kernels {', '.join(sorted(expected))}, got {', '.join(sorted(set(launched)))}"
    first, *others = runs
    infinite = [name for name, x in first.items() if not x.cpu().isfinite().all()]
    if infinite:
        return f"expected finite results, got others in {', '.join(infinite)}"
    moved = {name for each in others for name, x in each.items() if not torch.equal(x.cpu(), first[name].cpu())}
    return f"expected the same bits in every run, got others in {', '.join(sorted(moved))}" if moved else ""


def check(shape: Shape) -> tuple[list[str], str]:
    """The kernels that a shape launches, and what is wrong with it."""
    launched: list[str] = []

    def enter(metadata: Any) -> None:
        launched.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(enter)
    try:
        runs = [run(shape) for _ in range(RUNS)]
        torch.cuda.synchronize()
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    return list(dict.fromkeys(launched)), problem_with(shape, launched, runs)


def main(names: list[str]) -> int:
    launch.SMALL = -1  # every buffer in memory of its own: the sanitizer knows the bounds of allocations alone
    failed = False
    for name in names:
        launched: list[str] = []
        try:
            launched, error = check(BY_NAME[name])
        except Exception as exception:
            error = f"{type(exception).__name__}: {' '.join(str(exception).split())[:300]}"
        failed = failed or bool(error)
        print(RESULT + json.dumps({"shape": name, "kernels": launched, "error": error}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
