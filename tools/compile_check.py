"""Compiles every kernel of the plan for each GPU target, on any machine, through both frontends, and compares the PTX.

    python -m tools.compile_check [--target sm_90 ...] [--heads 128x256 ...] [--dtype bfloat16 ...] [--json PATH]

The PyTorch side runs the frontend's own executor on tensors without memory, against a driver that only names a target;
the JAX side lowers the frontend's own executor for CUDA. Exit code 1 if the PTX differs, a kernel does not compile, its
shared memory exceeds the target's, it spills thousands of bytes, its Hopper code has a known defect of the assembler
(sass.py), the assembler runs its matrix instructions one at a time, or what it sums up through tensor descriptors, as
PyTorch does, it adds in another order than by pointers, as JAX does (sums.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from . import sass, sums

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEADS = ("64x64", "128x128", "128x256", "256x512")
DTYPES = ("bfloat16", "float32")
B, H, T = 2, 4, 520  # only strides come from these; T is ragged
LONG, SEQUENCES = 2100, 3  # of packed sequences: long enough for scans in segments
MOST_SPILLS = 2048  # bytes per thread; float32's gradients have 1,488, and a kernel with thousands is a mistake
SERIALISED = "wgmma.mma_async instructions are serialized"  # ptxas' remarks C7510 to C7515
# By name, the operator's options that other kernels come from.
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "detached": {"normalizer_grad": "detached"},
    "recurrent": {"form": "recurrent"},
    "plain": {"input_gate": "sigmoid", "normalize": False},
    "packed": {"packed": True, "layout": "bthd"},
    "segment": {},  # of a sequence that is split over devices
    "many heads": {"B": 32},  # the fused kernels, where the table has any
}
# Those that are compiled for some targets, head dims and dtypes only, since they differ from the rest in little.
HOPPER = ("sm_90", "128x256", "bfloat16")
SOME = (HOPPER, *((target, "64x64", "bfloat16") for target in TARGETS))
RARE = {"plain": (HOPPER,), "packed": SOME, "segment": (*SOME, ("sm_90", "64x64", "float32")), "many heads": SOME}


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


def _problem(heads: str, dtype: str, changes: dict[str, Any]) -> Any:
    from kernels_triton.validation import ArrayInfo, check_call

    K, V = map(int, heads.split("x"))
    options: dict[str, Any] = {
        "eps": 1e-6,
        "chunk_size": None,
        "qk_scale": None,
        "normalizer_grad": "exact",
        "layout": "bhtd",
        "precision": "ieee",
        "backend": "auto",
    } | changes
    packed = options.pop("packed", False)
    batch = options.pop("B", B)
    tokens = (1, LONG, H) if packed else (batch, H, T)
    states = (SEQUENCES if packed else batch, H)
    shapes: dict[str, tuple[int, ...]] = {"q": (*tokens, K), "k": (*tokens, K), "v": (*tokens, V)}
    arrays = {name: ArrayInfo(shape, dtype, "") for name, shape in shapes.items()}
    shapes = {"i": tokens, "f": tokens, "c_initial": (*states, K, V), "n_initial": (*states, K), "m_initial": states}
    arrays |= {name: ArrayInfo(shape, "float32", "") for name, shape in shapes.items()}
    if packed:
        arrays["cu_seqlens"] = ArrayInfo((SEQUENCES + 1,), "int32", "")
    return check_call(arrays, **options)


def _passes(
    heads: str, dtype: str, arch: str, descriptors: bool = False
) -> Iterator[tuple[str, Any, dict[str, tuple[tuple[int, ...], str]]]]:
    """(variant, pass, its inputs' shapes and dtypes); a variant's two passes, the forward ones first."""
    from kernels_triton import plan

    for variant, changes in VARIANTS.items():
        if variant in RARE and (arch, heads, dtype) not in RARE[variant]:
            continue
        problem = dataclasses.replace(_problem(heads, dtype, changes), arch=arch, descriptors=descriptors)
        forward = plan.forward_pass(problem)
        tokens = (1, problem.T, H) if problem.sequences else (problem.B, H, T)
        K, V = problem.K, problem.V
        known: dict[str, tuple[tuple[int, ...], str]] = {
            name: ((*tokens, D), dtype) for name, D in (("q", K), ("k", K), ("v", V), ("dh", V))
        }
        known |= {name: (tokens, "float32") for name in ("i", "f")}
        known["cu_seqlens"] = ((SEQUENCES + 1,), "int32")
        for suffix in ("initial", "last"):
            for name, shape in (("c", (K, V)), ("n", (K,)), ("m", ())):
                known[f"{name}_{suffix}"] = known[f"d{name}_{suffix}"] = ((*problem.state_heads, *shape), "float32")
        for launch in forward.launches:
            known |= {buffer: (spec.shape, spec.dtype) for buffer, spec in launch.outputs.values()}
        if variant == "segment":
            segment = plan.segment_state(problem), plan.segment_cotangent(problem, None, True)
            known |= {name: (spec.shape, spec.dtype) for name, spec in segment[1].specs.items()}
            for program in (*segment, plan.segment_backward(problem, None, True)):
                yield variant, program, {name: known[name] for name in program.inputs}
            continue
        if variant != "detached":  # the forward pass does not depend on it
            yield "forward" if variant == "exact" else variant, forward, {name: known[name] for name in forward.inputs}
        if variant != "recurrent":
            backward = plan.backward_pass(problem, None, True)
            yield variant, backward, {name: known[name] for name in backward.inputs}


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

    def __init__(self, kernel: Any, results: list[tuple[Any, str]]):
        self.kernel, self.fn, self.results = kernel, kernel.fn, results

    def __getitem__(self, grid: Any) -> Any:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):  # where Triton prints the assembler's resource report
                compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.results.append((compiled, log.getvalue()))

        return compile_it


def resources(compiled: Any, log: str) -> tuple[int, int]:
    """Registers and spills, from ptxas' report or from the AMD assembly's metadata."""
    if "amdgcn" in compiled.asm:
        fields = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        return int(fields["vgpr_count"]), int(fields["vgpr_spill_count"])
    registers, stores = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or stores is None:
        raise RuntimeError(f"{compiled.name}: expected ptxas' report of registers and spills, got {log!r}")
    return int(registers[1]), int(stores[1])


def _through_torch(target: str, heads: str, dtype: str) -> list[tuple[Compiled, str]]:
    """Each distinct kernel with its PTX (assembly for AMD)."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from frontend_torch import executor
    from kernels_triton.config import SHARED_MEMORY

    hip = target.startswith("gfx")
    driver.set_active(Driver(GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target[3:]), 32)))
    found: dict[str, tuple[Compiled, str]] = {}
    orders: dict[tuple[int, int], list[str]] = {}  # of the sums of each pass's kernels
    passes = list(enumerate(_passes(heads, dtype, target)))
    if target == "sm_90" and dtype == "bfloat16":  # where the PyTorch frontend goes through descriptors
        through = enumerate(_passes(heads, dtype, target, True))
        passes += [(number, (f"{variant}, descriptors", *rest)) for number, (variant, *rest) in through]
    for number, (variant, program, inputs) in passes:
        results: list[tuple[Any, str]] = []
        launches = tuple(dataclasses.replace(x, kernel=CompileOnly(x.kernel, results)) for x in program.launches)
        tensors = {n: torch.empty(shape, dtype=getattr(torch, d), device="meta") for n, (shape, d) in inputs.items()}
        executor.launch_all(dataclasses.replace(program, launches=launches), tensors)
        for place, (compiled, log) in enumerate(results):
            order = sums.orders(compiled.asm["ttgir"])
            other_order = orders.setdefault((number, place), order) != order
            code = compiled.asm["amdgcn" if hip else "ptx"]
            if code not in found:
                registers, spills = resources(compiled, log)
                facts = (compiled.name, variant, registers, spills, compiled.metadata.shared, SHARED_MEMORY[target])
                cubin = compiled.asm["cubin"] if target == "sm_90" else None
                defects = len(sass.wrong_addresses(sass.disassemble(cubin))) if cubin else 0
                row = Compiled(target, heads, dtype, *facts, defects, SERIALISED in log, other_order)
                found[code] = row, code
    return list(found.values())


def _through_jax(target: str, heads: str, dtype: str, dump: Path) -> set[str]:
    """The PTX of every kernel, as jax-triton compiles it when the frontend's executor is lowered for CUDA."""
    import jax

    from frontend_jax import executor

    before = set(dump.glob("*/*.ptx"))
    for _, program, inputs in _passes(heads, dtype, target):
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


def _table(rows: list[Compiled]) -> Table:
    table = Table(title="Kernels as compiled: registers and spilled bytes per thread, shared memory per program")
    numeric = ("registers", "spills", "shared", "limit")
    for name in ("target", "K x V", "dtype", "kernel", "pass", *numeric, "PTX torch = JAX"):
        table.add_column(name, justify="right" if name in numeric else "left")
    order = {name: i for i, name in enumerate(("forward", *VARIANTS))}
    order |= {f"{name}, descriptors": i + 9 for name, i in order.items()}
    keys = {name: i for names in (TARGETS, HEADS, DTYPES) for i, name in enumerate(names)}
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


def main(
    target: list[str] = typer.Option(list(TARGETS), help="GPU architectures to compile for."),
    heads: list[str] = typer.Option(list(HEADS), help="Head dimensions, KxV."),
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
    tasks = [(t, h, d) for h in heads for d in dtype for t in target]
    rows: list[Compiled] = []
    failures: list[str] = []
    # A process per task: caches of compiled kernels in Triton and jax-triton outlive a change of target.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(check, *task): task for task in tasks}
        for future in tqdm(as_completed(futures), total=len(futures), desc="compile", unit="config"):
            try:
                rows += future.result()
            except Exception as error:  # a compiler's failure is a result here: report it with the others
                failures.append(f"{' '.join(futures[future])}: {type(error).__name__}: {error}")
    console.print(_table(rows))
    for failure in failures:
        console.print(failure, style="red", markup=False)
    if json_path:
        json_path.write_text(json.dumps([dataclasses.asdict(x) for x in rows], indent=1))
    same = [x.same_as_jax for x in rows if x.same_as_jax is not None]
    fitting = sum(x.shared <= x.shared_limit for x in rows)
    console.print(
        f"Triton {triton.__version__}: {len(rows)} kernels compiled; PTX equal for {sum(same)} of {len(same)} lowered "
        f"through JAX; shared memory within limits for {fitting}; {sum(x.spills > 0 for x in rows)} with spills; "
        f"{sum(x.defects > 0 for x in rows)} with defects of the assembler; "
        f"{sum(x.serialised for x in rows)} with matrix instructions one at a time; "
        f"{sum(x.other_order for x in rows)} that add in another order through descriptors"
    )
    if failures or not all(x.ok for x in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
