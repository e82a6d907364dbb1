"""The operator's host plan: from a problem to its passes, launches as data. Pure functions, shared by all executors."""

from __future__ import annotations

import functools

from .builder import Builder
from .config import Config
from .launch import Pass
from .launch_builder import GATES
from .problem import Problem, Strides, contiguous_strides

INITIAL = ("c_initial", "n_initial", "m_initial")
LAST = ("c_last", "n_last", "m_last")
STATES = ("states", "norms")
GRADIENTS = ("dq", "dk", "dv", "di", "df")
GRADIENTS_INITIAL = ("dc_initial", "dn_initial", "dm_initial")


def _saved(b: Builder) -> tuple[str, ...]:
    """What the backward pass reads besides the inputs; the last states only where they have cotangents."""
    gates = tuple(x for x in GATES if b.pairs or not x.endswith("_low"))
    normaliser = ("n_last", "floor", "r") if b.p.normalize else ()
    states = STATES[: 1 + b.p.normalize] if b.p.save_states else ()
    return (*gates, "picked", *states, "c_last", *normaliser, *(("h",) if b.p.exact else ()))


def read_again(problem: Problem) -> tuple[str, ...]:
    """The arguments that the backward pass reads too."""
    initial = INITIAL[: 1 + problem.normalize] if problem.has_initial else ()
    return ("q", "k", "v", "f", *(("i",) if problem.input_gate == "sigmoid" else ()), *initial)


@functools.lru_cache(maxsize=1024)
def forward_pass(problem: Problem, save: bool = True, config: Config | None = None) -> Pass:
    """h, the last states, and to save, what the backward pass reads; states only as `problem.save_states` says.

    config: tile sizes other than the table's.
    """
    b = Builder(problem, config)
    inputs = ("q", "k", "v", "i", "f", *(INITIAL if problem.has_initial else ()))
    keep_states = save and problem.save_states
    launches = [b.gates_sums()] if b.split_gates else []
    launches.append(b.gates(split=b.split_gates))
    launches += [b.fused_forward(keep_states)] if b.config.fused else [*b.state_forward(), b.outputs()]
    results = dict.fromkeys(("h", *LAST, *(_saved(b) if save else ())))
    return Pass(tuple(launches), inputs, tuple(results))


@functools.lru_cache(maxsize=1024)
def backward_pass(
    problem: Problem, dh_strides: Strides | None = None, has_dlast: bool = False, config: Config | None = None
) -> Pass:
    """All gradients. `has_dlast`: cotangents of the last states are given (all three). config: as of `forward_pass`."""
    b = Builder(problem, config)
    b.strides["dh"] = dh_strides or contiguous_strides(problem.H, problem.T, problem.V, problem.layout)
    # n's cotangent is 0 where none is given and none flows through the normaliser.
    norms = problem.normalize and (problem.exact or has_dlast)
    launches = [b.normaliser()]
    if not problem.save_states:
        launches += b.state_forward(("unused_c_last", "unused_n_last"))
    if b.config.fused:
        launches.append(b.fused_backward(has_dlast, norms))
    else:
        launches += [*b.state_backward(has_dlast, has_dlast and norms, norms=norms), b.gradients(norms)]
    launches.append(b.gates_gradient(has_dlast, has_dlast))
    initial = problem.has_initial
    inputs = (
        *("dh", *read_again(problem)),
        *(x for x in _saved(b) if has_dlast or x not in LAST),
        *(("dc_last", "dn_last", "dm_last") if has_dlast else ()),
    )
    return Pass(tuple(launches), inputs, (*GRADIENTS, *(GRADIENTS_INITIAL if initial else ())))
