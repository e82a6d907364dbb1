"""Tables and JSON of a comparison's results."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cases import Case
from .compare import Row

PACKAGES = ("torch", "jax", "jax-triton", "triton", "numpy")
STYLE = {"ok": "green", "FAILED": "bold red", "skipped": "yellow", "not applicable": "yellow"}


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    case: Case
    status: str  # "ok", "FAILED", "skipped", "not applicable"
    rows: tuple[Row, ...] = ()
    note: str = ""  # why, where there is more to say than the rows do
    seconds: float = 0.0


def versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers; "none" where not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def worst(rows: Sequence[Row]) -> Row:
    """The row to show for a case: one that fails if there is one, and of those the largest error per tolerance."""

    def badness(row: Row) -> tuple[bool, bool, float]:
        # Of gradient modes the nearer one counts, of frameworks the worse one.
        decisive = min if row.identical is None else max
        return (not row.ok, row.identical is False, decisive(row.errors.values()) / row.tolerance)

    return max(rows, key=badness)


def _yes(value: bool | None) -> str:
    return {None: "-", True: "yes", False: "[bold red]NO[/]"}[value]


def _number(value: float | None, good: bool = True) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if good else f"[red]{value:.1e}[/]"


def table(results: Iterable[Result], verbose: bool, title: str, columns: Sequence[str]) -> Table:
    """One line per case, its worst tensor; verbose: one per tensor. columns: the names of the rows' errors."""
    out = Table(title=title, title_justify="left")
    pairs = columns == ("torch", "jax")
    out.add_column("case", no_wrap=True)
    out.add_column("tensor" if verbose else "worst tensor", no_wrap=True)
    if pairs:
        for name in ("identical bits", "max ULP", "max rel. difference"):
            out.add_column(name, justify="right")
    prefix = "error of " if pairs else "error against "
    for name in (*(prefix + column for column in columns), "tolerance", *(() if verbose else ("seconds",))):
        out.add_column(name, justify="right")
    out.add_column("result")
    for result in results:
        status = Text(result.status, STYLE[result.status]) + Text(f" {result.note}" if result.note else "", "default")
        if not result.rows:
            blank = [""] * (len(out.columns) - 2)
            out.add_row(result.case.name, *blank, status)
            continue
        for row in result.rows if verbose else (worst(result.rows),):
            cells = [row.case, row.tensor]
            if pairs:
                same = [x.identical for x in result.rows] if not verbose else [row.identical]
                ulps = [x.ulp or 0 for x in result.rows] if not verbose else [row.ulp or 0]
                away = [x.difference or 0.0 for x in result.rows] if not verbose else [row.difference or 0.0]
                cells += [_yes(all(same)), str(max(ulps)), _number(max(away)) if max(away) else "0"]
            cells += [_number(row.errors[name], row.within(name)) for name in columns]
            cells.append(_number(row.tolerance))
            if verbose:
                last = Text("ok", "green") if row.ok else Text("FAILED", "bold red")
                if result.note and row is result.rows[-1]:
                    last += Text(f" ({result.note})", "default")
            else:
                cells.append(f"{result.seconds:.1f}")
                last = status
            out.add_row(*cells, last)
    return out


def summary(results: Sequence[Result]) -> str:
    """How many cases ended how."""
    counts = {status: sum(x.status == status for x in results) for status in STYLE}
    tensors = sum(len(x.rows) for x in results)
    same = [row.identical for x in results for row in x.rows if row.identical is not None]
    text = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    bits = f"; {sum(same)} of {len(same)} bitwise identical" if same else ""
    modes = Counter(x.note.split(";")[0] for x in results if x.rows and x.note)
    nearest = f"; nearest to {', '.join(f'{mode} ({n})' for mode, n in modes.most_common())}" if modes else ""
    return f"{len(results)} case{'s' * (len(results) != 1)}: {text}; {tensors} tensors{bits}{nearest}"


def show(console: Console, facts: dict[str, str]) -> None:
    """A line of facts such as versions."""
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def _plain(value: Any) -> Any:
    """JSON has no infinity: such numbers become strings."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, results: Iterable[Result], facts: dict[str, str]) -> None:
    """Everything the tables show, and the cases in full."""
    entries = []
    for result in results:
        rows = [{**dataclasses.asdict(row), "ok": row.ok} for row in result.rows]
        entries.append({**dataclasses.asdict(result), "rows": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain({**facts, "results": entries}), indent=1) + "\n")
