"""A kernel launch as data, and a sequence of launches as a pass. Frontends and the interpreter only execute these."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """An output buffer: its shape and its dtype's name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Descriptor:
    """A buffer read through a tensor descriptor (Hopper's TMA): its shape and strides in elements, and the block."""

    buffer: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


Operand = str | int | Descriptor


@functools.cache
def _parameters(kernel: Any) -> tuple[tuple[str, ...], frozenset[str]]:
    """The run-time parameters of a kernel, in order, and its constexprs."""
    import triton.language as tl  # the reference backend works where Triton is not installed

    signature = inspect.signature(kernel.fn)
    constexprs = frozenset(name for name, p in signature.parameters.items() if p.annotation is tl.constexpr)
    return tuple(name for name in signature.parameters if name not in constexprs), constexprs


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    operands: run-time inputs in the kernel's order; a str names a buffer, an int is a scalar, a Descriptor is a buffer
    by another way.
    outputs: the remaining run-time parameters, in order, each with the name of the buffer it creates.
    """

    kernel: Any
    operands: Mapping[str, Operand]
    outputs: Mapping[str, tuple[str, Spec]]
    grid: int
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        parameters, constexprs = _parameters(self.kernel)
        given = (*self.operands, *self.outputs)
        if given != parameters:
            raise TypeError(f"{self.name}: run-time parameters: expected {parameters}, got {given}")
        if self.constexprs.keys() != constexprs:
            raise TypeError(f"{self.name}: constexprs: expected {sorted(constexprs)}, got {sorted(self.constexprs)}")

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of the buffers read, in the kernel's order."""
        named = (x.buffer if isinstance(x, Descriptor) else x for x in self.operands.values())
        return tuple(x for x in named if isinstance(x, str))


@dataclass(frozen=True)
class Pass:
    """Launches in order, the buffers they start from, and those to hand on."""

    launches: tuple[Launch, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]

    def spec(self, name: str) -> Spec:
        """The shape and dtype of a buffer that the pass creates."""
        for launch in self.launches:
            for buffer, spec in launch.outputs.values():
                if buffer == name:
                    return spec
        raise KeyError(name)

    @functools.cached_property
    def needed(self) -> tuple[frozenset[str], ...]:
        """For each launch, the buffers still needed after it; the others may be freed."""
        needed = [frozenset(self.results)]
        for launch in reversed(self.launches[1:]):
            needed.append(needed[-1].union(launch.buffers))
        return tuple(reversed(needed))
