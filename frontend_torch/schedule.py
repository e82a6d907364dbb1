"""A pass on compiled kernels: arguments by number, so that a later run costs the host little more than its launches."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_triton.launch import Descriptor, Launch, Operand, Pass

from .tensors import dtype_of

STREAM = "(stream)"  # where the stream stands among the buffers of a pass
BEFORE = 9  # arguments of Triton's launcher before the kernel's: grid, stream, function, its metadata, three for hooks


@functools.cache
def _runtime() -> tuple[Any, Any]:
    """Triton's driver and its settings at run time; only where there is a GPU."""
    from triton import knobs
    from triton.runtime.driver import driver

    return driver, knobs.runtime


def _watched() -> bool:
    """Whether somebody, a profiler say, has hooked launches."""
    settings = _runtime()[1]
    hooks = settings.launch_enter_hook, settings.launch_exit_hook
    return any([x is not None and getattr(x, "calls", True) for x in hooks])


@dataclasses.dataclass(frozen=True)
class Step:
    """One launch: `pick` takes the launcher's arguments, constants too, from all values of the pass."""

    launch: Callable[..., Any]  # Triton's launcher itself: what `compiled[grid]` does for hooks takes as long again
    compiled: Any
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    made: tuple[tuple[int, str, tuple[int, ...], torch.dtype], ...]  # buffers of their own: number, name, shape, dtype
    read: tuple[tuple[int, int, Descriptor], ...]  # descriptors to make first: number, that of the buffer
    spent: tuple[str, ...]  # buffers that nothing needs after it


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a pass, and its values: addresses of inputs, of places in arenas; the stream; then `rest`.

    rest: constants, and None for what a run makes. earlier: the pass that what it reads was saved by; held here, since
    a schedule is kept by that pass's id.
    """

    places: tuple[tuple[int, ...], ...]  # of each arena that memory is given for: the earlier pass's, then its own
    rest: tuple[Any, ...]
    numbers: Mapping[str, int]
    steps: tuple[Step, ...]
    earlier: Pass | None

    def run(
        self, addresses: Sequence[int], memories: Sequence[Tensor], tensors: Mapping[str, Tensor], out: Any
    ) -> dict[str, Tensor]:
        """Launch; returns by name the buffers in memory of their own that are left.

        addresses: of the inputs; memories: of the arenas; tensors: the inputs; out: tensors for results.
        """
        device = next(iter(tensors.values())).device
        stream = _runtime()[0].active.get_current_stream(device.index)
        watched = _watched()
        values: list[Any] = [*addresses]
        for memory, places in zip(memories, self.places, strict=True):
            start = memory.data_ptr()
            values += [start + place for place in places]
        values += (stream, *self.rest)
        for name, x in out.items():
            if name in self.numbers:
                values[self.numbers[name]] = x.data_ptr()
        own: dict[str, Tensor] = {}
        for step in self.steps:
            for number, name, shape, dtype in step.made:
                if values[number] is None:
                    own[name] = x = torch.empty(shape, dtype=dtype, device=device)
                    values[number] = x.data_ptr()
            for number, buffer, descriptor in step.read:
                values[number] = descriptor_at(descriptor, values[buffer])
            if watched:
                _as_triton_does(step.compiled, *step.pick(values))
            else:
                step.launch(*step.pick(values))
            for name in step.spent:
                own.pop(name, None)
        return own


def _as_triton_does(compiled: Any, *arguments: Any) -> None:
    """A launch that tells those who watch."""
    grid, stream = arguments[:3], arguments[3]
    compiled[grid](*arguments[BEFORE:], stream=stream)


@functools.cache
def _descriptor_type() -> Any:
    """Triton's, only where there is a GPU."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


def as_descriptor(x: Descriptor, tensor: Tensor) -> Any:
    """Triton's descriptor of a tensor, checked."""
    return _descriptor_type()(tensor, list(x.shape), list(x.strides), list(x.block))


class Place:
    """An address, for who asks a tensor for its own."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def descriptor_at(x: Descriptor, address: int) -> Any:
    """`as_descriptor` of a tensor there, like one that has been checked: checks take five times as long as this."""
    made = object.__new__(_descriptor_type())  # what is not set is the class's default
    made.base, made.shape, made.strides, made.block_shape = Place(address), x.shape, x.strides, x.block
    return made


class _Numbers:
    """Numbers of a pass's values: inputs, places and the stream first, constants and what a run makes as they come."""

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


def _step(launch: Launch, compiled: Any, own: Container[str], numbers: _Numbers, spent: tuple[str, ...]) -> Step:
    """own: the buffers in memory of their own."""
    grid = [*map(numbers.constant, (launch.grid, 1, 1))]
    kernel = numbers.new(compiled.function), numbers.new(compiled.packed_metadata)
    before = [*grid, numbers.names[STREAM], *kernel, *[numbers.constant(None)] * 3]
    chosen = [numbers.of(x) for x in launch.arguments]
    read = tuple(
        (n, numbers.of(x.buffer), x) for n, x in zip(chosen, launch.arguments, strict=True) if isinstance(x, Descriptor)
    )
    made = tuple(
        (numbers.of(name), name, spec.shape, dtype_of(spec.dtype))
        for name, spec in launch.outputs.values()
        if name in own
    )
    pick = operator.itemgetter(*before, *chosen, *map(numbers.constant, launch.constants))
    return Step(compiled.run, compiled, pick, made, read, spent)


def schedule(program: Pass, kernels: Sequence[Any], inputs: Sequence[str], earlier: Pass | None) -> Schedule:
    """The schedule of a pass on compiled kernels, one for each launch.

    inputs: those in memory of their own; earlier: whose saved memory it reads besides.
    """
    arenas = (*([earlier.arenas[0]] if earlier else ()), *(x for x in program.arenas if x.size))
    placed = [name for arena in arenas for name in arena.places]
    numbers = _Numbers((*inputs, *placed, STREAM))
    own = program.specs.keys() - set(placed)  # what takes memory of its own
    launches = zip(program.launches, kernels, program.spent, strict=True)
    steps = tuple(_step(launch, x, own, numbers, tuple(own.intersection(spent))) for launch, x, spent in launches)
    places = tuple(tuple(arena.places.values()) for arena in arenas)
    return Schedule(places, tuple(numbers.rest), numbers.names, steps, earlier)
