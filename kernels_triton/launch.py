"""A kernel launch as data, and a sequence of launches as a pass. Frontends and the interpreter only execute these."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """An output buffer: its shape and its dtype's name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Descriptor:
    """A buffer read or written through a tensor descriptor (Hopper's TMA): shape and strides in elements, block."""

    buffer: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


Operand = str | int | Descriptor


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The run-time parameters of a kernel and its constexprs, in order; the constexprs come last."""
    import triton.language as tl  # the reference backend works where Triton is not installed

    signature = inspect.signature(kernel.fn)
    constexprs = tuple(name for name, p in signature.parameters.items() if p.annotation is tl.constexpr)
    names = tuple(signature.parameters)
    if names[len(names) - len(constexprs) :] != constexprs:
        raise TypeError(f"{kernel.fn.__name__}: expected its constexprs after all other parameters, got {names}")
    return names[: len(names) - len(constexprs)], constexprs


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    operands: run-time inputs in the kernel's order; a str names a buffer, an int is a scalar, a Descriptor is a buffer
    by another way, be it an output's.
    outputs: the remaining run-time parameters, in order, each with the name of the buffer it creates; or, where an
    input has that name, adds to: then the two must be one memory, and `in_place` names them.
    """

    kernel: Any
    operands: Mapping[str, Operand]
    outputs: Mapping[str, tuple[str, Spec]]
    grid: int
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    in_place: tuple[tuple[str, str], ...] = ()  # outputs that may take the memory of an input: parameters of both

    def __post_init__(self) -> None:
        parameters, constexprs = _parameters(self.kernel)
        given = (*self.operands, *self.outputs)
        if given != parameters:
            raise TypeError(f"{self.name}: run-time parameters: expected {parameters}, got {given}")
        if self.constexprs.keys() != set(constexprs):
            raise TypeError(f"{self.name}: constexprs: expected {sorted(constexprs)}, got {sorted(self.constexprs)}")

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @functools.cached_property
    def constants(self) -> tuple[Any, ...]:
        """The constexprs' values in the kernel's order, as they follow the run-time arguments."""
        return tuple(self.constexprs[name] for name in _parameters(self.kernel)[1])

    @functools.cached_property
    def arguments(self) -> tuple[Operand, ...]:
        """The run-time arguments in the kernel's order, outputs by their buffers' names."""
        return (*self.operands.values(), *(buffer for buffer, _ in self.outputs.values()))

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of the buffers read, in the kernel's order; not of those written, through a descriptor too."""
        made = {name for name, _ in self.outputs.values()}
        read = (x.buffer if isinstance(x, Descriptor) and x.buffer not in made else x for x in self.operands.values())
        return tuple(x for x in read if isinstance(x, str))


# Bytes of a buffer up to which it shares memory with others, and what its place is a multiple of.
SMALL, STEP = 2**21, 256
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}


@dataclass(frozen=True)
class Arena:
    """Small buffers in one piece of memory: making many costs the host more than a GPU takes to fill them."""

    places: Mapping[str, int]  # each buffer's first byte
    size: int


@dataclass(frozen=True)
class Pass:
    """Launches in order, the buffers they start from, and those to hand on; `saved`: to a later pass alone."""

    launches: tuple[Launch, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    saved: tuple[str, ...] = ()

    def spec(self, name: str) -> Spec:
        """The shape and dtype of a buffer that the pass creates."""
        return self.specs[name]

    @functools.cached_property
    def arenas(self) -> tuple[Arena, Arena]:
        """Of the small buffers to save, and of those that nothing needs after the pass."""
        sizes = {name: math.prod(spec.shape) * WIDTHS[spec.dtype] for name, spec in self.specs.items()}
        small = {name: size for name, size in sizes.items() if size <= SMALL}
        scratch = [name for name in small if name not in self.results]
        return self._arena(small, [x for x in self.saved if x in small]), self._arena(small, scratch)

    @staticmethod
    def _arena(sizes: Mapping[str, int], names: Sequence[str]) -> Arena:
        ends = list(itertools.accumulate((-(-sizes[name] // STEP) * STEP for name in names), initial=0))
        return Arena(dict(zip(names, ends, strict=False)), ends[-1])

    @functools.cached_property
    def specs(self) -> Mapping[str, Spec]:
        """Every buffer that the pass creates; one name is one buffer."""
        found: dict[str, Spec] = {}
        for launch in self.launches:
            for buffer, spec in launch.outputs.values():
                if found.setdefault(buffer, spec) != spec:
                    raise TypeError(f"{launch.name}: {buffer}: expected {found[buffer]} as before, got {spec}")
        return found

    def __post_init__(self) -> None:
        _ = self.specs

    @functools.cached_property
    def kept(self) -> dict[Any, Any]:
        """What an executor keeps from one run of the pass to the next; it lives as long as the plan does."""
        return {}

    @functools.cached_property
    def spent(self) -> tuple[tuple[str, ...], ...]:
        """For each launch, the buffers that nothing needs after it: they may be freed."""
        needed, spent = set(self.results), []
        for launch in reversed(self.launches):
            there = {*launch.buffers, *(buffer for buffer, _ in launch.outputs.values())}
            if launch is self.launches[0]:
                there.update(self.inputs)
            spent.append(tuple(sorted(there - needed)))
            needed |= there
        return tuple(reversed(spent))
