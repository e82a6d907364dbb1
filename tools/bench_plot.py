"""The benchmark's pictures, from a report alone: time over length, roofline, peak memory, scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .bench_report import BASELINE, Report, Row, best_peers, slopes

PASSES = ("fw", "fw+bw")
TITLES = {"fw": "forward", "fw+bw": "forward and backward"}
OURS = {
    "ours torch": "#c1272d",
    "ours JAX": "#1f5fa8",
    "ours torch, pointers": "#7d1a1e",
    "ours torch detached": "#e58a8d",
    "ours torch save_states=False": "#f0b7a4",
}
PEERS = ("#5b6770", "#2a9d8f", "#8a5fa8", "#b07d2b", "#7fb069", "#9a9a9a", "#4d908e")
MARKERS = "sv^DPX<>"
STYLE: Any = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}


def _measured(report: Report, table: str) -> list[Row]:
    """Rows with a time, of the first dtype alone: a picture shows one."""
    rows = [row for row in report.rows if row.table == table and row.times_ms and row.pass_ in PASSES]
    return [row for row in rows if row.dtype == rows[0].dtype]


def _looks(implementations: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every implementation: ours stand out, JAX thinner on top of torch."""
    names = list(dict.fromkeys(implementations))
    peers = [name for name in names if not name.startswith("ours")]
    looks: dict[str, dict[str, Any]] = {}
    for name in names:
        if name.startswith("ours"):
            dashed = "--" if "JAX" in name else "-"
            looks[name] = {"color": OURS.get(name, "#c1272d"), "marker": "o", "linestyle": dashed, "zorder": 4}
            looks[name] |= {"linewidth": 1.6, "markersize": 4} if "JAX" in name else {"linewidth": 2.6, "markersize": 7}
        else:
            n = peers.index(name)
            looks[name] = {"color": PEERS[n % len(PEERS)], "marker": MARKERS[n % len(MARKERS)], "linewidth": 1.4}
            looks[name] |= {"markersize": 5, "linestyle": "-"}
    return looks


def _tokens(value: float, _: int = 0) -> str:
    """512, 64k, 1M."""
    n = round(value)
    return f"{n >> 20}M" if n >= 2**20 else f"{n >> 10}k" if n >= 2**10 else str(n)


def _lengths(axes: Axes, rows: list[Row]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row.sizes[2] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.xaxis.set_minor_locator(NullLocator())
    _plain_logarithms(axes.yaxis)
    axes.set_xlabel("T, tokens per sequence")
    axes.set_ylabel("time (ms)")


def _lines(report: Report, table: str, label: Callable[[str, str], str]) -> Figure | None:
    """Time over T, a panel per pass, with the floor of the hardware."""
    rows = _measured(report, table)
    if not rows:
        return None
    looks = _looks(row.implementation for row in rows)
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    figure, panels = plt.subplots(1, len(passes), figsize=(7 * len(passes), 5.8), layout="constrained", squeeze=False)
    for axes, pass_ in zip(panels[0], passes, strict=True):
        of_pass = [row for row in rows if row.pass_ == pass_]
        for name, look in looks.items():
            points = sorted((row.sizes[2], row.ms) for row in of_pass if row.implementation == name)
            if points:
                axes.plot(*zip(*points, strict=True), label=label(name, pass_), **look)
        floors = sorted({(row.sizes[2], row.floor_ms) for row in of_pass})
        axes.plot(*zip(*floors, strict=True), color="0.3", linestyle=":", label="floor of the hardware")
        _lengths(axes, of_pass)
        axes.set_title(TITLES[pass_], fontsize=11)
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return figure


def sweep(report: Report) -> Figure | None:
    """Time over the sequence length, with the number of tokens constant."""
    figure = _lines(report, "sweep", lambda name, _: name)
    if figure:
        row = _measured(report, "sweep")[0]
        B, H, T, K, V = row.sizes
        sizes = f"B T = {_tokens(B * T)} tokens, H={H}, K={K}, V={V}, {row.dtype}"
        figure.suptitle(f"Time at a constant number of tokens: {sizes}; {_machine(report)}", fontsize=11)
    return figure


def scaling(report: Report) -> Figure | None:
    """Time over the length of one batch of sequences, with slopes."""
    found = slopes(report.rows)
    rows = _measured(report, "scaling")

    def label(name: str, pass_: str) -> str:
        slope = found.get((rows[0].dtype, name, pass_))
        return name if slope is None else f"{name}, slope {slope:.2f}"

    figure = _lines(report, "scaling", label)
    if figure:
        B, H, _, K, V = rows[0].sizes
        sizes = f"B={B}, H={H}, K={K}, V={V}, {rows[0].dtype}"
        figure.suptitle(f"Time over length: {sizes}; {_machine(report)}", fontsize=11)
    return figure


def _machine(report: Report) -> str:
    return report.facts.get("device", "unknown device")


def _labels(axes: Axes, names: list[str], points: list[tuple[float, float]], left: bool) -> None:
    """Names beside points; those of points that nearly coincide in one label."""
    places: dict[tuple[int, int], list[int]] = {}
    for n, (x, y) in enumerate(points):
        places.setdefault((round(16 * np.log2(x)), round(3 * np.log2(y))), []).append(n)
    for indices in places.values():
        text = ", ".join(names[n] for n in indices)
        offset, side = ((-7, -3), "right") if left else ((7, -3), "left")
        axes.annotate(text, points[indices[0]], offset, textcoords="offset points", fontsize=8, ha=side)


def _plain_logarithms(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def roofline(report: Report) -> Figure | None:
    """Operations per second over operations per byte, under the measured ceilings; floors' counts of both."""
    rows = _measured(report, "shapes")
    rates = report.ceilings
    if not rows or not rates:
        return None
    copy, matmul = rates["copy_tb_s"], rates["matmul_tflop_s"][rows[0].dtype]
    best = {id(peer) for _, peer in best_peers(rows)}
    compared = {id(row): row.implementation for row in rows if row.implementation in (BASELINE, "ours JAX")}
    compared |= dict.fromkeys(best, "best mlstm-kernels")
    names = compared or {id(row): row.implementation for row in rows}
    looks = _looks(names.values())
    figure, axes = plt.subplots(figsize=(12, 6.5), layout="constrained")
    intensities = [row.flops / row.bytes for row in rows]
    x = np.geomspace(min(*intensities, matmul / copy) / 3, max(max(intensities), matmul / copy) * 3, 200)
    axes.plot(x, np.minimum(copy * x, matmul), color="0.2", linewidth=2)
    axes.text(x[4], copy * x[4] * 1.15, f"copy {copy:.3g} TB/s", rotation=35, rotation_mode="anchor", color="0.3")
    axes.text(x[-1], matmul * 1.08, f"{rows[0].dtype} matmul {matmul:.3g} TFLOP/s", ha="right", color="0.3")
    for name, look in looks.items():
        for pass_ in PASSES:
            chosen = [row for row in rows if row.pass_ == pass_ and names.get(id(row)) == name]
            if not chosen:
                continue
            points = [(row.flops / row.bytes, row.flops / row.ms / 1e9) for row in chosen]
            face = "none" if pass_ == "fw" else look["color"]
            label = f"{name}, {TITLES[pass_]}"
            axes.plot(*zip(*points, strict=True), label=label, markerfacecolor=face, **look | {"linestyle": "none"})
            if name == next(iter(looks)):
                _labels(axes, [row.shape for row in chosen], points, left=pass_ == "fw")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_logarithms(axes.xaxis)
    _plain_logarithms(axes.yaxis)
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("achieved TFLOP/s")
    axes.set_title(f"Roofline, {rows[0].dtype}; {_machine(report)}", fontsize=11)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def memory(report: Report) -> Figure | None:
    """Peak memory of one forward and backward pass, by shape and implementation."""
    rows = [row for row in _measured(report, "shapes") if row.peak_bytes and row.pass_ == "fw+bw"]
    # Small shapes would be bars without height.
    largest = max((row.peak_bytes or 0 for row in rows), default=0)
    rows = [row for row in rows if (row.peak_bytes or 0) > largest / 100]
    if not rows:
        return None
    looks = _looks(row.implementation for row in rows)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    groups = [[row for row in rows if row.shape == shape] for shape in shapes]
    width = 0.84 / len(looks)
    figure, axes = plt.subplots(figsize=(max(8.0, 1.9 * len(shapes)), 5.8), layout="constrained")
    for name, look in looks.items():
        bars = [
            (place + (n - (len(group) - 1) / 2) * width, (row.peak_bytes or 0) / 1e9)
            for place, group in enumerate(groups)
            for n, row in enumerate(group)
            if row.implementation == name
        ]
        places, heights = zip(*bars, strict=True)
        axes.bar(places, heights, width * 0.92, color=look["color"], label=name)
    sizes = {row.shape: ",".join(map(str, row.sizes)) for row in rows}
    axes.set_xticks(range(len(shapes)), [f"{shape}\n{sizes[shape]}" for shape in shapes], fontsize=8)
    axes.set_xlim(-0.6, len(shapes) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("peak memory (GB)")
    title = f"Peak memory of forward and backward, inputs, outputs and gradients included, {rows[0].dtype}"
    axes.set_title(f"{title}\n{_machine(report)}", fontsize=11)
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return figure


PICTURES = {"sweep": sweep, "roofline": roofline, "memory": memory, "scaling": scaling}


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Write each picture that the report has rows for; returns the paths."""
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, make in PICTURES.items():
            figure = make(report)
            if figure:
                paths.append(folder / f"bench-{name}.png")
                figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
                plt.close(figure)
    return paths
