"""The operator's host plan: from a problem to its passes, launches as data. Pure functions, shared by all executors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from .builder import Builder
from .config import Config
from .launch import Launch, Pass, Spec
from .launch_builder import GATES, NORMALISER, STATE_WEIGHT, LaunchBuilder
from .packing import chunk_table
from .problem import SHORT, Problem, Strides, contiguous_strides

INITIAL = ("c_initial", "n_initial", "m_initial")
LAST = ("c_last", "n_last", "m_last")
STATES = ("states", "norms")
GRADIENTS = ("dq", "dk", "dv", "di", "df")
GRADIENTS_INITIAL = ("dc_initial", "dn_initial", "dm_initial")


def _saved(b: LaunchBuilder) -> tuple[str, ...]:
    """What the backward pass reads besides the inputs; the last states only where they have cotangents."""
    gates = tuple(x for x in GATES if b.pairs or not x.endswith("_low"))
    normaliser = ("n_last", "floor", "r") if b.p.normalize else ()
    states = STATES[: 1 + b.p.normalize] if b.p.save_states else ()
    return (*gates, "picked", *states, "c_last", *normaliser, *(("h",) if b.p.exact else ()))


def _handed_on(b: LaunchBuilder, save: bool, last: bool = True) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The results of a forward pass: for its caller, who may want the last states, and for the backward pass alone."""
    own = ("h", *LAST) if last else ("h",)
    if not save or b.p.form == "recurrent":
        return own, ()
    table = ("chunks",) if b.packed and not b.p.has_table else ()
    return own, tuple(x for x in (*table, *_saved(b)) if x not in own)


def forward_results(problem: Problem, save: bool = True) -> dict[str, Spec]:
    """The results of `forward_pass`, without planning it: lengths may be a compiler's symbols."""
    b = LaunchBuilder(problem)
    return {name: b.handed_on[name] for names in _handed_on(b, save) for name in names}


def _is_recurrent(problem: Problem, save: bool) -> bool:
    """Token by token: asked for, or a short sequence without gradients, where chunks do not pay."""
    short = problem.T <= SHORT and problem.chunk_size is None and not save and not problem.sequences
    return problem.form == "recurrent" or short


def _inputs(problem: Problem) -> tuple[str, ...]:
    packed = ("chunks" if problem.has_table else "cu_seqlens",) if problem.sequences else ()
    return ("q", "k", "v", "i", "f", *(INITIAL if problem.has_initial else ()), *packed)


def _forward(b: Builder, save: bool) -> list[Launch]:
    """The chunkwise launches. save: with the chunk-start states."""
    launches = [chunk_table(b.p.T, b.p.sequences, b.L)] if b.packed and not b.p.has_table else []
    launches += [b.gates_sums()] if b.split_gates else []
    launches.append(b.gates(split=b.split_gates, rounded=False))
    return launches + ([*b.fused_forward(save)] if b.config.fused else [*b.state_forward(), b.outputs()])


@functools.lru_cache(maxsize=1024)
def forward_pass(
    problem: Problem, save: bool = True, config: Config | None = None, apart: bool = False, last: bool = True
) -> Pass:
    """h, the last states, and to save, what the backward pass reads; states only as `problem.save_states` says.

    config: tile sizes other than the table's. apart: what is saved is results as any other, none in shared memory.
    last: the last states are results.
    """
    b = Builder(problem, config)
    own, saved = _handed_on(b, save, last)
    short = _is_recurrent(problem, save)
    launches = [b.recurrent()] if short else _forward(b, save and problem.save_states)
    return Pass(tuple(launches), _inputs(problem), (*own, *saved), () if apart else saved)


@functools.lru_cache(maxsize=1024)
def backward_pass(
    problem: Problem, dh_strides: Strides | None = None, has_dlast: bool = False, config: Config | None = None
) -> Pass:
    """All gradients. `has_dlast`: cotangents of the last states are given (all three). config: as of `forward_pass`.

    The recurrent form saves nothing: its backward pass is that of the chunkwise form, after that form's forward pass.
    """
    b = _backward_builder(problem, dh_strides, config)
    # n's cotangent is 0 where none is given and none flows through the normaliser.
    norms = problem.normalize and (problem.exact or has_dlast)
    launches = _forward(b, save=True) if problem.form == "recurrent" else []
    launches += [
        b.normaliser(factor=b.finds_delta),
        *_backward(b, has_dlast, norms, b.finds_delta),
        *b.gates_gradient(has_dlast, has_dlast),
    ]
    return Pass(tuple(launches), _read(launches), _gradients(problem))


def _backward_builder(problem: Problem, dh_strides: Strides | None, config: Config | None = None) -> Builder:
    b = Builder(problem, config)
    b.strides["dh"] = dh_strides or contiguous_strides(problem.H, problem.T, problem.V, problem.layout)
    return b


def _backward(b: Builder, has_dlast: bool, norms: bool, find_delta: bool = False) -> list[Launch]:
    """From the normaliser to the sums for the gates' gradients. norms: n has a cotangent.

    find_delta: the normaliser's kernel left its cotangent's factor dh . h to the fused one.
    """
    launches = [] if b.p.save_states else [*b.state_forward(("unused_c_last", "unused_n_last"))]
    if b.config.dfused:
        return [*launches, b.fused_backward(has_dlast, norms, find_delta)]
    return [*launches, *b.state_backward(has_dlast, has_dlast and norms, norms=norms), b.gradients(norms)]


def _read(launches: Sequence[Launch]) -> tuple[str, ...]:
    """What launches start from, in order."""
    made: set[str] = set()
    read: dict[str, None] = {}
    for launch in launches:
        read |= dict.fromkeys(x for x in launch.buffers if x not in made)
        made |= {buffer for buffer, _ in launch.outputs.values()}
    return tuple(read)


def _gradients(problem: Problem) -> tuple[str, ...]:
    return (*GRADIENTS, *(GRADIENTS_INITIAL if problem.has_initial else ()))


@functools.lru_cache(maxsize=1024)
def saved(problem: Problem, has_dlast: bool) -> frozenset[str]:
    """What the backward pass reads but for cotangents: arguments, and results of the forward pass.

    has_dlast: the last states may have cotangents.
    """
    cotangents = {"dh", *(f"d{name}" for name in LAST)}
    return frozenset(x for y in (False, has_dlast) for x in backward_pass(problem, None, y).inputs) - cotangents


@functools.lru_cache(maxsize=1024)
def segment_state(problem: Problem) -> Pass:
    """What a segment of a longer sequence makes of a state of 0, in place of `forward_pass`'s outputs.

    `m_initial` is the stabiliser before it: of nothing, hence the lowest (`context.NO_STABILISER`). The sums of log f
    are those of `totals` over its last axis and the first two of the one before it.
    """
    b = Builder(problem)
    launches = (b.gates_sums(), b.gates(split=True, rounded=False), *b.segment_state())
    return Pass(launches, _read(launches), (*LAST, "totals"))


@functools.lru_cache(maxsize=1024)
def segment_cotangent(problem: Problem, dh_strides: Strides | None = None, has_dlast: bool = False) -> Pass:
    """A segment's own share of its initial state's cotangent, and the normaliser's share for `segment_backward`."""
    b = _backward_builder(problem, dh_strides)
    norms = problem.normalize
    scan = b.state_backward(has_dlast, has_dlast and norms, outer=False, norms=norms, keep=False)
    launches = (b.normaliser(), *scan)
    weight = (STATE_WEIGHT,) if b.pairs else ()
    return Pass(launches, _read(launches), (*GRADIENTS_INITIAL[:2], *NORMALISER, *weight))


@functools.lru_cache(maxsize=1024)
def segment_backward(problem: Problem, dh_strides: Strides | None = None, has_rho: bool = False) -> Pass:
    """All gradients of a segment, after `segment_cotangent`, whose last state has a cotangent.

    has_rho: `dm_last` is what is left of the last stabiliser's cotangent, elsewhere nothing is.
    """
    b = _backward_builder(problem, dh_strides)
    launches = (*_backward(b, True, problem.normalize), *b.gates_gradient(False, has_rho))
    return Pass(launches, _read(launches), _gradients(problem))


@functools.lru_cache(maxsize=1024)
def segment_saved(problem: Problem, has_dlast: bool) -> frozenset[str]:
    """`saved` of a segment, for its two backward passes and for what its frontend computes between them."""
    passes = (segment_cotangent(problem, None, has_dlast), segment_backward(problem, None, has_dlast))
    between = {"m_initial", "m_last", *(("picked", "c_last", "n_last") if has_dlast else ())}
    read = {x for y in passes for x in y.inputs} - {"dh", *NORMALISER, STATE_WEIGHT, *(f"d{name}" for name in LAST)}
    return frozenset(read | between)
