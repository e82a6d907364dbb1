"""Compiles one implementation for one job in a process of its own, and fills Triton's cache on disk meanwhile.

A compiler that aborts (LLVM assertions do) or does not end would take a whole benchmark with it: seen with peers'
kernels on Triton 3.6. Such a job is reported as failed instead.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from .bench_cases import DTYPES, IMPLEMENTATIONS, Implementation, Job, Shape

OURS = "ours_torch"
KINDS = (OURS, "mlstm_kernels", "fla")  # those that compile with Triton, outside of XLA
SECONDS = 150
SECONDS_OF = {"fla": 900}  # by kind: it tries some 150 configurations of its kernels, one after another
TOKENS = 1024
Key = tuple[str, tuple[int, int, int, int, int], str]


def key(x: Implementation, job: Job) -> Key:
    """What is compiled, forward and backward: of a peer one short sequence stands for all."""
    B, H, T, K, V = job.shape.sizes
    sizes = (B, H, T, K, V) if x.kind == OURS else (1, H, min(T, TOKENS), K, V)
    return x.name, sizes, job.dtype.name


def probe(item: Key) -> str:
    """Why the process of a job died, or nothing. An exception is no reason: the measurement itself will meet it."""
    name, sizes, dtype = item
    command = [sys.executable, "-m", "tools.bench_probe", name, *map(str, sizes), dtype]
    kind = next(x.kind for x in IMPLEMENTATIONS if x.name == name)
    limit = SECONDS_OF.get(kind, SECONDS)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"no result within {limit} s"
    if done.returncode >= 0:
        return ""
    return f"signal {-done.returncode}: {' '.join(done.stderr.split())[-200:]}"


def probe_all(jobs: Iterable[Job], jobs_at_once: int | None = None) -> dict[Key, str]:
    """The reasons of all jobs that no process survives."""
    from .bench_implementations import missing_modules

    items = list(
        dict.fromkeys(
            key(x, job)
            for job in jobs
            for x in job.implementations
            if x.kind in KINDS and not missing_modules(x.modules) and job.shape.table != "scaling"
        )
    )
    workers = jobs_at_once or max(1, (os.cpu_count() or 2) - 2)
    with ThreadPoolExecutor(workers) as pool:
        reasons = list(tqdm(pool.map(probe, items), total=len(items), desc="compile", unit="kernel set", disable=None))
    return {item: reason for item, reason in zip(items, reasons, strict=True) if reason}


def compile_ours(x: Implementation, shape: Shape, dtype: str) -> None:
    """Compile what the operator launches on the whole shape: which kernels those are depends on all of it."""
    from . import tune_measure

    options = dict(x.options)
    problem = tune_measure.make_problem(shape, dtype, tune_measure.this_architecture())
    wish = options.pop("descriptors", "")
    problem = dataclasses.replace(problem, **options)
    may = problem.descriptors and wish != "0"
    ways = (
        dataclasses.replace(problem, descriptors=may and problem.descriptors_pay(recorded))
        for recorded in (True, False)
    )
    tune_measure.compile_passes(*ways)


def main(name: str, *arguments: str) -> None:
    """Compile one implementation, a peer by running it once."""
    from . import bench_implementations

    *sizes, dtype_name = arguments
    implementation = next(x for x in IMPLEMENTATIONS if x.name == name)
    dtype = next(x for x in DTYPES if x.name == dtype_name)
    B, H, T, K, V = map(int, sizes)
    shape = Shape("probe", B, H, T, K, V)
    if implementation.kind == OURS:
        return compile_ours(implementation, shape, dtype_name)
    runner = bench_implementations.build(implementation, shape, dtype, "fw+bw", "cuda")
    runner.wait(runner.call(runner.operands(bench_implementations.make_inputs(shape, dtype, "cuda", 0))))


if __name__ == "__main__":
    main(*sys.argv[1:])
