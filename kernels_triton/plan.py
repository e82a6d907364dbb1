"""The operator's host plan: from a problem to its passes, launches as data. Pure functions, shared by all executors."""

from __future__ import annotations

import functools

from .builder import GATES, Builder
from .launch import Pass
from .problem import Problem, Strides, contiguous_strides

INITIAL = ("c_initial", "n_initial", "m_initial")
LAST = ("c_last", "n_last", "m_last")
# What the backward pass reads besides the inputs.
SAVED = (*GATES, "floor", "picked", "states", "norms", "c_last", "n_last", "h", "r")
GRADIENTS = ("dq", "dk", "dv", "di", "df")
GRADIENTS_INITIAL = ("dc_initial", "dn_initial", "dm_initial")


@functools.lru_cache(maxsize=1024)
def forward_pass(problem: Problem) -> Pass:
    """h, the last states, and what the backward pass reads."""
    b = Builder(problem)
    inputs = ("q", "k", "v", "i", "f", *(INITIAL if problem.has_initial else ()))
    return Pass((b.gates(), b.state_forward(), b.outputs()), inputs, (*SAVED, "m_last"))


@functools.lru_cache(maxsize=1024)
def backward_pass(problem: Problem, dh_strides: Strides | None = None, has_dlast: bool = False) -> Pass:
    """All gradients. `has_dlast`: cotangents of the last states are given (all three)."""
    b = Builder(problem)
    b.strides["dh"] = dh_strides or contiguous_strides(problem.H, problem.T, problem.V, problem.layout)
    launches = (
        b.normaliser(),
        b.state_backward(has_dlast, has_dlast),
        b.gradients(),
        b.gates_gradient(has_dlast, has_dlast),
    )
    initial = problem.has_initial
    inputs = (
        *("q", "k", "v", "f", "dh"),
        *SAVED,
        *(INITIAL[:2] if initial else ()),
        *(("dc_last", "dn_last", "dm_last") if has_dlast else ()),
    )
    return Pass(launches, inputs, (*GRADIENTS, *(GRADIENTS_INITIAL if initial else ())))
