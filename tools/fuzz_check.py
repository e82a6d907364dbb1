"""Checks one random call: against float64, PyTorch against JAX, run after run, split in two, and beside a NaN."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import compare
from .cases import Arrays
from .fuzz_call import Call, case_of, kernels, make_arrays, of_others, plant, ways, write
from .fuzz_tolerance import tolerances, within_range
from .parity import BACKENDS

POISON = 2**26  # bytes, at least, that are filled before a call on a GPU
SMALL = 2**19  # bytes of the blocks that PyTorch cuts small tensors from

Change = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Outcome:
    """What came of a call. Plain values alone: it goes from process to process and to a JSON file."""

    line: str  # the call, as `fuzz_call.write` has it
    problems: tuple[str, ...] = ()  # none: the call is fine
    rows: tuple[tuple[str, float, float], ...] = ()  # tensor, error, tolerance
    kernels: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    seconds: float = 0.0
    fatal: bool = False  # the process that had it can run nothing more
    kind: str = ""  # of the first problem, to tell failures apart: what is wrong, perhaps ": " and where

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> float:
        """The largest error, in units of its tolerance."""
        return max((error / tolerance for _, error, tolerance in self.rows), default=0.0)


def poison(call: Call, device: str) -> None:
    """Fill the memory that PyTorch hands out next with NaN: large blocks, and the small ones that it cuts up."""
    if device != "cuda":
        return  # the interpreter does so by itself
    import torch

    size = max(POISON, 16 * call.B * call.H * call.T * (call.K + call.V) + 16 * call.B * call.H * call.K * call.V)
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for _ in range(2)]
    blocks += [torch.full((SMALL,), 0xFF, dtype=torch.uint8, device=device) for _ in range(32)]
    del blocks


def in_two(function: Callable[..., Any], at: int, axis: int) -> Callable[..., Any]:
    """The operator as two calls, the state handed on; differentiable through both."""

    def call(q: Any, k: Any, v: Any, i: Any, f: Any, **options: Any) -> Any:
        tokens = (q, k, v, i, f)
        first = [x.narrow(axis, 0, at) for x in tokens]
        second = [x.narrow(axis, at, x.shape[axis] - at) for x in tokens]
        states = {name: options.pop(name) for name in ("c_initial", "n_initial", "m_initial")}
        h, last = function(*first, *states.values(), **options)
        h_rest, last = function(*second, *last, **options)
        return importlib.import_module("torch").cat([h, h_rest], dim=axis), last

    return call


def belonging(truth: Arrays, results: Arrays) -> Arrays:
    """By what the truth's last C and n are multiplied for the stabiliser that the results have; nothing without one.

    Only C e^m and n e^m have meaning, and the m handed on with them is rounded: one of -60 by 2e-6, of -1e6 by 0.03.
    """
    if "m_last" not in truth or not np.isfinite(truth["m_last"]).all():
        return {}
    away = truth["m_last"] - results["m_last"].astype(np.float64)  # if much, m_last itself is a failure
    most = np.maximum(1e-3, 2.0**-23 * np.abs(truth["m_last"]))
    factor = np.exp(np.clip(np.nan_to_num(away), -most, most))
    return {"c_last": factor[..., None, None], "n_last": factor[..., None]}


def _differing(x: Arrays, y: Arrays) -> list[str]:
    return [name for name in x if not compare.identical(x[name], y[name])]


class Checker:
    """The checks of one call. change: made to PyTorch's results first, by tests, to see that the checks see it."""

    def __init__(self, call: Call, device: str, change: Change | None = None):
        self.call, self.device, self.change = call, device, change
        self.options = call.options() | {"backend": BACKENDS[device]}
        self.problems: list[str] = []
        self.kinds: list[str] = []
        self.rows: list[tuple[str, float, float]] = []

    def problem(self, kind: str, text: str) -> None:
        self.kinds.append(kind)
        self.problems.append(text)

    def torch(self, arrays: Arrays, function: Callable[..., Any] | None = None) -> Arrays:
        poison(self.call, self.device)
        function = function or compare.frontend("torch", self.call.form)
        return compare.run_torch(function, self.options, self.call, arrays, self.device)

    def against_truth(self, results: Arrays, truth: Arrays, tolerance: dict[str, float], what: str = "") -> None:
        factors = belonging(truth, results)
        for name in truth:
            found, error = results[name], math.inf
            # A state in bfloat16 is rounded far more than its stabiliser.
            for x in (truth[name], truth[name] * factors.get(name, 1.0)):
                error = min(error, compare.frobenius_error(within_range(found, x, found.dtype), x))
            self.rows.append((what + name, error, tolerance[name]))
            if not error <= tolerance[name]:
                kind = f"accuracy: {what}{name} of {self.call.dtype}"
                self.problem(kind, f"{what}{name}: error {error:.1e}, tolerance {tolerance[name]:.1e}")

    def neighbours(self, arrays: Arrays, results: Arrays) -> None:
        """NaN in one packed sequence leaves the bits of all others."""
        planted, s = plant(self.call, arrays)
        beside = self.torch(planted)
        moved = [
            name
            for name, x in results.items()
            if not compare.identical(of_others(self.call, name, x, s), of_others(self.call, name, beside[name], s))
        ]
        if moved:
            text = f"NaN in {self.call.plant} of sequence {s} changes its neighbours' {', '.join(moved)}"
            self.problem("a NaN reaches neighbours", text)

    def run(self) -> None:
        call, arrays = self.call, make_arrays(self.call)
        results = self.torch(arrays)
        if self.change:
            results = self.change(results)
        again = self.torch(arrays)
        if self.change:
            again = self.change(again)
        if moved := _differing(results, again):
            self.problem("other bits in a second run", f"other bits in a second run: {', '.join(moved)}")
        jax = compare.run_jax(compare.frontend("jax", call.form), self.options, call, arrays, self.device)
        if different := _differing(results, jax):
            most = max(compare.max_relative(results[name], jax[name]) for name in different)
            self.problem(
                "PyTorch and JAX differ", f"PyTorch and JAX differ: {', '.join(different)}, relatively by {most:.1e}"
            )
        truth = compare.truth(case_of(call), arrays, self.device)
        undefined = [name for name, x in truth.items() if not np.isfinite(x).all()]
        undefined = [name for name in undefined if not name.startswith("m")]
        if undefined:
            raise ValueError(f"expected a call with a finite result, got {', '.join(undefined)}")
        cotangents = {f"d_{name}": x for name, x in belonging(truth, results).items() if f"d_{name}" in arrays}
        if any(np.abs(x - 1).max() > 1e-6 for x in cotangents.values()):  # they are of the C and n that results have
            scaled = {name: arrays[name].astype(np.float64) * x for name, x in cotangents.items()}
            truth |= {
                name: x
                for name, x in compare.truth(case_of(call), arrays | scaled, self.device).items()
                if name.startswith("d")
            }
        tolerance = tolerances(call, arrays, truth, self.device)
        self.against_truth(results, truth, tolerance)
        if call.split:
            operator = compare.frontend("torch", call.form)
            parts = self.torch(arrays, in_two(operator, call.split, 1 if call.layout == "bthd" else 2))
            self.against_truth(parts, truth, tolerance, "in two calls, ")
        if call.plant:
            self.neighbours(arrays, results)


def _is_fatal(error: BaseException) -> bool:
    """Whether a GPU's context is broken: every later call in the process would fail."""
    text = f"{type(error).__name__}: {error}".lower()
    return any(x in text for x in ("cuda error", "cuda_error", "acceleratorerror", "illegal memory", "xlaruntimeerror"))


def check(call: Call, device: str = "cpu", change: Change | None = None) -> Outcome:
    """Run a call and all checks; whatever it raises is a problem of the call. The environment: `parity.prepare`."""
    from frontend_torch import calls

    start = time.perf_counter()
    checker, fatal = Checker(call, device, change), False
    calls.descriptors = "1" if call.descriptors else "0"
    try:
        checker.run()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        checker.problem(type(error).__name__, f"{type(error).__name__}: {text}")
        fatal = device == "cuda" and _is_fatal(error)
    if device == "cuda":
        with contextlib.suppress(Exception):  # a broken context
            importlib.import_module("torch").cuda.empty_cache()  # for JAX, and for the processes beside this one
    rows = tuple((n, e if math.isfinite(e) else math.inf, t) for n, e, t in checker.rows)
    return Outcome(
        line=write(call),
        problems=tuple(checker.problems),
        rows=rows,
        kernels=kernels(call),
        ways=tuple(sorted(ways(call))),
        seconds=time.perf_counter() - start,
        fatal=fatal,
        kind=checker.kinds[0] if checker.kinds else "",
    )
