"""Holds the PyTorch and the JAX frontend against each other, to the bit, and both against float64, over a case table.

    python -m tools.parity [--device cpu|cuda] [--cases GLOB ...] [--strict] [--verbose] [--json PATH] [--seed N]

On a CPU the kernels run in Triton's interpreter; on a GPU they are compiled and launched from both frameworks in one
process. Exit code 1 if any bit differs between the frameworks, an error against float64 exceeds its tolerance, nothing
could run, or, with --strict, anything was skipped; 2 for bad arguments; 130 if interrupted.

    python -m tools.parity --target package.module:function --framework torch|jax

holds another implementation of the operator against float64 instead. It is called with the public operator's argument
names; options that its signature does not name are left out, and cases that need them are listed as not applicable.
Its results are held against the truth of both gradient modes, so that the table shows which one it implements. With
--whole N every length is raised to a multiple of N and of the chunk size, for one that takes whole chunks alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from tqdm import tqdm

from . import compare, report  # neither imports triton or jax before the environment below is set
from .cases import CASES, Case, make_inputs, select
from .report import Result

MODES = ("exact", "detached")
BACKENDS = {"cpu": "interpret", "cuda": "triton"}
PROCESS_BYTES = 5 * 2**30  # of a GPU's memory that one process, with both frameworks in it, may come to hold
RERUNS = {"cpu": 0, "cuda": 5}  # of each case through torch: a race shows as bits that move (tests rerun on a CPU)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cases of a run have in common; goes to worker processes."""

    device: str = "cpu"
    seed: int = 0
    target: str | None = None
    framework: str = "torch"

    @property
    def columns(self) -> tuple[str, ...]:
        return MODES if self.target else ("torch", "jax")


def prepare(device: str) -> None:
    """Set what Triton and JAX read when they are imported."""
    if device == "cpu":
        os.environ.update(TRITON_INTERPRET="1", JAX_PLATFORMS="cpu")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch and other cases need memory there too,
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # and get back what JAX is done with
        os.environ.setdefault("MLSTM_DESCRIPTORS", "1")  # in PyTorch for short cases too: JAX has pointers alone


def check_case(case: Case, *, backend: str = "interpret", device: str = "cpu", seed: int = 0) -> Result:
    """Run a case through both frontends and the float64 truth. The environment must suit the backend (`prepare`)."""
    start = time.perf_counter()
    arrays = make_inputs(case, seed)
    options = case.options() | {"backend": backend}
    results = {
        framework: run(compare.frontend(framework, case.form), options, case, arrays, device)
        for framework, run in compare.RUN.items()
    }
    truth = compare.truth(case, arrays, device)
    rows = compare.compare(case, results, truth, compare.tolerances(case, arrays, truth, device))
    moved: set[str] = set()
    for _ in range(RERUNS[device]):
        again = compare.run_torch(compare.frontend("torch", case.form), options, case, arrays, device)
        moved |= {name for name, x in again.items() if not compare.identical(x, results["torch"][name])}
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # for the cases beside it
    note = f"other bits in another run: {', '.join(sorted(moved))}" if moved else ""
    status = "ok" if all(row.ok for row in rows) and not moved else "FAILED"
    return Result(case, status, tuple(rows), note, time.perf_counter() - start)


def load(target: str) -> Callable[..., Any]:
    """The function that "package.module:function" names."""
    module, separator, name = target.partition(":")
    if not (module and separator and name):
        raise ValueError(f"target: expected package.module:function, got {target!r}")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target: expected an importable function, got {target!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"target: expected a function, got {target!r}, a {type(function).__name__}")
    return function


def check_target(
    case: Case, function: Callable[..., Any], framework: str = "torch", *, device: str = "cpu", seed: int = 0
) -> Result:
    """Run a case through another implementation, against the float64 truth of both gradient modes."""
    start = time.perf_counter()
    options, missing = compare.accepted_options(function, case)
    if missing:
        return Result(case, "not applicable", note=f"lacks {', '.join(missing)}")
    arrays = make_inputs(case, seed)
    got = compare.RUN[framework](function, options, case, arrays, device)
    truths, tolerances = {}, {}
    for mode in MODES:
        of_mode = dataclasses.replace(case, normalizer_grad=mode)
        truths[mode] = compare.truth(of_mode, arrays, device)
        tolerances[mode] = compare.tolerances(of_mode, arrays, truths[mode], device)
    rows = []
    for name, x in got.items():
        errors = {mode: compare.frobenius_error(x, truths[mode][name]) for mode in MODES}
        tolerance = max(tolerances[mode][name] for mode in MODES)
        rows.append(compare.Row(case.name, name, x.dtype.name, errors, tolerance))
    off = {mode: [row.tensor for row in rows if not row.within(mode)] for mode in MODES}
    fewest = min(len(names) for names in off.values())
    nearest = [mode for mode in MODES if len(off[mode]) == fewest]
    note = f"{' and '.join(nearest)} gradients" if "dq" in got else "values only"
    if fewest:
        note += f"; over tolerance: {', '.join(off[nearest[0]])}"
    return Result(case, "FAILED" if fewest else "ok", tuple(rows), note, time.perf_counter() - start)


def unavailable(settings: Settings) -> str | None:
    """Why nothing can run with these settings, or None."""
    frameworks = (settings.framework,) if settings.target else ("torch", "jax")
    for name in frameworks:
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if settings.target is None and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if settings.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if "jax" in frameworks:
            import jax

            try:
                jax.devices("gpu")
            except RuntimeError:
                return "JAX finds no CUDA device"
    return None


def work(case: Case, settings: Settings) -> Result:
    """One case, whatever happens: an exception is a failure to report with the others."""
    device, seed = settings.device, settings.seed
    try:
        if settings.target:
            return check_target(case, load(settings.target), settings.framework, device=device, seed=seed)
        return check_case(case, backend=BACKENDS[device], device=device, seed=seed)
    except Exception as error:
        text = " ".join(str(error).split())
        return Result(case, "FAILED", note=f"{type(error).__name__}: {text[:300]}")


def _worker_starts(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    import torch

    torch.set_num_threads(threads)


def _in_processes(cases: list[Case], settings: Settings, jobs: int) -> Iterator[Result]:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_worker_starts, initargs=(threads,))
    try:
        futures = {pool.submit(work, case, settings): case for case in cases}
        for future in as_completed(futures):
            error = future.exception()  # of a worker that died
            yield future.result() if error is None else Result(futures[future], "FAILED", note=str(error))
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def check_all(cases: list[Case], settings: Settings, jobs: int) -> list[Result]:
    """All cases, in their order, with a progress bar. Cases that cannot run here are skipped, with the reason."""
    reason = unavailable(settings)
    results: dict[str, Result] = {}
    for case in cases:
        why = reason or ("needs --device cuda" if case.gpu and settings.device == "cpu" else None)
        if why:
            results[case.name] = Result(case, "skipped", note=why)
    todo = [case for case in cases if case.name not in results]
    # Always in processes: compiling or interpreting, each case is worth a core, and Ctrl-C cannot wait for either.
    done = _in_processes(todo, settings, jobs)
    for result in tqdm(done, total=len(todo), desc="parity", unit="case", disable=None if todo else True):
        results[result.case.name] = result
    return [results[case.name] for case in cases]


def whole(case: Case, multiple: int) -> Case:
    """The case with its length raised to a multiple of that and of its chunk size."""
    step = math.lcm(multiple, case.chunk_size or 1)
    return dataclasses.replace(case, T=-(-case.T // step) * step)


def fitting(jobs: int, device: str) -> int:
    """As many of those processes as a GPU has memory for."""
    if device != "cuda":
        return jobs
    import torch

    return max(1, min(jobs, torch.cuda.get_device_properties(0).total_memory // PROCESS_BYTES))


def device_name(device: str) -> str:
    """What the run computes on, in words."""
    if device == "cpu":
        return f"CPU ({os.cpu_count()} cores)"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"


def main(
    device: str = typer.Option("cpu", help="cpu: Triton's interpreter. cuda: a GPU, through both frameworks."),
    cases: list[str] = typer.Option([], help="Glob patterns of case names; by default all that suit the device."),
    strict: bool = typer.Option(False, "--strict", help="Skipped cases count as failures."),
    verbose: bool = typer.Option(False, "--verbose", help="A line per tensor, not per case."),
    json_path: Path | None = typer.Option(None, "--json", help="Write all results there."),
    seed: int = typer.Option(0, min=0, help="Of the random inputs."),
    jobs: int = typer.Option(2, min=1, help="Processes side by side, on a GPU too: they compile."),
    target: str | None = typer.Option(None, help="Another implementation, package.module:function."),
    framework: str = typer.Option("torch", help="Of the target: torch or jax."),
    whole_chunks: int = typer.Option(1, "--whole", min=1, help="With --target: lengths to a multiple of this."),
    list_cases: bool = typer.Option(False, "--list", help="Print the cases' names and stop."),
) -> None:
    """Compare the frontends bit for bit over the case table, or another implementation with float64."""
    if list_cases:
        print("\n".join(case.name for case in CASES))
        return
    for name, value, allowed in (("device", device, tuple(BACKENDS)), ("framework", framework, ("torch", "jax"))):
        if value not in allowed:
            raise typer.BadParameter(f"expected one of {', '.join(allowed)}, got {value}", param_hint=f"--{name}")
    prepare(device)
    settings = Settings(device, seed, target, framework)
    try:
        selected = select(cases, cuda=device == "cuda")
        if target:
            load(target)
            selected = [whole(case, whole_chunks) for case in selected]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    what = {"target": f"{target} ({framework})"} if target else {"backend": BACKENDS[device]}
    facts = {**what, "device": device_name(device), "seed": str(seed), **report.versions()}
    console = Console(width=None if sys.stdout.isatty() else 170)
    report.show(console, facts)
    start = time.perf_counter()
    try:
        results = check_all(selected, settings, fitting(jobs, device) if unavailable(settings) is None else jobs)
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    title = "Relative Frobenius errors against float64" + (
        f": {target}, held against both gradient modes" if target else ", and PyTorch against JAX"
    )
    console.print(report.table(results, verbose, title, settings.columns))
    console.print(f"{report.summary(results)}; {time.perf_counter() - start:.0f} s", highlight=False)
    if json_path:
        report.write_json(json_path, results, facts)
    statuses = {result.status for result in results}
    ran = bool(statuses & {"ok", "FAILED"})
    if "FAILED" in statuses or not ran or (strict and statuses != {"ok"}):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
