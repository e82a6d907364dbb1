"""Runs both frameworks on several devices of one machine: equality with one device, scaling, and what is exchanged.

    python -m tools.multi_gpu_check [--device cpu|cuda] [--devices 2] [--frameworks torch ...] [--json PATH]

A sequence split over its tokens (mlstm_context_parallel) is held against one device and against float64, batch and
heads split over devices against the bits of one device. Times are of one call, by the host's clock, "fw+bw" from inputs
to gradients. Bytes are what one device hands to the gathering of each pass, as counted at the collective (PyTorch) and
in the compiled program (JAX). On a CPU the kernels run interpreted, through gloo and on JAX's host devices: a trial.

Exit code 1 if something is not equal or a process failed, 2 for bad arguments, 130 if interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from . import report
from .parity import BACKENDS, device_name

FRAMEWORKS = ("torch", "jax")
Parts = dict[str, list[dict[str, Any]]]


def environment(device: str, devices: int) -> dict[str, str]:
    """What Triton, JAX and XLA read when they are imported."""
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        env |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return env


def _start(framework: str, rank: int, device: str, devices: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tools.multi_gpu_worker", framework, str(rank), str(devices), device]
    command += [str(folder / "store"), str(folder / "out.json")]
    with open(folder / f"log{rank}", "wb") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the others.
        return subprocess.Popen(
            command, env=environment(device, devices), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(framework: str, device: str, devices: int, timeout: float) -> tuple[Parts, str]:
    """The results of a framework's processes, and what went wrong ("" if nothing). One that fails ends all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes: list[subprocess.Popen[bytes]] = []
        problem, deadline = "", time.monotonic() + timeout
        try:
            for rank in range(devices if framework == "torch" else 1):
                processes.append(_start(framework, rank, device, devices, folder))
            while any(process.poll() is None for process in processes) and not problem:
                time.sleep(0.2)
                failed = [rank for rank, process in enumerate(processes) if process.poll()]
                if not failed and time.monotonic() > deadline:
                    problem = f"{framework}: expected an end within {timeout:.0f} s, got none"
                if failed:
                    problem = f"{framework}: process {failed[0]} ended with code {processes[failed[0]].returncode}"
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
        finally:
            _stop(processes)
        if problem or failed:
            rank = failed[0] if failed else 0
            problem = problem or f"{framework}: process {rank} ended with code {processes[rank].returncode}"
            problem += "\n" + (folder / f"log{rank}").read_text(errors="replace")[-3000:]
        out = folder / "out.json"
        return (json.loads(out.read_text()) if out.exists() else {}), problem


def _cell(value: float) -> str:
    return f"{value:.1e}"


def equality_table(found: dict[str, Parts]) -> Table:
    rows = [(framework, row) for framework, parts in found.items() for row in parts.get("equality", [])]
    names = list(rows[0][1]["errors"]["float64"]) if rows else []
    table = Table(
        "framework", "case", "errors of, against", *names, "result", title="A sequence split over tokens", width=None
    )
    labels = {
        "one device": "split, one device",
        "float64": "split, float64",
        "one device, float64": "one device, float64",
    }
    for framework, row in rows:
        for kind, label in labels.items():
            result = "" if kind != "float64" else "ok" if row["good"] else "[red]FAILED[/]"
            cells = [_cell(row["errors"][kind][name]) for name in names]
            table.add_row(framework, row["case"] if kind == "one device" else "", label, *cells, result)
    return table


def bits_table(found: dict[str, Parts]) -> Table:
    table = Table("framework", "split over", "case", "bits", title="Batch and heads split, against one device")
    for framework, parts in found.items():
        for row in parts.get("bits", []):
            table.add_row(framework, row["split"], row["case"], "same" if row["same"] else "[red]DIFFERENT[/]")
    return table


def scaling_table(found: dict[str, Parts], devices: int) -> Table:
    table = Table(title="Milliseconds per call")
    for name in ("framework", "split over", "B, H, T, K, V", "pass", "1 device", f"{devices} devices", "ratio"):
        table.add_column(name, justify="right" if name in ("1 device", f"{devices} devices", "ratio") else "left")
    for framework, parts in found.items():
        for row in parts.get("scaling", []):
            shape = ", ".join(map(str, row["shape"]))
            times = (f"{row[name]:.2f}" for name in ("one", "many", "ratio"))
            table.add_row(framework, row["split"], shape, row["pass"], *times)
    return table


def bytes_table(found: dict[str, Parts]) -> Table:
    table = Table(title="Bytes that one device hands to the others")
    for name in ("framework", "pass", "tokens per device", "4 B H (K V + K + 2 or 3)", "measured"):
        table.add_column(name, justify="left" if name in ("framework", "pass") else "right")
    for framework, parts in found.items():
        for row in parts.get("bytes", []):
            table.add_row(framework, row["pass"], *(f"{row[x]:,}" for x in ("tokens", "formula", "measured")))
    return table


def all_good(found: dict[str, Parts]) -> bool:
    """Whether everything that must be equal is, and is there."""
    for parts in found.values():
        rows = [(row, "good") for row in parts.get("equality", [])] + [(row, "same") for row in parts.get("bits", [])]
        exact = [row["formula"] == row["measured"] for row in parts.get("bytes", [])]
        if not rows or not exact or not all(row[name] for row, name in rows) or not all(exact):
            return False
    return bool(found)


def main(
    device: str = typer.Option("cpu", help="cpu: Triton's interpreter, tiny shapes. cuda: GPUs, with NCCL."),
    devices: int = typer.Option(2, min=2, help="How many."),
    frameworks: list[str] = typer.Option(list(FRAMEWORKS), help="torch, jax."),
    timeout: float = typer.Option(400.0, min=1.0, help="Seconds for each framework's processes."),
    json_path: Path | None = typer.Option(None, "--json", help="Write all rows there."),
) -> None:
    """Split sequences, batch and heads over devices: equality, scaling and what is exchanged."""
    if device not in BACKENDS:
        raise typer.BadParameter(f"expected one of {', '.join(BACKENDS)}, got {device}", param_hint="--device")
    for name in frameworks:
        if name not in FRAMEWORKS:
            raise typer.BadParameter(f"expected one of {', '.join(FRAMEWORKS)}, got {name}", param_hint="--frameworks")
    if device == "cuda":
        import torch

        if (count := torch.cuda.device_count()) < devices:
            raise typer.BadParameter(f"expected {devices} GPUs, got {count}", param_hint="--devices")
    console = Console(width=None if sys.stdout.isatty() else 190)
    facts = {"device": f"{devices} x {device_name(device)}", **report.versions()}
    report.show(console, facts)
    found: dict[str, Parts] = {}
    problems = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leaves no process behind
    try:
        for name in frameworks:
            found[name], problem = run(name, device, devices, timeout)
            problems += [problem] if problem else []
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    for table in (equality_table(found), bits_table(found), scaling_table(found, devices), bytes_table(found)):
        console.print(table)
    for problem in problems:
        console.print(problem, style="red", markup=False)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({**facts, "problems": problems, "results": found}, indent=1) + "\n")
    if problems or not all_good(found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
