"""A random call of the hunt: what it is, the arrays it gets, and how it is written on one line."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels_triton.builder import Builder
from kernels_triton.plan import backward_pass, forward_pass
from kernels_triton.problem import Problem
from kernels_triton.validation import ArrayInfo, check_call

from .cases import Arrays, Case, make_inputs

STATES = ("c_initial", "n_initial", "m_initial")


@dataclass(frozen=True)
class Call(Case):
    """A case of the hunt: a call, its random inputs, and what is checked about it besides."""

    name: str = ""
    seed: int = 0
    f_closed: float = 0.0  # forget gates that are closed have this pre-activation, some of T; 0: none is closed
    i_closed: float = 0.0  # input gates alike
    m_mean: float = 0.0  # of the initial stabiliser
    descriptors: bool = True  # PyTorch reads through descriptors whenever supported
    split: int = 0  # also run as two calls, cut after so many tokens; 0: not
    plant: str = ""  # the input that is made NaN in one packed sequence, whose neighbours must not notice

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split and not (self.initial and self.last and self.split < self.T and not self.lengths):
            raise ValueError(f"split: expected states, no packed sequences and split < T, got {self}")
        if self.plant and (len(self.lengths) < 2 or self.plant not in self.inputs):
            raise ValueError(f"plant: expected an input of packed sequences, got {self}")
        if self.table and not (self.lengths and self.chunk_size):
            raise ValueError(f"table: expected packed sequences and a chunk size, got {self}")


def case_of(call: Call, **changes: Any) -> Case:
    """The call as a case of the table, without what the hunt checks about it besides."""
    fields = {x.name: getattr(call, x.name) for x in dataclasses.fields(Case)}
    return Case(**(fields | changes))


def make_arrays(call: Call) -> Arrays:
    """Inputs and cotangents of a call, in their own dtypes; tokens after heads."""
    arrays = make_inputs(call, call.seed)
    rng = np.random.default_rng([call.seed, 1])
    for name, value in (("f", call.f_closed), ("i", call.i_closed)):
        if value:
            closed = rng.random((call.B, call.H, call.T)) < 1 / 9
            closed[:, :, rng.integers(call.T)] = True
            with np.errstate(over="ignore"):  # -1e6 is -inf in float16
                arrays[name] = np.where(closed, np.array(value, arrays[name].dtype), arrays[name])
    if "m_initial" in arrays:
        arrays["m_initial"] = arrays["m_initial"] + np.float32(call.m_mean)
    return arrays


def plant(call: Call, arrays: Arrays) -> tuple[Arrays, int]:
    """The arrays with NaN in one input of one packed sequence, and that sequence."""
    rng = np.random.default_rng([call.seed, 2])
    s = int(rng.choice([n for n, length in enumerate(call.lengths) if length]))
    x = arrays[call.plant].copy()
    if call.plant in STATES:
        x[s] = np.nan
    else:
        token = call.offsets[s] + int(rng.integers(call.lengths[s]))
        x[:, :, token] = np.nan
    return {**arrays, call.plant: x}, s


def of_others(call: Call, name: str, x: np.ndarray, s: int) -> np.ndarray:
    """The part of a result that belongs to all packed sequences but one."""
    if "_" in name:
        return np.delete(x, s, axis=0)
    return np.delete(x, np.arange(call.offsets[s], call.offsets[s + 1]), axis=2)


def problem_of(call: Call) -> Problem:
    """The problem that the operator makes of the call. Raises as `check_call` does."""
    bthd = call.layout == "bthd"
    infos: dict[str, ArrayInfo | None] = {}
    for name in call.inputs:
        shape = call.shape(name)
        if bthd and "_" not in name:
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        infos[name] = ArrayInfo(shape, call.dtype_of(name), "")
    if call.lengths:
        infos["cu_seqlens"] = ArrayInfo((len(call.lengths) + 1,), "int32", "")
    options = {"chunk_size": None, "normalizer_grad": "exact", "layout": "bhtd", "precision": "ieee"} | call.options()
    options.pop("return_last_states", None)
    form = "chunkwise" if call.form == "chunkwise" else "recurrent"
    problem = check_call(infos, **options, backend="auto", form=form)
    return dataclasses.replace(problem, has_table=call.table)


def kernels(call: Call) -> tuple[str, ...]:
    """The kernels that the call launches, in order, each as often as it is."""
    problem = problem_of(call)
    launches = [*forward_pass(problem, call.gradients).launches]
    if call.gradients:
        has_dlast = any(name != "h" for name in call.driven)
        launches += backward_pass(problem, None, has_dlast).launches
    return tuple(launch.name for launch in launches)


def ways(call: Call) -> frozenset[str]:
    """The ways through the plan that the call takes."""
    problem = problem_of(call)
    b, found = Builder(problem), set[str]()
    short = kernels(dataclasses.replace(call, gradients=False, cotangents=())) == ("recurrent",)
    chunked = not short or call.gradients  # the recurrent form's gradients are the chunkwise form's
    if short:
        found.add("token by token")
    if chunked:
        found.add("fused forward" if b.config.fused else "scan forward")
        found |= {"split gates"} if b.split_gates else set()
        found |= {f"{'fused' if b.config.fused else 'scan'} forward in parts"} if b.segments(False) > 1 else set()
    if call.gradients:
        found.add("fused backward" if b.config.dfused else "scan backward")
        found |= {"scan backward in parts"} if not b.config.dfused and b.segments(True) > 1 else set()
    return frozenset(found | ({"packed"} if call.lengths else set()) | ({"chunk table"} if call.table else set()))


def work(call: Call) -> float:
    """Elements that the call reads or keeps, as a bound on memory: tokens, and the states of its chunks."""
    chunks = call.T // (call.chunk_size or 64) + max(1, len(call.lengths))
    return call.B * call.H * (call.T * (call.K + call.V + 64) + chunks * call.K * call.V)


# A line such as "K=97 V=64 dtype=bfloat16 seed=3": every field that differs from a plain call's.
FIELDS: Mapping[str, Any] = {x.name: x.default for x in dataclasses.fields(Call) if x.name not in ("name", "gpu")}
_NUMBERS = {"chunk_size": int, "qk_scale": float}  # None by default


def _write(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def write(call: Call) -> str:
    """The call on one line, for --repro."""
    always = ("K", "V", "T", "B", "H", "dtype", "seed")
    names = [*always, *(name for name in FIELDS if name not in always)]
    given = {name: getattr(call, name) for name in names}
    return " ".join(f"{name}={_write(x)}" for name, x in given.items() if name in always or x != FIELDS[name])


def read_value(name: str, text: str) -> Any:
    """A field's value from its text. Raises ValueError with the field, what was expected and what came."""
    if name not in FIELDS:
        raise ValueError(f"expected one of the fields {', '.join(FIELDS)}, got {name!r}")
    default = FIELDS[name]
    try:
        if default is None:
            return None if text == "None" else _NUMBERS[name](text)
        if isinstance(default, bool):
            return {"True": True, "False": False}[text]
        if name == "cotangents":
            return tuple(text.split(",")) if text else ()
        if isinstance(default, tuple):
            number = float if name.endswith("_gate") else int
            values = tuple(number(x) for x in text.split(",") if x)
            if name.endswith("_gate") and len(values) != 2:
                raise ValueError
            return values
        return type(default)(text)
    except (ValueError, KeyError):
        kind = "True or False" if isinstance(default, bool) else f"a value such as {_write(default)!r}"
        raise ValueError(f"{name}: expected {kind}, got {text!r}") from None


def read(line: str) -> Call:
    """The call that `write` wrote. Raises ValueError for a field or value that is none, and for no valid call."""
    found: dict[str, Any] = {}
    for term in line.split():
        name, equals, text = term.partition("=")
        if not equals:
            raise ValueError(f"expected field=value, got {term!r}")
        found[name] = read_value(name, text)
    call = Call(**found)
    try:
        problem_of(call)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return call


def cut(lengths: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """The lengths of packed sequences after so many tokens in all."""
    ends = [min(end, tokens) for end in itertools.accumulate(lengths)]
    return tuple(stop - start for start, stop in itertools.pairwise((0, *ends)))
