"""Searches tile sizes offline, kernel by kernel, and writes them into the table of the GPU's architecture.

    python -m tools.tune [--shapes A ...] [--dtype bfloat16] [--kernels backward ...] [--write]

For each shape and kernel: every valid tile is compiled, in processes side by side; those that spill much or do not fit
shared memory are dropped; each survivor is timed in turns with the others on the shape's own tensors, those far behind
once; of those within 1 % of the best the first is taken that passes the comparison with float64 and has the same bits
by descriptors and by pointers. One that the GPU does not run is out.
With --compile-only it stops after the compiler, which needs no GPU. Exit code 1 if a kernel is left without a tile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from kernels_triton.config import Tile, serves

from . import tune_measure
from .bench_cases import SHAPES, Shape, matching
from .tune_candidates import BLOCKS, candidates

ROUNDS = 5
KERNELS_HELP = f"Glob patterns of {', '.join(BLOCKS)}; by default all."
# Bytes of spills that are left to the clock: the fastest bfloat16 tiles spill up to 84, of float32 in "ieee" 756.
FEW_SPILLS = {"matrix units": 128, "registers": 2048}
SLACK = 1.01  # times closer than this count as equal: the tile that stands first stays
Times = dict[int, float]  # by a tile's number
Wrong = dict[int, str]


@dataclasses.dataclass(frozen=True)
class Found:
    """One candidate: what the compiler says, and its time in milliseconds."""

    tile: tuple[int, ...]
    spills: int
    shared: int
    problem: str = ""  # why it is out, or nothing
    ms: float | None = None


def compile_all(jobs: list[tuple[Any, ...]], workers: int) -> list[tuple[int, int, str]]:
    """(spills, shared memory, error) of each job."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = pool.map(tune_measure.compile_one, *zip(*jobs, strict=True))
        return list(tqdm(results, total=len(jobs), desc="compile", unit="tile", disable=None))


def on_gpu(shape: Shape, dtype: str, field: str, arch: str, tiles: dict[int, Tile]) -> tuple[Times, Wrong]:
    """Milliseconds of each tile, and what is wrong with those that were checked or that the GPU does not run.

    In a process of its own: a kernel with an illegal access takes its process along. Then again without that one.
    """
    left = dict(tiles)
    wrong: Wrong = {}
    while left:
        receive, send = get_context("spawn").Pipe(duplex=False)
        arguments = (shape, dtype, field, arch, left, ROUNDS, SLACK, send)
        process = get_context("spawn").Process(target=tune_measure.measure, args=arguments)
        process.start()
        send.close()
        times: Times = {}
        last: int | None = None
        with tqdm(desc=f"{shape.name} {field}", unit="run", disable=None) as bar:
            try:
                while True:
                    what, value = receive.recv()
                    if what == "wrong":
                        process.join()
                        return times, wrong | value
                    if what == "turns":
                        bar.total = bar.n + value
                        bar.refresh()
                    times = value if what == "times" else times
                    last = value if what in ("time", "check") else last
                    bar.update(what == "time")
            except EOFError:  # it died
                process.join()
            finally:
                process.kill()
        if last is None:
            raise RuntimeError(f"{field}: expected times, got exit code {process.exitcode} before the first")
        wrong[last] = f"fails on the GPU: exit code {process.exitcode}"
        del left[last]
    return {}, wrong


def pruned(tiles: list[Tile], compiled: list[tuple[int, int, str]], arch: str, few: int) -> list[Found]:
    """The candidates, the present one first, and which of them the compiler's words rule out.

    few: bytes of spills on which a clock decides later; 0 without one. With a clock the present tile has to be beaten,
    whatever it spills, and where all others spill much they stay too.
    """
    found = []
    for tile, (spills, shared, error) in zip(tiles, compiled, strict=True):
        spilled = "spills" if spills > few else ""
        reason = error or tune_measure.too_large(shared, arch) or spilled
        found.append(Found(dataclasses.astuple(tile), spills, shared, reason))
    if not few:
        return found
    forgiven = [dataclasses.replace(x, problem="" if x.problem == "spills" else x.problem) for x in found]
    return forgiven if all(x.problem for x in found[1:]) else [forgiven[0], *found[1:]]


def search(shape: Shape, dtype: str, field: str, arch: str, workers: int, only_compile: bool) -> list[Found]:
    """All candidates of one kernel, the fastest good one first."""
    problem = tune_measure.make_problem(shape, dtype, arch)
    config = tune_measure.config_of(problem, field)
    tiles = list(candidates(field, config, problem))
    if not tiles:
        return []
    compiled = compile_all([(shape, dtype, field, arch, dataclasses.astuple(tile)) for tile in tiles], workers)
    few = FEW_SPILLS["matrix units" if problem.matrix_units else "registers"]
    found = pruned(tiles, compiled, arch, 0 if only_compile else few)
    if only_compile:
        return sorted(found, key=lambda x: bool(x.problem))
    alive = {n: tiles[n] for n, x in enumerate(found) if not x.problem}
    times, wrong = on_gpu(shape, dtype, field, arch, alive)
    found = [dataclasses.replace(x, ms=times.get(n), problem=wrong.get(n) or x.problem) for n, x in enumerate(found)]
    right = [x for n, x in enumerate(found) if wrong.get(n) == ""]
    rest = sorted(
        (x for x in found if x not in right),
        key=lambda x: (bool(x.problem), x.ms if x.ms is not None else float("inf")),
    )
    return [*right, *rest]


def _row(tile: tuple[int, ...]) -> list[int]:
    """A tile as tables have it: without what ends it by default."""
    return next(list(tile[:n]) for n in range(6, len(tile) + 1) if Tile(*tile[:n]) == Tile(*tile))


def write(path: Path, shape: Shape, name: str, chosen: dict[str, tuple[int, ...]], machine: str) -> None:
    """Put the tiles into the entry that serves the shape."""
    data = json.loads(path.read_text())
    problem = tune_measure.make_problem(shape, name, path.stem)
    entry = next(x for x in data["entries"] if serves(x, problem))
    entry.update({field: _row(tile) for field, tile in chosen.items()}, measured=machine)
    rows = ",\n".join("    " + json.dumps(x) for x in data.pop("entries"))
    head = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in data.items())
    path.write_text("{\n" + head + '  "entries": [\n' + rows + "\n  ]\n}\n")


def table(shape: Shape, field: str, found: list[Found]) -> Table:
    result = Table(title=f"{shape.name} {shape.sizes}: {field}")
    for name in ("BT", "BS", "BK", "BV", "warps", "stages", "TMA", "span", "spills", "shared", "ms", ""):
        result.add_column(name, justify="right")
    for x in found:
        ms = "" if x.ms is None else f"{x.ms:.3f}"
        result.add_row(*map(str, x.tile), str(x.spills), f"{x.shared:,}", ms, x.problem)
    return result


def main(
    shapes: list[str] = typer.Option(["A", "B7", "C64", "AL"], help="Glob patterns of tools.bench's shapes."),
    dtype: str = typer.Option("bfloat16", help="One of tools.bench's: float32 with its precision, as float32-tf32."),
    kernels: list[str] = typer.Option([], help=KERNELS_HELP),
    target: str | None = typer.Option(None, help="Architecture to compile for, without a GPU; implies --compile-only."),
    only_compile: bool = typer.Option(False, "--compile-only", help="Stop after compiling."),
    jobs: int = typer.Option(max(1, (os.cpu_count() or 2) - 2), min=1, help="Compiling processes."),
    into: bool = typer.Option(False, "--write", help="Write the tiles found into kernels_triton/configs."),
) -> None:
    """Search the tile sizes of this GPU."""
    try:
        wanted = matching(SHAPES, shapes, "shapes", lambda x: x.name)
        fields = matching(tuple(BLOCKS), kernels, "kernels", str)
        tune_measure.dtype_named(dtype)
        arch = target or tune_measure.this_architecture()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    only_compile = only_compile or target is not None
    console = Console(width=None if sys.stdout.isatty() else 120)
    left_without = False
    for shape in wanted:
        chosen = {}
        for field in fields:
            found = search(shape, dtype, field, arch, jobs, only_compile)
            if not found:
                continue
            console.print(table(shape, field, found))
            if found[0].problem:
                left_without = True
            else:
                chosen[field] = found[0].tile
        if into and chosen:
            path = tune_measure.table_path(arch)
            write(path, shape, dtype, chosen, tune_measure.machine())
            console.print(f"wrote {path}; to check: python -m tools.parity --device cuda --strict")
    raise typer.Exit(int(left_without))


if __name__ == "__main__":
    typer.run(main)
