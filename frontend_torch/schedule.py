"""A pass on compiled kernels: arguments by number, so that a later run costs the host little more than its launches."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_triton.launch import Descriptor, Launch, Operand, Pass

from .tensors import dtype_of

Runner = Callable[..., Any]  # of a compiled kernel on a grid: takes the arguments, and the stream


@dataclasses.dataclass(frozen=True)
class Step:
    """One launch: `pick` takes its arguments, constants too, from all values of the pass."""

    run: Runner
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    made: tuple[tuple[int, str, tuple[int, ...], torch.dtype], ...]  # buffers of their own: number, name, shape, dtype
    read: tuple[tuple[int, Descriptor], ...]  # descriptors to make first, by number
    spent: tuple[str, ...]  # buffers that nothing needs after it


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a pass, and its values: addresses of inputs, of places in arenas; then `rest`.

    rest: constants, and None for what a run makes. earlier: the pass that what it reads was saved by; held here, since
    a schedule is kept by that pass's id.
    """

    places: tuple[tuple[int, ...], ...]  # of each arena that memory is given for: the earlier pass's, then its own
    rest: tuple[Any, ...]
    numbers: Mapping[str, int]
    steps: tuple[Step, ...]
    earlier: Pass | None

    def run(
        self, addresses: Sequence[int], memories: Sequence[Tensor], tensors: Mapping[str, Tensor], out: Any, stream: int
    ) -> dict[str, Tensor]:
        """Launch; returns by name the buffers in memory of their own that are left.

        addresses: of the inputs; memories: of the arenas; tensors: the inputs; out: tensors for results.
        """
        values: list[Any] = [*addresses]
        for memory, places in zip(memories, self.places, strict=True):
            start = memory.data_ptr()
            values += [start + place for place in places]
        values += self.rest
        for name, x in out.items():
            if name in self.numbers:
                values[self.numbers[name]] = x.data_ptr()
        device = next(iter(tensors.values())).device
        own: dict[str, Tensor] = {}
        for step in self.steps:
            for number, name, shape, dtype in step.made:
                if values[number] is None:
                    own[name] = x = torch.empty(shape, dtype=dtype, device=device)
                    values[number] = x.data_ptr()
            for number, descriptor in step.read:
                buffer = descriptor.buffer
                values[number] = as_descriptor(descriptor, own[buffer] if buffer in own else tensors[buffer])
            step.run(*step.pick(values), stream=stream)
            for number, _ in step.read:
                values[number] = None  # it holds its tensor
            for name in step.spent:
                own.pop(name, None)
        return own


def as_descriptor(x: Descriptor, tensor: Tensor) -> Any:
    """Triton's descriptor of a tensor."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # only where there is a GPU

    return TensorDescriptor(tensor, list(x.shape), list(x.strides), list(x.block))


class _Numbers:
    """Numbers of a pass's values: of inputs and places first, of constants and what a run makes as they come."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = {name: n for n, name in enumerate(names)}
        self.rest: list[Any] = []
        self._first = len(names)
        self._constants: dict[Any, int] = {}

    def new(self, value: Any = None) -> int:
        self.rest.append(value)
        return self._first + len(self.rest) - 1

    def of(self, x: Operand) -> int:
        """Of an argument: a buffer has one number, a descriptor one each time."""
        if isinstance(x, Descriptor):
            return self.new()
        if not isinstance(x, str):
            return self.constant(x)
        if x not in self.names:
            self.names[x] = self.new()
        return self.names[x]

    def constant(self, x: Any) -> int:
        key = type(x), x  # 1 and True are two
        if key not in self._constants:
            self._constants[key] = self.new(x)
        return self._constants[key]


def _step(launch: Launch, run: Runner, own: Container[str], numbers: _Numbers, spent: tuple[str, ...]) -> Step:
    """own: the buffers in memory of their own."""
    chosen = [numbers.of(x) for x in launch.arguments]
    read = tuple((n, x) for n, x in zip(chosen, launch.arguments, strict=True) if isinstance(x, Descriptor))
    made = tuple(
        (numbers.of(name), name, spec.shape, dtype_of(spec.dtype))
        for name, spec in launch.outputs.values()
        if name in own
    )
    pick = operator.itemgetter(*chosen, *map(numbers.constant, launch.constants))
    return Step(run, pick, made, read, spent)


def schedule(program: Pass, runners: Sequence[Runner], inputs: Sequence[str], earlier: Pass | None) -> Schedule:
    """The schedule of a pass on compiled kernels, one for each launch.

    inputs: those in memory of their own; earlier: whose saved memory it reads besides.
    """
    arenas = (*([earlier.arenas[0]] if earlier else ()), *(x for x in program.arenas if x.size))
    placed = [name for arena in arenas for name in arena.places]
    numbers = _Numbers((*inputs, *placed))
    own = program.specs.keys() - set(placed)  # what takes memory of its own
    launches = zip(program.launches, runners, program.spent, strict=True)
    steps = tuple(_step(launch, run, own, numbers, tuple(own.intersection(spent))) for launch, run, spent in launches)
    places = tuple(tuple(arena.places.values()) for arena in arenas)
    return Schedule(places, tuple(numbers.rest), numbers.names, steps, earlier)
