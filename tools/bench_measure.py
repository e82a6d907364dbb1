"""Measures jobs: all implementations of one pass side by side, round after round, by one stop-watch.

A round calls one implementation n times back to back, over sets of inputs in turn, and waits for the device once at
the end; the host's clock gives the time per call. Implementations take turns in a round, so that a drift of the GPU's
clock meets all of them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import bench_implementations as implementations
from . import bench_probe
from .bench_cases import Dtype, Implementation, Job, Shape
from .bench_floors import bytes_moved, floor, flops
from .bench_implementations import Inputs, NotAvailable, Runner
from .bench_report import Row

SETS_BYTES = 256 * 2**20  # together the sets are larger than any L2
MAX_SETS = 8  # small shapes stay in the L2 anyway
MAX_CALLS = 1000
COPY_BYTES = {"cuda": 2**31, "cpu": 2**26}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
JAX_ROW = "fw+bw - fw"


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run have in common."""

    device: str
    rounds: int = 7
    round_seconds: float = 0.03
    engine_thread: bool = False  # torch's gradients on autograd's own thread, not on the caller's


@dataclass
class Entry:
    """One implementation within a job."""

    implementation: Implementation
    runner: Runner | None = None
    status: str = "ok"
    note: str = ""
    calls: int = 1  # per round
    warm_up: float = 0.0  # seconds until the first result: compilation, most of it
    peak_bytes: int | None = None
    times: list[float] = field(default_factory=list)  # seconds per call, a value per round


@dataclass
class Ceilings:
    """The rates of this machine: bytes copied (read and written) and, by dtype, operations, in 1e12 per second."""

    copy_tb_s: float
    matmul_tflop_s: dict[str, float]


def synchronize(device: str) -> None:
    """Wait for the device, whichever framework launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def one_line(error: BaseException) -> str:
    """An exception as a table can show it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def release(device: str, collect: bool = True) -> None:
    """Give memory back that nobody holds, for the other framework."""
    if collect:
        gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def set_precision(dtype: Dtype) -> None:
    """How torch multiplies float32 outside of kernels that say so themselves."""
    torch.set_float32_matmul_precision("highest" if dtype.precision == "ieee" else "high")


def time_calls(call: Callable[[int], Any], wait: Callable[[Any], None], n: int, device: str) -> float:
    """Seconds per call, of n back to back."""
    synchronize(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        result = None
        for index in range(n):
            result = call(index)
        wait(result)
        synchronize(device)
        return (time.perf_counter() - start) / n
    finally:
        if collecting:
            gc.enable()


def _multiply(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, _: int) -> None:
    torch.matmul(x, y, out=out)


def ceilings(dtypes: list[Dtype], device: str) -> Ceilings:
    """Copy bandwidth and the rate of a large matrix product in each dtype; the best of several, as ceilings are."""

    def best(call: Callable[[int], Any], n: int) -> float:
        time_calls(call, lambda _: None, 2, device)
        return min(time_calls(call, lambda _: None, n, device) for _ in range(5))

    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda _: target.copy_(source), 5)
    del source, target
    rates, size = {}, MATMUL_SIZE[device]
    for dtype in dtypes:
        set_precision(dtype)
        x, y = (torch.randn(size, size, device=device).to(getattr(torch, dtype.dtype)) for _ in range(2))
        out = torch.empty_like(x)
        product = functools.partial(_multiply, x, y, out)
        products = 3 if dtype.precision == "tf32x3" else 1  # of tf32, for one of float32
        rates[dtype.name] = 2 * size**3 / products / best(product, 5 if dtype.itemsize == 2 else 2) / 1e12
        del x, y, out, product
    release(device)
    return Ceilings(copy / 1e12, rates)


def make_sets(shape: Shape, dtype: Dtype, device: str) -> list[Inputs]:
    """Sets of inputs that together exceed the L2; at least two where memory allows."""
    first = implementations.make_inputs(shape, dtype, device, 0)
    size = implementations.set_bytes(first)
    number = min(MAX_SETS, max(2, math.ceil(SETS_BYTES / size)))
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        number = max(1, min(number, 1 + int(free / 16 // size)))
    return [first, *(implementations.make_inputs(shape, dtype, device, seed) for seed in range(1, number))]


def warm_up(entry: Entry, job: Job, sets: list[Inputs], settings: Settings) -> None:
    """Compile, take the peak memory, and choose how many calls fill a round."""
    device = settings.device
    start = time.perf_counter()
    runner = implementations.build(entry.implementation, job.shape, job.dtype, job.pass_, device)
    entry.runner = runner
    with warnings.catch_warnings(action="ignore"):  # what compilers say of peers is no result
        operands = runner.operands(sets[0])
        time_calls(lambda _: runner.call(operands), runner.wait, 1, device)
    entry.warm_up = time.perf_counter() - start
    entry.peak_bytes = runner.memory(operands)
    once = min(time_calls(lambda _: runner.call(operands), runner.wait, 3, device) for _ in range(2))
    entry.calls = max(1, min(MAX_CALLS, math.ceil(settings.round_seconds / once)))


def time_round(entry: Entry, sets: list[Inputs], device: str) -> float:
    """Seconds per call of one round."""
    runner = entry.runner
    assert runner is not None
    operands = [runner.operands(inputs) for inputs in sets[: entry.calls]]
    for _ in range(min(3, entry.calls)):  # its memory is allocated now, its code and the clocks are warm
        runner.wait(runner.call(operands[0]))
    return time_calls(lambda n: runner.call(operands[n % len(operands)]), runner.wait, entry.calls, device)


@contextlib.contextmanager
def failures_in(entry: Entry) -> Iterator[None]:
    """What goes wrong with one implementation is its result, not the end of the run."""
    try:
        yield
    except NotAvailable as error:
        entry.status, entry.note = "not available", str(error)
        if entry.note.startswith("not installed"):
            entry.status, _, entry.note = entry.note.partition(": ")
    except Exception as error:
        entry.status, entry.note, entry.runner = "failed", one_line(error), None


def run_job(job: Job, settings: Settings, dead: Mapping[bench_probe.Key, str]) -> list[Entry]:
    """All implementations of a job, interleaved. dead: those that no process survives, with the reason."""
    set_precision(job.dtype)
    entries = [Entry(x) for x in job.implementations]
    sets = make_sets(job.shape, job.dtype, settings.device)
    for entry in entries:
        if job.pass_ == "bw" and entry.implementation.kind.endswith("jax"):
            entry.status, entry.note = "derived", JAX_ROW
            continue
        reason = dead.get(bench_probe.key(entry.implementation, job))
        if reason:
            entry.status, entry.note = "failed", reason
            continue
        with failures_in(entry):
            warm_up(entry, job, sets, settings)
        release(settings.device, collect=entry.status == "failed")
    for _ in range(settings.rounds):
        for entry in entries:
            if entry.status == "ok":
                with failures_in(entry):
                    entry.times.append(time_round(entry, sets, settings.device))
                if entry.status != "ok":
                    release(settings.device)
    del sets
    release(settings.device)
    return entries


def rows_of(job: Job, entries: list[Entry], rates: Ceilings, before: list[Row]) -> list[Row]:
    """A job's results. `before`: the rows so far, from which JAX's share of the backward pass is derived."""
    bounds = floor(job.shape, job.dtype.itemsize, job.pass_, rates.copy_tb_s, rates.matmul_tflop_s[job.dtype.name])
    rows = []
    for entry in entries:
        status, note, times = entry.status, entry.note, entry.times
        x = entry.implementation
        if status == "derived":
            parts = {
                row.pass_: row
                for row in before
                if row.implementation == x.name and row.problem == (job.shape.name, job.dtype.name)
            }
            status, note, times = derive(parts)
        if status == "ok":
            note = "; ".join(filter(None, (x.note, entry.runner.note if entry.runner else "", note)))
        rows.append(
            Row(
                table=job.shape.table,
                shape=job.shape.name,
                sizes=job.shape.sizes,
                dtype=job.dtype.name,
                pass_=job.pass_,
                implementation=x.name,
                status=status,
                note=note,
                times_ms=tuple(1e3 * t for t in times) if status == "ok" else (),
                calls=entry.calls,
                warm_up_s=entry.warm_up,
                peak_bytes=entry.peak_bytes,
                floor_memory_ms=bounds.memory,
                floor_arithmetic_ms=bounds.arithmetic,
                flops=flops(job.shape, job.pass_),
                bytes=bytes_moved(job.shape, job.dtype.itemsize, job.pass_),
                same_function=x.same_function,
            )
        )
    return rows


def derive(parts: dict[str, Row]) -> tuple[str, str, list[float]]:
    """Status, note and times of a backward pass as the difference of two measurements, round by round."""
    if not {"fw", "fw+bw"} <= parts.keys():
        return "not available", f"{JAX_ROW}: needs both passes", []
    for row in parts.values():
        if row.status != "ok":
            return row.status, row.note, []
    both = zip(parts["fw+bw"].times_ms, parts["fw"].times_ms, strict=True)
    times = [(x - y) / 1e3 for x, y in both]
    if min(times) <= 0:
        return "not available", f"{JAX_ROW}: the difference is within the noise", []
    return "ok", JAX_ROW, times


def count_launches(measured: list[tuple[Job, list[Entry]]], device: str) -> dict[tuple[str, ...], int]:
    """Kernels that one call starts, by shape, dtype, pass and implementation, as torch's profiler sees them on a GPU.

    Runs after all timing, since a profiler once started may slow launches down.
    """
    counts: dict[tuple[str, ...], int] = {}
    for job, entries in measured:
        set_precision(job.dtype)
        inputs = implementations.make_inputs(job.shape, job.dtype, device, 0)
        for entry in entries:
            if entry.runner is None or entry.implementation.kind == "ours_graph":
                continue
            with contextlib.suppress(RuntimeError):  # no profiler, no count: the column stays empty
                number = _kernels(entry.runner, entry.runner.operands(inputs))
                if number:
                    counts[job.shape.name, job.dtype.name, job.pass_, entry.implementation.name] = number
        del inputs
        release(device)
    return counts


def _kernels(runner: Runner, operands: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    runner.wait(runner.call(operands))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        runner.wait(runner.call(operands))
        torch.cuda.synchronize()
    events = profiler.events() or ()
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels)
