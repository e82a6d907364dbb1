"""Runs every kernel under NVIDIA's compute-sanitizer: memcheck, and racecheck for a part of the shapes.

    python -m tools.sanitize [--tool memcheck|racecheck|both] [--jobs N] [--shapes PATTERN ...] [--json PATH]

Triton's cache is filled first, by plain runs of the same shapes: to compile under the sanitizer takes minutes. Then
each shape is a process of its own under the sanitizer, without PyTorch's caching of memory, so that every tensor has
the bounds of its own allocation. Each checks too that results are finite, the same in two runs, and of the kernels
that the shape is there for.

Exit code 1 if the sanitizer found an error or a process failed; 2 for bad arguments; 130 if interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .sanitize_shapes import BY_NAME, Shape, select

TOOLS = ("memcheck", "racecheck")
ROOT = Path(__file__).parents[1]
RESULT = "RESULT "  # how a child's lines begin (sanitize_child.py, which this process does not import: it wants a GPU)
ERRORS_FOUND = 99  # the sanitizer's exit code for errors, which no other failure has
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) errors?"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)"),
}


@dataclass(frozen=True)
class Done:
    """How a process ended. code: None if it took too long."""

    code: int | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a tool found in one shape. errors: None if it did not come to say."""

    shape: str
    tool: str
    kernels: tuple[str, ...]
    errors: int | None
    seconds: float
    warnings: int = 0  # of racecheck: not failures, but shown
    note: str = ""  # why the run failed, if not by the sanitizer's errors

    @property
    def ok(self) -> bool:
        return self.errors == 0 and not self.note


class Processes:
    """Processes side by side, each in a group of its own, which can be ended together."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._lock = threading.RLock()  # of a signal handler too, wherever the main thread is
        self._stopped = False

    def run(self, command: Sequence[str], timeout: float) -> Done:
        """The process's end and its output, stdout and stderr together."""
        start = time.perf_counter()
        with self._lock:
            if self._stopped:
                return Done(None, "", 0.0)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process.pid)
        code: int | None = None
        try:
            output, _ = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            self._kill(process.pid)
            output, _ = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process.pid)
        return Done(code, output, time.perf_counter() - start)

    def stop(self) -> None:
        """End all that run, and start no more."""
        with self._lock:
            self._stopped = True
            for pid in self._running:
                self._kill(pid)

    def stop_on_interrupt(self) -> None:
        """Have Ctrl-C end all first, wherever it comes: what waits for them would wait until they end by themselves."""

        def interrupted(*_: Any) -> None:
            self.stop()
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupted)

    @staticmethod
    def _kill(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def find_sanitizer() -> str:
    """The path of compute-sanitizer. Raises ValueError where there is none."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
    if not found:
        raise ValueError(f"compute-sanitizer: expected it on PATH or in CUDA_HOME/bin ({home}/bin), found none")
    return found


def child(names: Sequence[str]) -> list[str]:
    """The command of a process that runs these shapes."""
    return [sys.executable, "-m", "tools.sanitize_child", *names]


def sanitized(sanitizer: str, tool: str, name: str) -> list[str]:
    """The command of one shape under the sanitizer."""
    options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "5"]
    return [sanitizer, *options, *child([name])]


def told(output: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """What children said of their shapes: the kernels that ran, and what was wrong."""
    lines = (line[len(RESULT) :] for line in output.splitlines() if line.startswith(RESULT))
    return {x["shape"]: (tuple(x["kernels"]), x["error"]) for x in map(json.loads, lines)}


def _reason(done: Done) -> str:
    """Why a process that did not say so failed: its last words."""
    lines = [x.strip() for x in done.output.splitlines() if x.strip(" =")]
    return f"exit code {done.code}: {lines[-1][:200] if lines else 'no output'}"


def judge(shape: Shape, tool: str, done: Done, timeout: float) -> Result:
    """The result of a shape's process under the sanitizer."""
    found = SUMMARY[tool].findall(done.output)
    counts = [tuple(map(int, x)) if isinstance(x, tuple) else (int(x), 0) for x in found]
    errors = sum(x for x, _ in counts) if counts else None
    warnings = sum(x for _, x in counts)
    kernels, wrong = told(done.output).get(shape.name, ((), ""))
    if done.code is None:
        note = f"expected an end within {timeout:.0f} s, got none"
    elif wrong:
        note = wrong
    elif errors is None:
        note = f"expected the sanitizer's summary, got none; {_reason(done)}"
    elif not kernels:
        note = f"expected the shape's result, got none; {_reason(done)}"
    elif done.code not in (0, ERRORS_FOUND):
        note = _reason(done)
    else:
        note = ""
    return Result(shape.name, tool, kernels, errors, done.seconds, warnings, note)


def fill_cache(processes: Processes, names: Sequence[str], jobs: int, timeout: float) -> dict[str, str]:
    """Run the shapes plainly, several in a process. Returns what failed, which the sanitizer has the last word on."""
    jobs = min(jobs, len(names))
    with ThreadPoolExecutor(jobs) as pool:
        parts = [names[n::jobs] for n in range(jobs)]
        ends = list(pool.map(lambda part: processes.run(child(part), timeout * len(part)), parts))
        said = {name: error for end in ends for name, (_, error) in told(end.output).items()}
        # A process whose GPU failed on one shape fails on those after it: each of these again, by itself.
        again = [name for name in names if said.get(name, "no result")]
        ends = list(pool.map(lambda name: processes.run(child([name]), timeout), again))
    failed = {}
    for name, end in zip(again, ends, strict=True):
        _, error = told(end.output).get(name, ((), _reason(end)))
        if error:
            failed[name] = error
    return failed


def _sanitize(
    processes: Processes, sanitizer: str, work: Sequence[tuple[Shape, str]], jobs: int, timeout: float
) -> Iterator[Result]:
    """A result for each shape and tool, as they come."""

    def one(shape: Shape, tool: str) -> Result:
        return judge(shape, tool, processes.run(sanitized(sanitizer, tool, shape.name), timeout), timeout)

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one, shape, tool) for shape, tool in work]):
            yield future.result()


def plan_work(shapes: Sequence[Shape], tool: str, all_shapes: bool) -> list[tuple[Shape, str]]:
    """Which tools see which shapes. racecheck, the slower one, sees a part of the sweep unless shapes are named."""
    tools = TOOLS if tool == "both" else (tool,)
    return [(x, y) for y in reversed(tools) for x in shapes if y == "memcheck" or x.race or all_shapes]


def table(results: Sequence[Result]) -> Table:
    """A line for each shape and tool."""
    out = Table(title="Errors that compute-sanitizer found", title_justify="left")
    for name in ("shape", "kernels", "tool", "errors", "seconds", "note"):
        out.add_column(name, justify="right" if name in ("errors", "seconds") else "left")
    for x in results:
        errors = "-" if x.errors is None else str(x.errors)
        note = x.note or (f"{x.warnings} warnings" if x.warnings else "")
        style = "" if x.ok else "bold red"
        out.add_row(x.shape, ", ".join(x.kernels), x.tool, errors, f"{x.seconds:.0f}", Text(note), style=style)
    return out


def write_json(path: Path, results: Sequence[Result], facts: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"facts": facts, "results": [dataclasses.asdict(x) for x in results]}, indent=1) + "\n")


def main(
    tool: str = typer.Option("both", help="memcheck, racecheck or both."),
    jobs: int = typer.Option(8, min=1, help="Processes under the sanitizer side by side."),
    shapes: list[str] = typer.Option([], help="Glob patterns of shapes' names; by default the whole sweep."),
    timeout: float = typer.Option(240, min=1, help="Seconds that one shape may take."),
    json_path: Path | None = typer.Option(None, "--json", help="Write all results there."),
    list_shapes: bool = typer.Option(False, "--list", help="Print the shapes' names and stop."),
    count: bool = typer.Option(False, "--count", help="Print how many processes that is, by tool, and stop."),
) -> None:
    """Run every kernel under compute-sanitizer."""
    if tool not in (*TOOLS, "both"):
        raise typer.BadParameter(f"expected memcheck, racecheck or both, got {tool}", param_hint="--tool")
    try:
        selected = select(shapes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from error
    work = plan_work(selected, tool, all_shapes=bool(shapes))
    if list_shapes:
        print("\n".join(x.name for x in selected))
        return
    if count:
        print("\n".join(f"{x}: {sum(y == x for _, y in work)}" for x in TOOLS))
        return
    try:
        sanitizer = find_sanitizer()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    names = list(dict.fromkeys(shape.name for shape, _ in work))
    console = Console(width=None if sys.stdout.isatty() else 200)
    processes, start = Processes(), time.perf_counter()
    processes.stop_on_interrupt()
    try:
        console.print(f"filling Triton's cache for {len(names)} shapes", highlight=False)
        failed = fill_cache(processes, names, max(jobs, os.cpu_count() or 1), timeout)
        for name, why in failed.items():
            console.print(f"{name}: a plain run failed: {why}", style="red", highlight=False, markup=False)
        filled = time.perf_counter() - start
        done = _sanitize(processes, sanitizer, work, jobs, timeout)
        results = list(tqdm(done, total=len(work), desc="sanitize", unit="shape"))
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    order = {name: n for n, name in enumerate(BY_NAME)}
    results.sort(key=lambda x: (x.tool, order[x.shape]))
    console.print(table(results))
    bad = [x for x in results if not x.ok]
    errors = sum(x.errors or 0 for x in results)
    seconds = time.perf_counter() - start
    ran = sorted({name for x in results for name in x.kernels})
    console.print(
        f"{len(results)} runs of {len(names)} shapes, {len(ran)} kernels: {errors} errors, {len(bad)} runs failed; "
        f"{seconds:.0f} s, of which {filled:.0f} s to fill Triton's cache",
        highlight=False,
    )
    if json_path:
        write_json(json_path, results, {"sanitizer": sanitizer, "tool": tool, "seconds": f"{seconds:.0f}"})
    if bad or not results:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
