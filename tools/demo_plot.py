"""The demo's picture: both loss curves, and every tensor's error against float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .compare import Row

COLOURS = {"torch": "#d1495b", "jax": "#1f5fa8"}
LABELS = {"torch": "PyTorch", "jax": "JAX"}


def draw(path: Path, losses: Mapping[str, Sequence[float]], rows: Sequence[Row], tokens: int, device: str) -> None:
    """Write the picture. losses: by framework, a value per step of so many tokens."""
    with plt.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained", width_ratios=(1, 1.1))
        _losses(left, losses, tokens)
        _errors(right, rows)
        figure.suptitle(f"mLSTM: one set of Triton kernels, launched from PyTorch and from JAX; {device}", fontsize=13)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _losses(axes: Axes, losses: Mapping[str, Sequence[float]], tokens: int) -> None:
    """Both curves; where they lie on each other the thinner one is on top."""
    for (name, values), width, style in zip(losses.items(), (3.5, 1.2), ("-", "--"), strict=True):
        last = np.mean(values[-10:])
        label = f"{LABELS[name]}: {last:.2f} over the last {min(10, len(values))} steps"
        alpha = 0.55 if width > 2 else 1.0
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, style, color=COLOURS[name], linewidth=width, alpha=alpha, label=label)
    axes.axhline(np.log(256), color="0.5", linewidth=1, linestyle=":")
    axes.text(len(values), np.log(256), "all bytes equally likely", ha="right", va="bottom", color="0.4", fontsize=9)
    axes.set_title("Training on Python's standard library, same weights and batches", fontsize=11)
    axes.set_xlabel(f"step ({tokens:,} bytes each)")
    axes.set_ylabel("loss (nats per byte)")
    axes.legend()


def _errors(axes: Axes, rows: Sequence[Row]) -> None:
    """One line per tensor: both errors and the tolerance."""
    y = np.arange(len(rows))
    axes.plot([row.tolerance for row in rows], y, "|", color="0.2", markersize=14, label="tolerance")
    for (name, label), size in zip(LABELS.items(), (9, 4), strict=True):
        values = np.clip([row.errors[name] for row in rows], 1e-9, 1.0)  # 0 and infinity have no place on the axis
        axes.plot(values, y, "o", color=COLOURS[name], markersize=size, label=label)
    axes.set_xscale("log")
    axes.set_yticks(y, [row.tensor for row in rows])
    axes.invert_yaxis()
    same = sum(row.identical is True for row in rows)
    axes.set_title(f"The trained layer's kernels: {same} of {len(rows)} tensors identical to the bit", fontsize=11)
    axes.set_xlabel("relative error against float64 (Frobenius norm)")
    axes.legend()
