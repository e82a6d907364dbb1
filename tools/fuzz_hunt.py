"""Runs many random calls in worker processes, shrinks what fails, and sums up."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .fuzz_call import Call, read
from .fuzz_check import Outcome
from .fuzz_pool import Settings, Worker
from .fuzz_shrink import TRIES, shrink

SHRUNK = 12  # failures, each of a kind of its own, that are shrunk; others are as a rule the same again


@dataclass(frozen=True)
class Failure:
    """A call that failed, and the smallest one found that fails in the same way."""

    outcome: Outcome
    smallest: Outcome
    tried: int = 0  # calls, to find it

    def json(self) -> dict[str, Any]:
        return {
            "repro": self.smallest.line,
            "problems": self.smallest.problems,
            "kind": self.smallest.kind,
            "found": self.outcome.line,
            "found_problems": self.outcome.problems,
            "tried": self.tried,
        }


@dataclass
class Hunt:
    """What a hunt found so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    processes: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failed(self) -> int:
        return sum(not x.ok for x in self.outcomes)


@dataclass(frozen=True)
class Limits:
    """When a hunt ends: after so many calls or seconds, whichever comes first; and how long a failure is shrunk."""

    count: int | None = None
    seconds: float | None = None
    shrink_s: float = 60.0


def same_way(x: Outcome, y: Outcome) -> bool:
    """Whether two calls fail in the same way: both are inaccurate, say, or both end their process."""
    return not x.ok and not y.ok and x.kind.partition(":")[0] == y.kind.partition(":")[0]


class _Hunter:
    """The threads of a hunt; each has a worker process, and takes group after group."""

    def __init__(self, groups: Iterator[list[Call]], settings: Settings, jobs: int, limits: Limits):
        self.groups, self.limits = groups, limits
        self.workers = [Worker(settings) for _ in range(jobs)]
        self.end = time.monotonic() + (limits.seconds if limits.seconds is not None else 1e9)
        self.drawn = 0
        self.kinds: set[str] = set()
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.found: queue.Queue[Outcome | Failure | BaseException] = queue.Queue()
        self.threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in self.workers]

    @property
    def over(self) -> bool:
        return self.stopped.is_set() or time.monotonic() > self.end

    def _next(self) -> list[Call]:
        """The next calls that share their kernels; none when the hunt is over."""
        with self.lock:
            left = 10**9 if self.limits.count is None else self.limits.count - self.drawn
            if self.over or left <= 0:
                return []
            calls = next(self.groups)[:left]
            self.drawn += len(calls)
            return calls

    def _work(self, worker: Worker) -> None:
        try:
            while calls := self._next():
                for call in calls:
                    if self.over:
                        break
                    outcome = worker.run(call)
                    if self.stopped.is_set():
                        return
                    self.found.put(outcome)
                    if not outcome.ok:
                        self.found.put(self._shrunk(worker, call, outcome))
        except BaseException as error:  # a defect of the hunter itself: for the main thread to raise
            self.found.put(error)
        finally:
            worker.stop()

    def _shrunk(self, worker: Worker, call: Call, outcome: Outcome) -> Failure:
        with self.lock:
            new = outcome.kind not in self.kinds and len(self.kinds) < SHRUNK
            self.kinds.add(outcome.kind)
        smallest = [outcome]

        def fails(candidate: Call) -> bool:
            if self.stopped.is_set():
                return False
            found = worker.run(candidate)
            if same_way(found, outcome) and not self.stopped.is_set():
                smallest.append(found)
                return True
            return False

        seconds = min(self.limits.shrink_s, self.end - time.monotonic())
        _, tried = shrink(call, fails, TRIES, seconds) if new else (call, 0)
        return Failure(outcome, smallest[-1], tried)


def hunt(groups: Iterator[list[Call]], settings: Settings, jobs: int, limits: Limits, *, progress: bool = True) -> Hunt:
    """Run calls until the limits are reached. On Ctrl-C the workers are ended and what was found is returned."""
    hunter, result, start = _Hunter(groups, settings, jobs, limits), Hunt(), time.monotonic()
    bar = tqdm(total=limits.count, desc="fuzz", unit="call", disable=None if progress else True)
    for thread in hunter.threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in hunter.threads) or not hunter.found.empty():
            with contextlib.suppress(queue.Empty):
                found = hunter.found.get(timeout=0.1)
                if isinstance(found, BaseException):
                    raise found
                if isinstance(found, Failure):
                    result.failures.append(found)
                    bar.write(f"FAILED  {found.smallest.line}\n        {'; '.join(found.smallest.problems)}")
                    continue
                result.outcomes.append(found)
                bar.set_postfix(ok=len(result.outcomes) - result.failed, failed=result.failed, refresh=False)
                bar.update()
    except KeyboardInterrupt:
        result.interrupted = True
    finally:
        hunter.stopped.set()
        for worker in hunter.workers:
            worker.stop()
        for thread in hunter.threads:
            thread.join(5.0)
        bar.close()
    # A failure whose shrinking was interrupted is kept as it was found.
    reported = {failure.outcome.line for failure in result.failures}
    result.failures += [Failure(x, x) for x in result.outcomes if not x.ok and x.line not in reported]
    result.processes = sum(worker.started for worker in hunter.workers)
    result.seconds = time.monotonic() - start
    return result


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counter.most_common()) or "none"


def summary(result: Hunt) -> list[str]:
    """What ran and what came of it, a fact a line."""
    outcomes = result.outcomes
    calls = [read(x.line) for x in outcomes]
    worst = max((x for x in outcomes if x.ok), key=lambda x: x.worst, default=None)
    lines = [
        f"{len(outcomes)} calls, each through PyTorch and JAX: {result.failed} failed; {result.seconds:.0f} s"
        + ("; interrupted" if result.interrupted else ""),
        f"head shapes: {len({(x.K, x.V) for x in calls})} distinct; processes: {result.processes}",
        f"dtypes: {_counts(Counter(x.dtype for x in calls))}",
        f"forms: {_counts(Counter(x.form for x in calls))}",
        f"ways through the plan: {_counts(Counter(way for x in outcomes for way in x.ways))}",
        f"calls by kernel: {_counts(Counter(name for x in outcomes for name in set(x.kernels)))}",
        f"tensors against float64: {sum(len(x.rows) for x in outcomes)}",
    ]
    if worst is not None and worst.rows:
        tensor, error, tolerance = max(worst.rows, key=lambda row: row[1] / row[2])
        lines.append(f"worst error that passed: {worst.worst:.2f} of its tolerance, {tensor} of {worst.line}")
        lines[-1] += f" ({error:.1e}, {tolerance:.1e} allowed)"
    kinds = Counter(x.kind for x in outcomes if not x.ok)
    return lines + ([f"failures: {_counts(kinds)}"] if kinds else [])


def write_json(path: Path, result: Hunt, facts: dict[str, str]) -> None:
    """The failures, and what was run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        **facts,
        "calls": len(result.outcomes),
        "failed": result.failed,
        "seconds": round(result.seconds, 1),
        "interrupted": result.interrupted,
        "failures": [failure.json() for failure in result.failures],
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
