"""Finds the smallest call that still fails, field by field, within a number of tries and of seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from .fuzz_call import FIELDS, Call, cut, problem_of

TRIES, SECONDS = 40, 60.0
# Fields that a smaller call has at their defaults, and the values to try for those with numbers.
PLAIN = (
    *("split", "plant", "f_closed", "i_closed", "m_mean", "i_gate", "f_gate", "strided", "table", "gate_dtype"),
    *("f_dtype", "c_dtype", "eps", "qk_scale", "save_states", "precision", "normalizer_grad", "layout", "cotangents"),
    *("input_gate", "normalize", "gradients", "descriptors", "chunk_size", "initial", "last"),
)


def _smaller(x: int) -> list[int]:
    """Candidates below x, small ones first."""
    return sorted({y for y in (1, x // 4, x // 2, x - x // 4, x - 1) if 1 <= y < x})


def candidates(call: Call) -> Iterator[Call]:
    """Calls that are simpler by one field, the largest steps first; valid ones alone."""

    def changed(fields: dict[str, Any]) -> Iterator[Call]:
        try:
            found = dataclasses.replace(call, **fields)
            problem_of(found)
        except (TypeError, ValueError):
            return
        if found != call:
            yield found

    if call.lengths:
        yield from changed({"lengths": (), "plant": "", "table": False})
        for n in range(len(call.lengths)):
            rest = call.lengths[:n] + call.lengths[n + 1 :]
            if sum(rest):
                yield from changed({"lengths": rest, "T": sum(rest)})
    for name in ("B", "H"):
        for y in _smaller(getattr(call, name)):
            yield from changed({name: y})
    for y in _smaller(call.T):
        lengths = cut(call.lengths, y)
        yield from changed({"T": y, "lengths": lengths, "split": min(call.split, y - 1) if call.split else 0})
    for name in ("K", "V"):
        for y in _smaller(getattr(call, name)):
            yield from changed({name: y})
    for name in PLAIN:
        yield from changed({name: FIELDS[name]})
    if len(call.driven) > 1:
        for output in call.driven:
            yield from changed({"cotangents": (output,)})


def shrink(call: Call, fails: Callable[[Call], bool], tries: int = TRIES, seconds: float = SECONDS) -> tuple[Call, int]:
    """The smallest call found that fails, and how many were tried. Greedy: the first simpler one that fails is kept."""
    end = time.monotonic() + seconds
    tried, seen = 0, {call}
    while True:
        for candidate in candidates(call):
            if tried >= tries or time.monotonic() > end:
                return call, tried
            if candidate in seen:
                continue
            seen.add(candidate)
            tried += 1
            if fails(candidate):
                call = candidate
                break
        else:
            return call, tried
