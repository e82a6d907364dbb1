"""What the processes of tools.multi_gpu_check do: one per device for PyTorch, one with all devices for JAX.

    python -m tools.multi_gpu_worker torch|jax RANK DEVICES cpu|cuda STORE OUT

Results go to OUT (JSON, rewritten after each part) from rank 0. A part is a list of rows, each a dict.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import compare
from .cases import Arrays, Case

BACKENDS = {"cpu": "interpret", "cuda": "triton"}
LIMIT = 1e-5  # of float32 results against those of one device
STATES: dict[str, Any] = {"initial": True, "last": True}
EQUAL = {
    "cpu": [Case("float32", B=1, H=2, T=34, K=8, V=8, chunk_size=16, **STATES)],
    "cuda": [
        Case("float32", B=1, H=4, T=2048, K=64, V=64, **STATES),
        Case("bfloat16", B=1, H=4, T=2048, K=128, V=256, dtype="bfloat16", **STATES),
        Case("bfloat16, long memory", B=1, H=4, T=16384, K=128, V=256, dtype="bfloat16", f_gate=(6.0, 1.0), **STATES),
    ],
}
SHARDED = {
    "cpu": Case("float32", B=2, H=2, T=9, K=8, V=8, chunk_size=16),
    "cuda": Case("bfloat16", B=2, H=4, T=1000, K=128, V=256, dtype="bfloat16"),
}
# B, H, T, K, V: split over the tokens, and over the batch.
CONTEXT = {"cpu": (1, 1, 18, 8, 8), "cuda": (1, 16, 131072, 128, 256)}
BATCH = {"cpu": (2, 1, 9, 8, 8), "cuda": (8, 16, 8192, 128, 256)}
LENGTHS = {"cpu": (1, 9), "cuda": (1024, 4096)}  # tokens per device whose bytes are counted
ROUNDS = {"cpu": (1, 1), "cuda": (5, 4)}  # rounds, and calls in each


@dataclasses.dataclass
class Place:
    """What a process knows of where it runs, and its results so far."""

    rank: int
    devices: int
    device: str
    out: Path
    parts: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def backend(self) -> Any:
        return BACKENDS[self.device]

    @property
    def timed_backend(self) -> Any:
        """On a CPU, where times say nothing, the one that takes the least."""
        return "reference" if self.device == "cpu" else self.backend

    def add(self, part: str, *rows: dict[str, Any]) -> None:
        self.parts.setdefault(part, []).extend(rows)
        if self.rank == 0:
            self.out.write_text(json.dumps(self.parts))


def equality(case: Case, arrays: Arrays, one: Arrays, split: Arrays, device: str) -> dict[str, Any]:
    """A row: errors of the split sequence against one device and float64, and whether they are as small as they must.

    Against float64 the tolerance is that of tools.compare.
    """
    truth = compare.truth(case, arrays, device)
    allowed = compare.tolerances(case, arrays, truth, device)
    errors = {
        "one device": {name: compare.frobenius_error(split[name], x.astype(np.float64)) for name, x in one.items()},
        "float64": {name: compare.frobenius_error(split[name], x) for name, x in truth.items()},
        "one device, float64": {name: compare.frobenius_error(one[name], x) for name, x in truth.items()},
    }
    good = all(errors["float64"][name] <= allowed[name] for name in truth)
    if case.dtype == "float32":
        good &= max(errors["one device"].values()) <= LIMIT
    return {"case": case.name, "shape": [case.B, case.H, case.T, case.K, case.V], "errors": errors, "good": good}


def timed(call: Callable[[], Any], wait: Callable[[Any], None], device: str) -> float:
    """Milliseconds per call, the median over rounds."""
    rounds, calls = ROUNDS[device]
    for _ in range(calls):  # the first compiles
        wait(call())
    times = []
    for _ in range(rounds):
        wait(None)
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call()
        wait(result)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def scaling(name: str, shape: tuple[int, ...], times: dict[str, tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """A row per pass. times: by pass, of one device and of all."""
    for pass_, (one, many) in times.items():
        yield {"split": name, "shape": list(shape), "pass": pass_, "one": one, "many": many, "ratio": one / many}


def options_of(case: Case, place: Place) -> dict[str, Any]:
    """The operator's options for a case."""
    return case.options() | {"backend": place.backend}


def main() -> None:
    framework, rank, devices, device, store, out = sys.argv[1:]
    place = Place(int(rank), int(devices), device, Path(out))
    if framework == "torch":
        from . import multi_gpu_torch

        multi_gpu_torch.run(place, store, datetime.timedelta(seconds=180))
    else:
        from . import multi_gpu_jax

        multi_gpu_jax.run(place)


if __name__ == "__main__":
    main()
