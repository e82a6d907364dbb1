"""Compiles every kernel of the plan for each GPU target, on any machine, through both frontends, and compares the PTX.

    python -m tools.compile_check [--target sm_90 ...] [--heads 128x256 ...] [--dtype bfloat16 ...] [--json PATH]

The PyTorch side runs the frontend's own executor on tensors without memory, against a driver that only names a target;
the JAX side lowers the frontend's own executor for CUDA. The assembler is the one that users of PyTorch get on this
machine (kernels_triton/assembler.py); JAX's PTX is compared, not assembled.

Exit code 1 if the PTX differs, a kernel does not compile, its
shared memory exceeds the target's, it spills thousands of bytes, its Hopper code has a known defect of the assembler
(sass.py), the assembler runs its matrix instructions one at a time, or what it sums up through tensor descriptors, as
PyTorch does, it adds in another order than by pointers, as JAX does (sums.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import compress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kernels_triton import assembler

from . import sass, sums
from .compile_cases import DTYPES, HEADS, ODD, TARGETS, VARIANTS, passes
from .compile_only import CompileOnly, Driver, LayOutOnly, compile_pass, resources

MOST_SPILLS = 2048  # bytes per thread; float32's gradients have 1,488, and a kernel with thousands is a mistake
SERIALISED = "wgmma.mma_async instructions are serialized"  # ptxas' remarks C7510 to C7515
DESCRIPTORS = ("sm_90", "bfloat16")  # where the PyTorch frontend goes through them
CHUNKS = (16, 32)  # sizes that users may ask for, and whose tiles have other layouts than those of the tables


@dataclasses.dataclass
class Compiled:
    """One compiled kernel: what the compiler says of it, and whether JAX's lowering gave the same code."""

    target: str
    heads: str
    dtype: str
    kernel: str
    variant: str
    registers: int
    spills: int  # bytes spilled per thread; on AMD spilled vector registers
    shared: int  # bytes per program
    shared_limit: int
    defects: int = 0  # instructions that the assembler got wrong (tools/sass.py)
    serialised: bool = False  # each matrix instruction waits for the one before
    other_order: bool = False  # adds in another order than the same kernel without tensor descriptors
    same_as_jax: bool | None = None  # None: no JAX lowering for this target here

    @property
    def ok(self) -> bool:
        fits = self.shared <= self.shared_limit and self.spills <= MOST_SPILLS
        wrong = self.defects or self.serialised or self.other_order
        return fits and self.same_as_jax is not False and not wrong


def _through_torch(target: str, heads: str, dtype: str) -> list[tuple[Compiled, str]]:
    """Each distinct kernel with its PTX (assembly for AMD)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from kernels_triton.config import SHARED_MEMORY

    hip = target.startswith("gfx")
    driver.set_active(Driver(GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)))
    found: dict[str, tuple[Compiled, str]] = {}
    orders: dict[tuple[int, int], list[str]] = {}  # of the sums of each pass's kernels
    each = list(enumerate(passes(heads, dtype, target)))
    if (target, dtype) == DESCRIPTORS:
        through = enumerate(passes(heads, dtype, target, True))
        each += [(number, (f"{variant}, descriptors", *rest)) for number, (variant, *rest) in through]
    for number, (variant, program, inputs) in each:
        results = compile_pass(program, inputs, CompileOnly)
        for place, (compiled, log) in enumerate(results):
            order = sums.orders(compiled.asm["ttgir"])
            other_order = orders.setdefault((number, place), order) != order
            code = compiled.asm["amdgcn" if hip else "ptx"]
            if code not in found:
                registers, spills = resources(compiled, log)
                facts = (compiled.name, variant, registers, spills, compiled.metadata.shared, SHARED_MEMORY[target])
                # Of matrix products and of spills are the defects; the tool takes half a second.
                looked_at = target == "sm_90" and ("wgmma" in code or spills > 0)
                defects = len(sass.defects(sass.disassemble(compiled.asm["cubin"]))) if looked_at else 0
                row = Compiled(target, heads, dtype, *facts, defects, SERIALISED in log, other_order)
                found[code] = row, code
    return list(found.values())


def _through_jax(target: str, heads: str, dtype: str, dump: Path) -> set[str]:
    """The PTX of every kernel, as jax-triton compiles it when the frontend's executor is lowered for CUDA."""
    import jax

    from frontend_jax import executor

    before = set(dump.glob("*/*.ptx"))
    for _, program, inputs in passes(heads, dtype, target):
        arrays = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in inputs.items()}

        def run(arrays: dict[str, Any], program: Any = program) -> dict[str, Any]:
            return executor.launch_all(program, arrays, compute_capability=int(target[3:]))

        jax.jit(run).trace(arrays).lower(lowering_platforms=("cuda",))
    return {path.read_text() for path in set(dump.glob("*/*.ptx")) - before}


def check(target: str, heads: str, dtype: str) -> list[Compiled]:
    """Compile one configuration for one target through both frontends. Runs in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        # A fresh cache, so that the assembler runs and reports; both are read when Triton and jax-triton are imported.
        os.environ.update(TRITON_CACHE_DIR=f"{scratch}/cache", JAX_TRITON_DUMP_DIR=f"{scratch}/dump")
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.pop("TRITON_INTERPRET", None)
        import triton

        triton.knobs.nvidia.dump_ptxas_log = True
        rows = _through_torch(target, heads, dtype)
        if target.startswith("sm_"):
            Path(scratch, "dump").mkdir()
            ptx = _through_jax(target, heads, dtype, Path(scratch, "dump"))
            shared = [(row, code) for row, code in rows if "descriptors" not in row.variant]
            for row, code in shared:
                row.same_as_jax = code in ptx
            if len(ptx) != len(shared):
                raise RuntimeError(f"{len(shared)} kernels through torch, {len(ptx)} through JAX")
    return [row for row, _ in rows]


def check_orders(heads: str, chunk_size: int) -> list[Compiled]:
    """Fails if a kernel adds in another order through descriptors, with chunks of that size. Keeps no rows."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target, dtype = DESCRIPTORS
    driver.set_active(Driver(GPUTarget("cuda", int(target[3:]), 32)))
    both = zip(*(passes(heads, dtype, target, through, chunk_size) for through in (False, True)), strict=True)
    for (variant, pointers, inputs), (_, descriptors, _) in both:
        differ = [x != y for x, y in zip(pointers.launches, descriptors.launches, strict=True)]
        orders = [
            [sums.orders(x) for x in compile_pass(program, inputs, LayOutOnly, differ)]
            for program in (pointers, descriptors)
        ]
        for launch, x, y in zip(compress(pointers.launches, differ), *orders, strict=True):
            if x != y:
                raise RuntimeError(f"{launch.name} ({variant}) adds in another order through descriptors")
    return []


def _table(rows: list[Compiled]) -> Table:
    table = Table(title="Kernels as compiled: registers and spilled bytes per thread, shared memory per program")
    numeric = ("registers", "spills", "shared", "limit")
    for name in ("target", "K x V", "dtype", "kernel", "pass", *numeric, "PTX torch = JAX"):
        table.add_column(name, justify="right" if name in numeric else "left")
    order = {name: i for i, name in enumerate(("forward", *VARIANTS))}
    order |= {f"{name}, descriptors": i + len(order) for name, i in order.items()}
    keys = {name: i for names in (TARGETS, HEADS + ODD, DTYPES) for i, name in enumerate(names)}
    rows.sort(key=lambda x: (keys[x.target], keys.get(x.heads, 9), keys.get(x.dtype, 9), order[x.variant]))
    for x in rows:
        same = {
            None: "torch only" if x.target == "sm_90" else "not lowered",
            True: "same",
            False: "[red]DIFFERENT[/red]",
        }[x.same_as_jax]
        shared = f"{x.shared:,}" if x.shared <= x.shared_limit else f"[red]{x.shared:,}[/red]"
        spills = f"[red]{x.spills}[/red]" if x.spills > MOST_SPILLS else str(x.spills)
        spills += f" [red]{x.defects} DEFECTS[/red]" if x.defects else ""
        spills += " [red]ONE PRODUCT AT A TIME[/red]" if x.serialised else ""
        spills += " [red]ADDS IN ANOTHER ORDER[/red]" if x.other_order else ""
        numbers = (str(x.registers), spills, shared, f"{x.shared_limit:,}")
        table.add_row(x.target, x.heads, x.dtype, x.kernel, x.variant, *numbers, same)
    return table


def _assemblers(targets: list[str]) -> str:
    """What assembled the code for each target."""
    found = ""
    for target in targets:
        if target.startswith("sm_"):
            try:
                found += f", {assembler.choose(int(target[3:]))} for {target}"
            except RuntimeError as error:  # none that may serve: every kernel failed for it
                found += f", none for {target} ({error})"
    return found


def main(
    target: list[str] = typer.Option(list(TARGETS), help="GPU architectures to compile for."),
    heads: list[str] = typer.Option(
        list(HEADS), help="Head dimensions, KxV. By default odd V too, in bfloat16 on Hopper."
    ),
    dtype: list[str] = typer.Option(list(DTYPES), help="dtypes of q, k, v."),
    jobs: int = typer.Option(2, min=1, help="Processes side by side."),
    json_path: Path | None = typer.Option(None, "--json", help="Write the rows there."),
) -> None:
    """Compile every kernel for every target through both frontends; no GPU needed."""
    for name in target:
        if name not in TARGETS:
            raise typer.BadParameter(f"expected one of {', '.join(TARGETS)}, got {name}", param_hint="--target")
    for name in heads:
        if not re.fullmatch(r"\d+x\d+", name):
            raise typer.BadParameter(f"expected KxV such as 128x256, got {name}", param_hint="--heads")
    import triton

    console = Console(width=None if sys.stdout.isatty() else 150)
    tasks: dict[tuple[Any, ...], Callable[..., list[Compiled]]]
    tasks = {(t, h, d): check for h in heads for d in dtype for t in target}
    if DESCRIPTORS[0] in target and DESCRIPTORS[1] in dtype:
        tasks |= {(h, size): check_orders for h in heads for size in CHUNKS}
        if heads == list(HEADS):
            tasks |= {(DESCRIPTORS[0], h, DESCRIPTORS[1]): check for h in ODD}
    rows: list[Compiled] = []
    failures: list[str] = []
    # A process per task: caches of compiled kernels in Triton and jax-triton outlive a change of target.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(run, *task): task for task, run in tasks.items()}
        for future in tqdm(as_completed(futures), total=len(futures), desc="compile", unit="config"):
            try:
                rows += future.result()
            except Exception as error:  # a compiler's failure is a result here: report it with the others
                failures.append(f"{' '.join(map(str, futures[future]))}: {type(error).__name__}: {error}")
    console.print(_table(rows))
    for failure in failures:
        console.print(failure, style="red", markup=False)
    if json_path:
        json_path.write_text(json.dumps([dataclasses.asdict(x) for x in rows], indent=1))
    same = [x.same_as_jax for x in rows if x.same_as_jax is not None]
    fitting = sum(x.shared <= x.shared_limit for x in rows)
    console.print(
        f"Triton {triton.__version__}{_assemblers(target)}: {len(rows)} kernels compiled; "
        f"PTX equal for {sum(same)} of {len(same)} lowered through JAX; "
        f"shared memory within limits for {fitting}; {sum(x.spills > 0 for x in rows)} with spills; "
        f"{sum(x.defects > 0 for x in rows)} with defects of the assembler; "
        f"{sum(x.serialised for x in rows)} with matrix instructions one at a time; "
        f"{sum(x.other_order for x in rows)} that add in another order through descriptors "
        f"(also looked for with chunks of {' and '.join(map(str, CHUNKS))})"
    )
    if failures or not all(x.ok for x in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
