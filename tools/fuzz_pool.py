"""Worker processes that may die: each handles one call at a time, and what it dies of is an outcome like any other.

A worker starts Python anew (spawn), says when it is ready, and then answers call after call. If it ends, hangs or says
that its GPU context is broken, another one takes its place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .fuzz_call import Call, write
from .fuzz_check import Outcome, check

START_S = 240.0  # for imports and a GPU context, on a machine that is busy with many
Check = Callable[[Call, str], Outcome]


@dataclass(frozen=True)
class Settings:
    """What all workers have in common. `check` is a function that a new process can import."""

    device: str = "cpu"
    limit_s: float = 120.0  # for one call with all its checks
    threads: int = 1
    check: Check = check


def _serve(connection: Any, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    import torch

    torch.set_num_threads(settings.threads)
    connection.send("ready")
    while True:
        try:
            call = connection.recv()
        except EOFError:  # the parent is gone
            return
        connection.send(settings.check(call, settings.device))


class Worker:
    """One process at a time. For one thread, but for `stop`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.process: Any = None
        self.connection: Any = None
        self.started = 0  # processes so far
        self.stopped = False
        self.lock = threading.Lock()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.settings), daemon=True)
        with self.lock:
            if self.stopped:
                raise EOFError
            process.start()
            self.process, self.connection = process, here
            self.started += 1
        there.close()  # so that the end of the process is the end of the pipe
        if self._answer(START_S) is None:
            raise TimeoutError

    def _answer(self, limit_s: float) -> Any:
        """What the process says, or None if it says nothing in time. Raises EOFError if it is dead."""
        return self.connection.recv() if self.connection.poll(limit_s) else None

    def _end(self) -> str:
        """End the process; in words, how it ended."""
        process, self.process = self.process, None
        if process is None:
            return "it did not start"
        process.join(1.0)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join(10.0)
        with contextlib.suppress(OSError):
            self.connection.close()
        if code is not None and code < 0:
            return f"signal {-code}, {signal.Signals(-code).name}"
        return f"exit code {code}"

    def run(self, call: Call) -> Outcome:
        """The outcome of a call, whatever happens to the process."""
        limit = self.settings.limit_s
        try:
            if self.process is None:
                self._start()
            self.connection.send(call)
            outcome = self._answer(limit)
        except TimeoutError:
            self._end()
            return _failure(call, "no start", f"a new process was not ready within {START_S:.0f} s")
        except (EOFError, OSError):
            return _failure(call, "the process died", f"the process died: {self._end()}")
        if outcome is None:
            self._end()
            return _failure(call, "hangs", f"no result within {limit:.0f} s")
        if outcome.fatal:
            self._end()
        return outcome

    def stop(self) -> None:
        """End the process now, from any thread; a call in progress counts as died."""
        with self.lock:
            self.stopped = True
            process = self.process
        if process is not None and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _failure(call: Call, kind: str, text: str) -> Outcome:
    return Outcome(write(call), (text,), kind=kind, fatal=True)
