"""Hunts for wrong results: random calls over all that the operator accepts, through PyTorch and through JAX.

    python -m tools.fuzz [--device cpu|cuda] [--seconds S] [--count N] [--seed N] [--only PATTERN] [--jobs N]
    python -m tools.fuzz --repro "K=97 V=64 T=300 B=1 H=4 dtype=bfloat16 seed=3"

Each call is checked against float64 (`tools.fuzz_tolerance`), PyTorch against JAX and against a second run to the bit;
some are run in two parts besides, or with a NaN in one packed sequence, which the others must not notice. On a CPU the
kernels run in Triton's interpreter. Calls run in processes that may die. What fails is shrunk, printed as a line for
--repro and kept in a JSON file. More: docs/fuzz.md.

Exit code 0: none failed; 1: some did, or none ran; 2: bad arguments; 130: interrupted, failures so far are kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from . import fuzz_hunt, fuzz_only, report
from .fuzz_call import Call, read
from .fuzz_check import Outcome
from .fuzz_draw import draw
from .fuzz_pool import Settings, Worker
from .parity import BACKENDS, device_name, fitting, prepare, unavailable
from .parity import Settings as ParitySettings

FAILURES = Path("out/fuzz-failures.json")


def assembler(device: str) -> str:
    """What turns PyTorch's kernels into machine code, in words."""
    if device == "cpu":
        return "none (interpreter)"
    import torch

    from kernels_triton import assembler

    major, minor = torch.cuda.get_device_capability()
    try:
        return str(assembler.choose(10 * major + minor))
    except RuntimeError as error:  # none that may serve: every call will say so
        return f"refused: {error}"


def errors(outcome: Outcome) -> Table:
    """A call's results: each tensor's error against float64."""
    table = Table(title="Relative Frobenius errors against float64", title_justify="left")
    for name in ("tensor", "error", "tolerance", "ratio", "result"):
        table.add_column(name, justify="left" if name == "tensor" else "right")
    for tensor, error, tolerance in outcome.rows:
        good = error <= tolerance
        table.add_row(
            tensor,
            f"{error:.1e}",
            f"{tolerance:.1e}",
            f"{error / tolerance:.2f}",
            "[green]ok[/]" if good else "[red]FAILED[/]",
        )
    return table


def reproduce(call: Call, settings: Settings, console: Console) -> int:
    """Run one call in a process of its own; returns the exit code."""
    worker = Worker(settings)
    try:
        outcome = worker.run(call)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        worker.stop()
    console.print(errors(outcome))
    console.print(f"kernels: {', '.join(outcome.kernels) or '-'}", highlight=False)
    console.print("\n".join(outcome.problems) or "ok", highlight=False, markup=False)
    return 0 if outcome.ok else 1


def main(
    device: str = typer.Option("cpu", help="cpu: Triton's interpreter. cuda: a GPU, through both frameworks."),
    seconds: float | None = typer.Option(None, min=1, help="Time to stop at; 60 if neither this nor --count is given."),
    count: int | None = typer.Option(None, min=1, help="How many calls."),
    seed: int = typer.Option(0, min=0, help="Of the calls that are drawn."),
    only: str = typer.Option("", help="Which calls, as dtype=bfloat16,V=97..512,odd (docs/fuzz.md)."),
    jobs: int = typer.Option(2, min=1, help="Processes side by side, on a GPU too: they compile."),
    group: int = typer.Option(5, min=1, help="Calls that share what is compiled."),
    limit: float = typer.Option(400.0, min=1, help="Seconds that one call may take, what it compiles included."),
    shrink: float = typer.Option(60.0, min=0, help="Seconds to shrink a failure of a new kind; 0: not."),
    json_path: Path = typer.Option(FAILURES, "--json", help="Where failures are kept."),
    repro: str | None = typer.Option(None, help="Run this one call: a line that a hunt printed."),
) -> None:
    """Check random calls through both frameworks against float64, bit for bit and run after run."""
    if device not in BACKENDS:
        raise typer.BadParameter(f"expected one of {', '.join(BACKENDS)}, got {device}", param_hint="--device")
    try:
        pattern = fuzz_only.parse(only)
        call = None if repro is None else read(repro)
        next(draw(seed, group, device, pattern))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    prepare(device)
    console = Console(width=None if sys.stdout.isatty() else 170)
    reason = unavailable(ParitySettings(device))
    if reason:
        console.print(f"nothing can run: {reason}")
        raise typer.Exit(1)
    jobs = fitting(jobs, device)
    settings = Settings(device, limit, max(1, (os.cpu_count() or 1) // jobs))
    facts = {"device": device_name(device), "assembler": assembler(device), "seed": str(seed), **report.versions()}
    report.show(console, facts)
    if call is not None:
        raise typer.Exit(reproduce(call, settings, console))
    if seconds is None and count is None:
        seconds = 60.0
    result = fuzz_hunt.hunt(
        draw(seed, group, device, pattern), settings, jobs, fuzz_hunt.Limits(count, seconds, shrink)
    )
    fuzz_hunt.write_json(json_path, result, facts | {"only": only})
    for failure in result.failures:
        console.print(f'python -m tools.fuzz --device {device} --repro "{failure.smallest.line}"', soft_wrap=True)
        console.print(f"    {'; '.join(failure.smallest.problems)}", highlight=False, markup=False, soft_wrap=True)
    report.show(console, facts)
    console.print("\n".join(fuzz_hunt.summary(result)), highlight=False, markup=False, soft_wrap=True)
    if result.failures:
        console.print(f"failures: {json_path}", highlight=False)
    if result.interrupted:
        raise typer.Exit(130)
    if result.failed or not result.outcomes:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
