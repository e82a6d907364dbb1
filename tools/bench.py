"""Times the operator against its peers, side by side on one machine, with memory, launches and hardware floors.

    python -m tools.bench [--quick] [--shapes GLOB ...] [--implementations GLOB ...] [--json PATH]
    python -m tools.bench --heads --shapes 'heads-*' --passes fw --passes fw+bw      odd head dims beside even ones
    python -m tools.bench --compare old.json       ratio per row; exit code 1 if one of ours got slower
    python -m tools.bench --plot old.json          the pictures from a file; needs no GPU

All implementations of a pass over a shape take turns, round after round, under one stop-watch (bench_measure.py).
Times are medians over rounds, of the host's clock around n calls and one wait for the device. "x floor" is the ratio
to the larger of two lower bounds (bench_floors.py), from rates measured in the same run. "fw" builds no graph, "fw+bw"
starts from inputs alone; "bw" is measured in torch on a kept graph, and for JAX is the difference of the other two.
Peak memory includes inputs, outputs and gradients of one call. What cannot run is listed with the reason.

In torch gradients are computed on the caller's thread. By default autograd hands each backward call to a thread of its
own and back, once for a whole model, which no implementation can do anything about: --engine-thread measures it too.

On a machine without a GPU the reference backends run on small shapes: a trial of the tool, no benchmark. Exit code 1
if one of ours failed or regressed or nothing ran, 2 for bad arguments, 130 if interrupted (what was measured is
written).
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from tqdm import tqdm

from . import bench_cases, bench_report
from .bench_cases import Job
from .bench_report import Report

if TYPE_CHECKING:
    from .bench_measure import Settings

DEVICES = ("auto", "cpu", "cuda")


def prepare(device: str) -> str:
    """Choose the device and set what Triton and JAX read when they are imported."""
    # One GPU only: JAX makes another one current. To be set before PyTorch counts them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory of the same GPU
    return device


def device_name(device: str) -> str:
    """What the run computes on, in words."""
    if device == "cpu":
        return f"CPU ({os.cpu_count()} cores), a trial of the tool"
    import torch

    return torch.cuda.get_device_name()


def measure(jobs: list[Job], settings: Settings, report: Report, save: Callable[[], None]) -> None:
    """Run all jobs, adding to the report as they end, and saving it: a crash in a compiler or driver ends Python."""
    import dataclasses

    import torch

    from . import bench_measure, bench_probe

    torch.autograd.set_multithreading_enabled(settings.engine_thread)
    if settings.device == "cpu":
        torch.set_num_threads(1)  # a trial: busy neighbours would stall threads that wait for each other
    dtypes = list(dict.fromkeys(job.dtype for job in jobs))
    rates = bench_measure.ceilings(dtypes, settings.device)
    report.ceilings.update(dataclasses.asdict(rates))
    dead = bench_probe.probe_all(jobs) if settings.device == "cuda" else {}
    counted = []
    gc.freeze()  # what the imports made need not be searched after every job
    with tqdm(total=len(jobs), desc="bench", unit="job", disable=None) as bar:
        for job in jobs:
            bar.set_postfix_str(f"{job.shape.name} {job.dtype.name} {job.pass_}")
            entries = bench_measure.run_job(job, settings, dead)
            report.rows += bench_measure.rows_of(job, entries, rates, report.rows)
            if settings.device == "cuda" and job.shape.count_launches and job.pass_ != "bw":
                counted.append((job, entries))
            save()
            bar.update()
    counts = bench_measure.count_launches(counted, settings.device)
    report.rows[:] = [
        dataclasses.replace(row, launches=counts.get((row.shape, row.dtype, row.pass_, row.implementation)))
        for row in report.rows
    ]


def judge(report: Report, compare: Path | None, allowed: float, console: Console) -> int:
    """The exit code, after the comparison with an older run if there is one."""
    failed = any(row.ours and row.status == "failed" for row in report.rows)
    ran = any(row.status == "ok" for row in report.rows)
    regressed = False
    if compare:
        old = bench_report.read(compare)
        found = bench_report.changes(report, old, allowed)
        bench_report.show_changes(console, found, report, old)
        regressed = any(change.regressed for change in found)
    return int(failed or regressed or not ran)


def draw(report: Report, folder: Path, console: Console) -> None:
    """All pictures that the report has rows for."""
    from . import bench_plot

    for path in bench_plot.draw_all(report, folder):
        console.print(f"wrote {path}", highlight=False)


def main(
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    shapes: list[str] = typer.Option([], help="Glob patterns of shape names."),
    dtypes: list[str] = typer.Option([], help="Glob patterns; by default bfloat16. Others run on a few shapes."),
    passes: list[str] = typer.Option([], help="Glob patterns of fw, fw+bw, bw."),
    implementations: list[str] = typer.Option([], help="Glob patterns of implementations' names."),
    rounds: int | None = typer.Option(None, min=1, help="Per pass and shape; by default 7, with --quick 3."),
    quick: bool = typer.Option(False, "--quick", help="Few small shapes, short rounds."),
    sweep: bool | None = typer.Option(None, "--sweep/--no-sweep", help="Lengths at a constant number of tokens."),
    scaling: bool | None = typer.Option(None, "--scaling/--no-scaling", help="Lengths of one sequence, to 1M tokens."),
    heads: bool = typer.Option(False, "--heads", help="Odd head dims beside even ones; ours alone."),
    engine_thread: bool = typer.Option(False, "--engine-thread", help="Gradients on autograd's own thread."),
    json_path: Path = typer.Option(Path("out/bench.json"), "--json", help="Results; pictures go beside it."),
    plot: Path | None = typer.Option(None, help="Take the results from this file instead of measuring."),
    compare: Path | None = typer.Option(None, help="An older run to hold the results against."),
    allowed: float = typer.Option(5.0, "--threshold", min=0.0, help="Percent slower that is no regression."),
    list_all: bool = typer.Option(False, "--list", help="Print the names of shapes and implementations and stop."),
) -> None:
    """Time the operator and its peers."""
    start = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        if compare:
            bench_report.read(compare)  # before minutes of work
        if plot:
            report = bench_report.read(plot)
            bench_report.show(console, report)
            draw(report, json_path.parent, console)
            raise typer.Exit(judge(report, compare, allowed / 100, console))
        if device not in DEVICES:
            raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
        if importlib.util.find_spec("torch") is None:
            raise ValueError("torch is not installed")
        device = prepare(device)
        tables = {
            name: (device == "cuda" and not quick) if given is None else given
            for name, given in (("sweep", sweep), ("scaling", scaling))
        }
        tables["heads"] = heads
        jobs = bench_cases.plan(
            device,
            shapes=shapes,
            dtypes=dtypes,
            passes=passes,
            implementations=implementations,
            quick=quick,
            **tables,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if list_all:
        names = (shape.name for shape in bench_cases.shapes_of(device, **tables))
        print("shapes:", *names, "\nimplementations:", *(f"\n  {x.name}" for x in bench_cases.IMPLEMENTATIONS))
        return
    from .bench_measure import Settings

    settings = Settings(device, rounds or (3 if quick else 7), 0.005 if quick else 0.03, engine_thread)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    report = Report(bench_report.facts(device, device_name(device), date))
    report.facts["autograd"] = "on its own thread" if engine_thread else "on the caller's thread"
    console.print(", ".join(f"{name} {value}" for name, value in report.facts.items()), highlight=False)
    code = 0
    try:
        measure(jobs, settings, report, lambda: bench_report.write(json_path, report))
        report.complete = True
    except KeyboardInterrupt:
        console.print("interrupted")
        code = 130
    finally:  # minutes of results outlive whatever ended the run
        report.seconds = time.perf_counter() - start
        bench_report.write(json_path, report)
    bench_report.show(console, report)
    if not code:
        draw(report, json_path.parent, console)
        code = judge(report, compare, allowed / 100, console)
    warm_ups: Counter[str] = Counter()
    for row in report.rows:
        warm_ups[row.implementation] += round(row.warm_up_s)
    most = ", ".join(f"{name} {seconds} s" for name, seconds in warm_ups.most_common(4) if seconds)
    console.print(f"compiling took {warm_ups.total()} s, most of it: {most or 'none'}", highlight=False)
    console.print(f"{len(report.rows)} rows in {report.seconds:.0f} s; wrote {json_path}", highlight=False)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
