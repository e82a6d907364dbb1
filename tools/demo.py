"""Trains one small language model in PyTorch and in JAX, and compares the kernels on its activations.

    python -m tools.demo [--steps N] [--device auto|cpu|cuda] [--out DIR]

Both start from the same weights and read the same text, the source of Python's standard library, byte by byte. The
trained model's last mLSTM layer then gives real activations, gates, states and cotangents, on which the Triton kernels
of both frontends are held against each other, to the bit, and against float64: in Triton's interpreter on a CPU,
compiled on a GPU. Writes parity.json and parity.png. Exit code 1 if any bit differs between the frontends or an error
exceeds its tolerance; 2 for bad arguments, or if there is no text; 130 if interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

# What imports torch or jax is imported later: choose_device sets what they read when they are imported.
from . import demo_train
from .cases import Arrays, Case
from .demo_model import Config, Params, initial_weights

if TYPE_CHECKING:
    from .compare import Row
    from .report import Result

SEGMENT = 128  # tokens of the comparison


def choose_device(wanted: str) -> str:
    """The device, "cpu" or "cuda", that both frameworks can use, with the environment set for it."""
    # Two thread pools share the cores: one that waits must not spin. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .parity import Settings, prepare, unavailable

    if wanted not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"expected auto, cpu or cuda, got {wanted}", param_hint="--device")
    if wanted != "cpu":
        prepare("cuda")
        reason = unavailable(Settings("cuda"))
        if reason is None:
            return "cuda"
        if wanted == "cuda":
            raise typer.BadParameter(reason, param_hint="--device")
    prepare("cpu")
    reason = unavailable(Settings("cpu"))
    if reason is not None:
        raise typer.BadParameter(reason, param_hint="--device")
    return "cpu"


def train_both(text: np.ndarray, config: Config, device: str) -> tuple[dict[str, list[float]], Params]:
    """The losses of both frameworks, and the weights that PyTorch arrived at."""
    import jax

    from .compare import to_torch

    weights = initial_weights(config)
    data = demo_train.batches(text, config)
    torch_params = {name: to_torch(x, device) for name, x in weights.items()}
    jax_params = {name: jax.device_put(x) for name, x in weights.items()}
    losses = {
        "torch": demo_train.train("PyTorch", demo_train.torch_step(torch_params, config), data, config),
        "jax": demo_train.train("JAX    ", demo_train.jax_step(jax_params, config), data, config),
    }
    return losses, torch_params


def table(rows: Sequence[Row], title: str) -> Table:
    """A line per tensor, within 80 columns."""
    caption = "error: relative Frobenius, against float64; limit: of the error"
    out = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    out.add_column("tensor", no_wrap=True)
    for name in ("same bits", "max ULP", "max rel. diff.", "error torch", "error JAX", "limit"):
        out.add_column(name, justify="right", overflow="fold")
    out.add_column("")
    for row in rows:
        bits = "yes" if row.identical else "[bold red]NO[/]"
        errors = [f"{x:.1e}" if row.within(name) else f"[red]{x:.1e}[/]" for name, x in row.errors.items()]
        last = "[green]ok[/]" if row.ok else "[bold red]NO[/]"
        out.add_row(row.tensor, bits, str(row.ulp), f"{row.difference:.1g}", *errors, f"{row.tolerance:.1e}", last)
    return out


def cross_validate(case: Case, arrays: Arrays, device: str) -> Result:
    """The kernels of both frontends on these arrays, against each other and against float64."""
    from . import compare
    from .parity import BACKENDS
    from .report import Result

    start = time.perf_counter()
    options = case.options() | {"backend": BACKENDS[device]}
    results = {
        framework: run(compare.frontend(framework), options, case, arrays, device)
        for framework, run in compare.RUN.items()
    }
    truth = compare.truth(case, arrays, device)
    rows = compare.compare(case, results, truth, compare.tolerances(case, arrays, truth, device))
    status = "ok" if all(row.ok for row in rows) else "FAILED"
    return Result(case, status, tuple(rows), seconds=time.perf_counter() - start)


def run(text: np.ndarray, config: Config, device: str, out: Path, console: Console) -> bool:
    """Everything after the arguments: train, compare, write. Whether the comparison passed."""
    from . import demo_plot, report
    from .parity import device_name

    start = time.perf_counter()
    facts = {"device": device_name(device), **report.versions()}
    report.show(console, facts)
    seen, held_out = demo_train.split(text)
    losses, params = train_both(seen, config, device)

    arrays = demo_train.activations(params, held_out, config, SEGMENT)
    B, H, T, K = arrays["q"].shape
    # bthd, strided: as the model has them, q, k and v are slices of one wider projection.
    case = Case("trained layer", B, H, T, K, V=K, layout="bthd", strided=True, initial=True, last=True)
    console.print("comparing the kernels on the trained layer", highlight=False)
    result = cross_validate(case, arrays, device)
    title = f"Kernels on the trained layer's activations (B {B}, H {H}, T {T}, K {K}, V {K})"
    console.print(table(result.rows, title))

    source = {"bytes": text.size, "sha256": hashlib.sha256(text.tobytes()).hexdigest()}
    training: dict[str, Any] = {"config": dataclasses.asdict(config), "text": source, "losses": losses}
    report.write_json(out / "parity.json", [result], facts | training)
    demo_plot.draw(out / "parity.png", losses, result.rows, config.batch * config.length, facts["device"])
    last = ", ".join(f"{name} {np.mean(values[-10:]):.3f}" for name, values in losses.items())
    same = sum(row.identical is True for row in result.rows)
    lines = (
        f"loss over the last steps, nats per byte: {last}",
        f"{same} of {len(result.rows)} tensors identical to the bit; result {result.status}",
        f"{time.perf_counter() - start:.0f} s; wrote {out / 'parity.json'} and {out / 'parity.png'}",
    )
    console.print("\n".join(lines), highlight=False)
    return result.status == "ok"


def main(
    steps: int = typer.Option(Config.steps, min=1, help="Training steps in each framework."),
    device: str = typer.Option("auto", help="auto: a GPU where both frameworks find one, else cpu. cpu. cuda."),
    out: Path = typer.Option(Path("out"), file_okay=False, writable=True, help="Where parity.json and parity.png go."),
) -> None:
    """Train a small language model in PyTorch and in JAX, and compare the kernels on its activations."""
    device = choose_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    console = Console(width=None if sys.stdout.isatty() else 80)
    try:
        text = demo_train.read_text()
    except (OSError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None
    if not run(text, Config(steps=steps), device, out, console):
        raise typer.Exit(1)


if __name__ == "__main__":
    # Ctrl-C ends the process at once: JAX would finish its compilation first, and may crash or swallow the exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    typer.run(main)
