"""The benchmark's results: rows, their table, their JSON, and the comparison with an older run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PACKAGES = {  # by name, the distributions that hold it
    "torch": ("torch",),
    "triton": ("triton",),
    "jax": ("jax",),
    "jax-triton": ("jax-triton",),
    "mlstm-kernels": ("mlstm_kernels",),
    "fla": ("flash-linear-attention", "fla-core"),
}
ABSENT = ("not installed", "not available")
BASELINE = "ours torch"
SCALING_FROM = 2**16  # tokens; below, too few programs to fill a GPU


@dataclass(frozen=True)
class Row:
    """One implementation's result for one pass over one shape."""

    table: str
    shape: str
    sizes: tuple[int, ...]  # B, H, T, K, V
    dtype: str
    pass_: str
    implementation: str
    status: str = "ok"  # or "failed", "not installed", "not available"
    note: str = ""
    times_ms: tuple[float, ...] = ()  # per call, a value per round
    calls: int = 1  # per round
    warm_up_s: float = 0.0
    peak_bytes: int | None = None
    launches: int | None = None
    floor_memory_ms: float = 0.0
    floor_arithmetic_ms: float = 0.0
    flops: int = 0
    bytes: int = 0
    same_function: bool = False  # a peer that computes the same operator

    @property
    def key(self) -> tuple[str, ...]:
        return (self.table, self.shape, str(self.sizes), self.dtype, self.pass_, self.implementation)

    @property
    def problem(self) -> tuple[str, str]:
        return (self.shape, self.dtype)

    @property
    def ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.times_ms)

    @property
    def floor_ms(self) -> float:
        return max(self.floor_memory_ms, self.floor_arithmetic_ms)

    @property
    def ours(self) -> bool:
        return self.implementation.startswith("ours")


@dataclass
class Report:
    """A whole run."""

    facts: dict[str, str]
    ceilings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def facts(device: str, device_name: str, date: str) -> dict[str, str]:
    """What decides the numbers: machine, versions, commit."""
    found = {"device": device_name, "date": date, "python": platform.python_version()}
    for name, distributions in PACKAGES.items():
        found[name] = "none"
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(distribution)
                break
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else "unknown"
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD")
    if commit:
        changed = _output("git", "-C", str(Path(__file__).parent), "status", "--porcelain", "--untracked-files=no")
        found["commit"] = commit + (" with changes" if changed else "")
    return found


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def table(rows: Sequence[Row], title: str) -> Table:
    """All rows of a dtype: one line each, a section per shape and pass."""
    out = Table(title=title, title_justify="left")
    out.add_column("shape", no_wrap=True)
    out.add_column("pass", no_wrap=True)
    out.add_column("implementation", no_wrap=True)
    for name in ("ms", "min - max", "x floor", "x ours torch", "peak GB", "launches"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("note")
    baselines = {(*row.problem, row.pass_): row.ms for row in rows if row.implementation == BASELINE and row.times_ms}
    previous: tuple[str, ...] = ()
    for row in rows:
        if row.status in ABSENT:
            continue
        group = (*row.problem, row.pass_)
        if group != previous and previous:
            out.add_section()
        bound = "memory" if row.floor_memory_ms >= row.floor_arithmetic_ms else "arithmetic"
        head = (f"{row.shape} {','.join(map(str, row.sizes))}", row.pass_) if group != previous else ("", "")
        if group != previous:
            out.add_row(*head, Text(f"floor ({bound})", "dim"), Text(milliseconds(row.floor_ms), "dim"))
        previous = group
        if not row.times_ms:
            out.add_row("", "", row.implementation, *[""] * 6, Text(f"{row.status}: {row.note}", "bold red"))
            continue
        base = baselines.get(group)
        out.add_row(
            *("", ""),
            row.implementation,
            milliseconds(row.ms),
            f"{milliseconds(min(row.times_ms))} - {milliseconds(max(row.times_ms))}",
            f"{row.ms / row.floor_ms:.2f}",
            f"{row.ms / base:.2f}" if base else "",
            f"{row.peak_bytes / 1e9:.3g}" if row.peak_bytes else "",
            str(row.launches or ""),
            row.note,
        )
    return out


def absent(rows: Iterable[Row]) -> list[str]:
    """What could not be measured and why, a line per reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.status in ABSENT:
            reasons.setdefault(f"{row.status}: {row.note}", {})[row.implementation] = None
    return [f"{reason}: {'; '.join(names)}" for reason, names in reasons.items()]


def best_peers(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """For each of our torch rows the fastest peer that computes the same operator."""
    rows = list(rows)
    pairs = []
    for mine in rows:
        if mine.implementation != BASELINE or not mine.times_ms:
            continue
        peers = [
            x for x in rows if (x.problem, x.pass_) == (mine.problem, mine.pass_) and x.same_function and x.times_ms
        ]
        if peers:
            pairs.append((mine, min(peers, key=lambda x: x.ms)))
    return pairs


def _peers_table(pairs: Sequence[tuple[Row, Row]]) -> Table:
    """A line per shape, a column per pass."""
    out = Table(title="Time of the best mlstm-kernels over that of ours torch", title_justify="left")
    passes = list(dict.fromkeys(mine.pass_ for mine, _ in pairs))
    for name in ("shape", "dtype", *passes):
        out.add_column(name, no_wrap=True)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for mine, peer in pairs:
        name = peer.implementation.removeprefix("mlstm-kernels ")
        lines.setdefault(mine.problem, {})[mine.pass_] = f"{peer.ms / mine.ms:.2f} ({name})"
    for problem, cells in lines.items():
        out.add_row(*problem, *(cells.get(pass_, "") for pass_ in passes))
    return out


def slopes(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """d log time / d log T over the long sequences of the scaling table, by dtype, implementation and pass.

    1 is linear. Where fewer than two points are that long, over all.
    """
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.table == "scaling" and row.times_ms:
            point = (math.log(row.sizes[2]), math.log(row.ms))
            groups.setdefault((row.dtype, row.implementation, row.pass_), []).append(point)
    found = {}
    for key, points in groups.items():
        tail = [point for point in points if point[0] >= math.log(SCALING_FROM)]
        points = tail if len(tail) > 1 else points
        if len(points) > 1:
            found[key] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return found


def show(console: Console, report: Report) -> None:
    """Everything, as tables."""
    for dtype in dict.fromkeys(row.dtype for row in report.rows):
        rows = [row for row in report.rows if row.dtype == dtype]
        console.print(table(rows, f"{dtype}, {report.facts.get('device', '')}: time per call, median of rounds"))
    for line in absent(report.rows):
        console.print(Text(line, "yellow"))
    if pairs := best_peers(report.rows):
        console.print(_peers_table(pairs))
    if report.ceilings:
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in report.ceilings["matmul_tflop_s"].items())
        copy = report.ceilings["copy_tb_s"]
        console.print(f"measured: copy {copy:.3g} TB/s (read + written); matmul TFLOP/s: {rates}", highlight=False)
    for (dtype, implementation, pass_), slope in slopes(report.rows).items():
        console.print(f"scaling, {dtype} {implementation} {pass_}: d log time / d log T = {slope:.3f}", highlight=False)


def write(path: Path, report: Report) -> None:
    """All that was measured, as JSON."""
    rows = [dataclasses.asdict(row) | ({"ms": row.ms} if row.times_ms else {}) for row in report.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(report) | {"rows": rows}, indent=1) + "\n")


def read(path: Path) -> Report:
    """A report as `write` left it. Raises ValueError for anything else."""
    try:
        data = json.loads(path.read_text())
        names = {x.name for x in dataclasses.fields(Row)}
        rows = []
        for entry in data.pop("rows"):
            values: dict[str, Any] = {
                name: tuple(x) if isinstance(x, list) else x for name, x in entry.items() if name in names
            }
            rows.append(Row(**values))
        return Report(**data, rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON file of tools.bench, got {error}") from error


@dataclass(frozen=True)
class Change:
    """A row now and in an older run."""

    old: Row
    new: Row
    allowed: float  # relative growth of the time

    @property
    def ratio(self) -> float | None:
        """New time over old; None where one of them has no time."""
        return self.new.ms / self.old.ms if self.new.times_ms and self.old.times_ms else None

    @property
    def regressed(self) -> bool:
        """Ours alone can regress: slower than allowed, or no longer there."""
        if not self.new.ours or not self.old.times_ms:
            return False
        return self.ratio is None or self.ratio > 1 + self.allowed


def changes(new: Report, old: Report, allowed: float) -> list[Change]:
    """The rows that both runs have."""
    before = {row.key: row for row in old.rows}
    return [Change(before[row.key], row, allowed) for row in new.rows if row.key in before]


def show_changes(console: Console, found: Sequence[Change], new: Report, old: Report) -> None:
    """A line per row that both runs have."""
    if new.facts.get("device") != old.facts.get("device"):
        console.print(f"[yellow]other device: {old.facts.get('device')} then, {new.facts.get('device')} now[/]")
    out = Table(title=f"Against {old.facts.get('date')}, commit {old.facts.get('commit', '?')}", title_justify="left")
    for name in ("shape", "dtype", "pass", "implementation"):
        out.add_column(name, no_wrap=True)
    for name in ("old ms", "new ms", "new / old"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("")
    for change in found:
        old_row, row = change.old, change.new
        out.add_row(
            *(row.shape, row.dtype, row.pass_, row.implementation),
            milliseconds(old_row.ms) if old_row.times_ms else old_row.status,
            milliseconds(row.ms) if row.times_ms else row.status,
            f"{change.ratio:.3f}" if change.ratio else "",
            Text("REGRESSED", "bold red") if change.regressed else "",
        )
    console.print(out)
    console.print(f"{len(found)} rows in both runs, {sum(x.regressed for x in found)} regressed", highlight=False)
