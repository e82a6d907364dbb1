"""Compiles what a pass would launch, without a GPU: by a driver that only names a target."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from kernels_triton import assembler


class Driver:
    """A driver without a device: Triton asks it what to compile for."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


class CompileOnly:
    """Stands for a kernel in a launch: compiles what would be launched, and keeps the results."""

    def __init__(self, kernel: Any, results: list[Any]):
        self.kernel, self.fn, self.results = assembler.ours(kernel), kernel.fn, results

    def __getitem__(self, grid: Any) -> Any:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):  # where Triton prints the assembler's resource report
                compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.results.append((compiled, log.getvalue()))

        return compile_it


class LaidOut(Exception):
    """Ends a compilation once all tiles have their layouts; carries Triton's GPU IR."""


def _end_with_layouts(_: Any = None, stages: Any = None, *__: Any) -> Any:
    if stages is None:  # later versions of Triton ask for a key of the cache first
        return "layouts", "layouts"
    lay_out = stages["ttgir"]

    def end(source: Any, metadata: Any) -> None:
        raise LaidOut(str(lay_out(source, metadata)))

    stages["ttgir"] = end


class LayOutOnly(CompileOnly):
    """As CompileOnly, but keeps Triton's GPU IR and goes no further: a tenth of the time."""

    # By target, kernel and arguments: Triton's own cache has only what was compiled to the end.
    found: ClassVar[dict[tuple[Any, ...], str]] = {}

    def __getitem__(self, grid: Any) -> Any:
        import triton

        def lay_it_out(*args: Any, **kwargs: Any) -> None:
            target = triton.runtime.driver.active.get_current_target()
            call = (target, self.fn, repr(args), repr(kwargs))
            if call in self.found:
                self.results.append(self.found[call])
                return
            triton.knobs.runtime.add_stages_inspection_hook = _end_with_layouts
            try:
                ttgir = self.kernel.warmup(*args, grid=grid, **kwargs).asm["ttgir"]  # if it was compiled before
            except LaidOut as end:
                ttgir = end.args[0]
            finally:
                triton.knobs.runtime.add_stages_inspection_hook = None
            self.found[call] = ttgir
            self.results.append(ttgir)

        return lay_it_out


class LeaveOut(CompileOnly):
    """Compiles nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


def compile_pass(
    program: Any,
    inputs: dict[str, tuple[tuple[int, ...], str]],
    kind: type[CompileOnly],
    wanted: Sequence[bool] | None = None,
) -> list[Any]:
    """What `kind` keeps of each wanted launch of a pass that PyTorch's executor runs on tensors without memory."""
    import torch

    from frontend_torch import executor

    results: list[Any] = []
    launches = tuple(
        dataclasses.replace(x, kernel=(kind if keep else LeaveOut)(x.kernel, results))
        for x, keep in zip(program.launches, wanted or [True] * len(program.launches), strict=True)
    )
    tensors = {n: torch.empty(shape, dtype=getattr(torch, d), device="meta") for n, (shape, d) in inputs.items()}
    executor.launch_all(dataclasses.replace(program, launches=launches), tensors)
    return results


def resources(compiled: Any, log: str) -> tuple[int, int]:
    """Registers and spills, from ptxas' report or from the AMD assembly's metadata."""
    if "amdgcn" in compiled.asm:
        fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        return int(fields["vgpr_count"]), int(fields["vgpr_spill_count"])
    registers, stores = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or stores is None:
        raise RuntimeError(f"{compiled.name}: expected ptxas' report of registers and spills, got {log!r}")
    return int(registers[1]), int(stores[1])
