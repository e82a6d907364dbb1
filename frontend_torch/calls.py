"""What is settled before a call's kernels run: checks, backend, strides, descriptors; kept for calls alike."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kernels_triton.problem import Problem
from kernels_triton.validation import check_call

from .executor import ALIGNMENT
from .tensors import architecture_of, backend_for, describe, head_strides, platform_of, readable_argument, suits

NAMES = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial")
RESULTS = ("h", "c_last", "n_last", "m_last")
PACKED = ("cu_seqlens", "chunks")  # for packed sequences: their offsets, their chunk table
ARGUMENTS = (*NAMES, "cu_seqlens", "chunk_table")  # the tensors' names to their callers
# "0": never through tensor descriptors; "1": wherever they may be had; else where they pay. The same bits.
descriptors = os.environ.get("MLSTM_DESCRIPTORS", "")
MAX_CALLS = 4096

Tensors = tuple[Tensor | None, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is settled before the kernels run, for arguments of given shapes, strides and dtypes."""

    problem: Problem
    alone: Problem  # of a forward pass without gradients: it may go through descriptors where `problem` does not
    backend: str
    transposed: bool  # tokens before heads in memory, though not in the layout


def is_transposed(v: Tensor, layout: str) -> bool:
    """Whether v is a (B, H, T, V) view of (B, T, H, V) memory, as models make it: outputs and gradients follow it."""
    _, head, token = head_strides(v, layout)
    return layout == "bhtd" and 0 < head < token


def _settle(problem: Problem, backend: str, tensors: Tensors) -> Call:
    strides = {
        name: head_strides(x, problem.layout) for name, x in zip(NAMES[:5], tensors, strict=False) if x is not None
    }
    q, v = tensors[0], tensors[2]
    assert q is not None and v is not None
    transposed = is_transposed(v, problem.layout)
    problem = dataclasses.replace(
        problem,
        strides=tuple(strides.items()),
        layout="bthd" if transposed else problem.layout,
        arch=architecture_of(q.device),
    )
    recorded, alone = (
        dataclasses.replace(problem, descriptors=_descriptors(problem, backend, tensors, x)) for x in (True, False)
    )
    return Call(recorded, alone, backend, transposed)


def _descriptors(problem: Problem, backend: str, tensors: Tensors, recorded: bool) -> bool:
    """Whether a pass reads its tensors through descriptors: on Hopper, where they were measured."""
    q, k, v = (x for x in tensors[:3] if x is not None)
    if backend != "triton" or problem.dtype != "bfloat16" or descriptors == "0" or platform_of(q) != "cuda":
        return False
    if descriptors != "1" and not problem.descriptors_pay(recorded):
        return False
    return architecture_of(q.device) == "sm_90" and all(suits(x) for x in (q, k, v))


# Calls that are settled, by all that they depend on: checking one takes longer than launching its kernels.
_calls: dict[Any, Call] = {}


def _settled(key: Any, tensors: Tensors) -> Call | None:
    """The call like an earlier one, if there was one; its tensors must be as well aligned."""
    try:
        call = _calls.get(key)
    except TypeError:  # an option that is not hashable, and so not valid: the checks will say so
        return None
    if call is None or (call.alone.descriptors and not _aligned(tensors)):
        return None
    return call


def _aligned(tensors: Tensors) -> bool:
    return all(x is None or x.data_ptr() % ALIGNMENT == 0 for x in tensors[:3])


def call_key(tensors: tuple[Any, ...], *options: Any) -> Any:
    """All that a call depends on; None if an argument is no tensor. Options with their types, since 1 == True."""
    try:
        of = tuple(
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x._is_zerotensor())
            for x in tensors
        )
    except (AttributeError, RuntimeError):  # a nested tensor has no shape
        return None
    return of, options, tuple(map(type, options)), descriptors


def _remember(key: Any, call: Call) -> None:
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = call


def settle(tensors: Tensors, options: Mapping[str, Any], form: str = "chunkwise") -> tuple[Call, Tensors]:
    """The call, checked, and its tensors as the kernels read them: axes in the order of the problem's layout.

    tensors: by NAMES, perhaps by ARGUMENTS; options: of `check_call`. Raises as it does.
    """
    key = call_key(tensors, form, *options.values())
    call = _settled(key, tensors)
    if call is None:
        infos = {name: describe(name, x) for name, x in zip(ARGUMENTS, tensors, strict=False)}
        problem = check_call(infos, **options, form=form)
        q = tensors[0]
        assert q is not None
        backend = backend_for(options["backend"], q)
        given = tensors
        if backend == "reference":
            call = Call(problem, problem, backend, transposed=False)
        else:
            tensors = tuple(readable_argument(n, x, problem.layout) for n, x in zip(ARGUMENTS, tensors, strict=False))
            call = _settle(problem, backend, tensors)
        if all(x is y for x, y in zip(tensors, given, strict=True)) and _aligned(tensors):
            _remember(key, call)
    m = tensors[7]
    if m is not None:
        tensors = (*tensors[:7], m.reshape(m.shape[:2]), *tensors[8:])
    if call.transposed:
        tensors = tuple(x.transpose(1, 2) if x is not None and n < 5 else x for n, x in enumerate(tensors))
    return call, tensors
