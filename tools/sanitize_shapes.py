"""The calls that `tools.sanitize` checks: every kernel, odd and even head dims, through descriptors and pointers."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernels_triton.launch import Descriptor, Pass
from kernels_triton.problem import DEFAULT_ARCH, MAX_CHUNK, MIN_CHUNK
from kernels_triton.validation import ArrayInfo, check_call, check_step

PLAIN = {"input_gate": "sigmoid", "normalize": False}


@dataclass(frozen=True)
class Shape:
    """One call, forward and (but for a step) backward, at a size that a sanitizer is through with in seconds."""

    name: str
    K: int
    V: int
    B: int = 1
    H: int = 2
    T: int = 150
    dtype: str = "bfloat16"
    form: str = "chunkwise"  # or "recurrent", "step"
    descriptors: bool = False  # through tensor descriptors; otherwise through pointers
    lengths: tuple[int, ...] = ()  # of packed sequences, T tokens together
    initial: bool = True  # with initial states, and cotangents of the last ones
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the operator
    race: bool = False  # for racecheck too by default

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def layout(self) -> str:
        return "bthd" if self.lengths else self.options.get("layout", "bhtd")

    @property
    def offsets(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]

    @property
    def trains(self) -> bool:
        """Whether the backward pass runs too."""
        return self.form != "step"


def array_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shapes of a call's arrays by name, states included."""
    B, H, T, K, V = shape.B, shape.H, shape.T, shape.K, shape.V
    states = (len(shape.lengths) or B, H)
    if shape.form == "step":
        token = {"q": (B, H, K), "k": (B, H, K), "v": (B, H, V), "i": (B, H), "f": (B, H)}
        return token | {"c": (B, H, K, V), "n": (B, H, K), "m": (B, H)}
    tokens = (B, T, H) if shape.layout == "bthd" else (B, H, T)
    found = {"q": (*tokens, K), "k": (*tokens, K), "v": (*tokens, V), "i": tokens, "f": tokens}
    if shape.initial:
        found |= {"c_initial": (*states, K, V), "n_initial": (*states, K), "m_initial": states}
    return found


def passes(shape: Shape, arch: str = DEFAULT_ARCH) -> tuple[Pass, ...]:
    """What the PyTorch frontend launches for the shape on a GPU architecture; needs no GPU."""
    from kernels_triton import plan

    arrays: dict[str, ArrayInfo | None] = {
        name: ArrayInfo(size, shape.dtype if name in ("q", "k", "v") else "float32", "cuda")
        for name, size in array_shapes(shape).items()
    }
    options: dict[str, Any] = {"eps": 1e-6, "qk_scale": None, "backend": "triton"} | dict(shape.options)
    if shape.form == "step":
        of_step: dict[str, Any] = {"input_gate": "exponential", "normalize": True, **options}
        problem = dataclasses.replace(check_step(arrays, **of_step), arch=arch)
        return (plan.forward_pass(problem, False),)
    if shape.lengths:
        arrays["cu_seqlens"] = ArrayInfo((len(shape.lengths) + 1,), "int32", "cuda")
    options = {"chunk_size": None, "normalizer_grad": "exact", "precision": "ieee"} | options
    problem = check_call(arrays, **options | {"layout": shape.layout, "form": shape.form})
    problem = dataclasses.replace(problem, arch=arch, descriptors=shape.descriptors and arch == "sm_90")
    last = shape.initial
    return plan.forward_pass(problem, True, None, False, last), plan.backward_pass(problem, None, last)


@functools.cache
def kernels(shape: Shape, arch: str = DEFAULT_ARCH) -> tuple[str, ...]:
    """The names of the kernels that the shape launches, each once, in order."""
    return tuple(dict.fromkeys(launch.name for each in passes(shape, arch) for launch in each.launches))


def uses_descriptors(shape: Shape, arch: str = DEFAULT_ARCH) -> bool:
    """Whether any of its launches reads or writes through one."""
    launches = (launch for each in passes(shape, arch) for launch in each.launches)
    return any(isinstance(x, Descriptor) for launch in launches for x in launch.operands.values())


def _dims(K: int, V: int, race: bool = False, **fields: Any) -> list[Shape]:
    """The shape of these head dims through pointers, and if its rows are multiples of 16 bytes through descriptors."""
    found = [Shape(f"{K}x{V}-pointers", K, V, race=race, **fields)]
    if K % 8 == V % 8 == 0:
        found.append(Shape(f"{K}x{V}-descriptors", K, V, descriptors=True, race=race, **fields))
    return found


def _both(name: str, K: int, V: int, race: bool = False, **fields: Any) -> list[Shape]:
    """Through descriptors, and through pointers."""
    ways = (("descriptors", True), ("pointers", False))
    return [Shape(f"{name}-{way}", K, V, descriptors=on, race=race and on, **fields) for way, on in ways]


# Chunks of 16 tokens: in 600 of them the scan is in segments and the gates' sums are a kernel of their own.
SPLIT: dict[str, Any] = {"T": 600, "options": {"chunk_size": MIN_CHUNK}}
PACKED: dict[str, Any] = {"T": 200, "lengths": (1, 70, 0, 129)}
MANY: dict[str, Any] = {"H": 128, "T": 150}  # heads: the fused kernels

SHAPES: tuple[Shape, ...] = (
    # Head dims. Of the odd ones several are those that ptxas 12.8 assembled wrongly (docs/validation.md).
    *_dims(1, 1),
    *_dims(17, 33),
    *_dims(33, 17),
    *_dims(48, 97, race=True),
    *_dims(64, 97),
    *_dims(65, 257),
    *_dims(156, 97),
    *_dims(160, 129),
    *_dims(256, 105),
    *_dims(128, 257),
    *_dims(64, 64),
    *_dims(128, 128),
    *_dims(128, 256, race=True),
    *_dims(256, 512),
    *_dims(40, 72),
    # Few heads, long: the scan in segments, the gates in two kernels.
    *_both("segments-64x64", 64, 64, race=True, H=1, **SPLIT),
    *_both("segments-128x256", 128, 256, H=1, T=1100, options={"layout": "bthd"}),
    Shape("segments-33x65", 33, 65, H=1, **SPLIT),
    # Many heads: the fused kernels; with V in parts the forward one alone.
    *_both("many-heads-64x64", 64, 64, race=True, **MANY),
    Shape("many-heads-33x17", 33, 17, B=2, H=64, T=150),
    *_both("many-heads-128x256", 128, 256, **MANY),
    # Packed sequences, which are read through pointers alone; of lengths 0 and 1 too.
    Shape("packed-64x64", 64, 64, race=True, **PACKED),
    Shape("packed-128x256", 128, 256, **PACKED),
    Shape("packed-48x97", 48, 97, **PACKED),
    Shape("packed-many-heads-64x64", 64, 64, H=128, **PACKED, race=True),
    Shape("packed-segments-33x65", 33, 65, H=1, T=600, lengths=(570, 30), options={"chunk_size": MIN_CHUNK}),
    # Dtypes, and the precisions of float32.
    Shape("float16-48x97", 48, 97, dtype="float16"),
    Shape("float16-128x256", 128, 256, dtype="float16"),
    Shape("float32-48x97", 48, 97, dtype="float32", race=True),
    Shape("float32-many-heads-64x64", 64, 64, H=128, T=70, dtype="float32"),
    Shape("tf32x3-65x130", 65, 130, dtype="float32", options={"precision": "tf32x3"}),
    Shape("tf32-128x256", 128, 256, dtype="float32", options={"precision": "tf32"}),
    # Options.
    Shape("recompute-64x97", 64, 97, options={"save_states": False}),
    *_both("recompute-many-heads-64x64", 64, 64, **MANY, options={"save_states": False}),
    Shape("detached-128x257", 128, 257, options={"normalizer_grad": "detached"}),
    Shape("sigmoid-48x97", 48, 97, options={"input_gate": "sigmoid"}),
    Shape("plain-65x130", 65, 130, options=PLAIN),
    *_both("plain-128x256", 128, 256, options=PLAIN),
    Shape("no-states-160x129", 160, 129, initial=False),
    Shape("long-chunks-64x64", 64, 64, T=600, options={"chunk_size": MAX_CHUNK}),
    # Token by token.
    Shape("recurrent-33x65", 33, 65, T=9, form="recurrent", race=True),
    Shape("recurrent-128x256", 128, 256, T=9, form="recurrent"),
    Shape("step-48x97", 48, 97, B=2, form="step", race=True),
    Shape("step-128x256", 128, 256, B=2, form="step", options={"input_gate": "sigmoid"}),
)
BY_NAME = {shape.name: shape for shape in SHAPES}


def select(patterns: Sequence[str]) -> list[Shape]:
    """The shapes whose names match any of the glob patterns, in order; all where there are none.

    Raises ValueError for a pattern that matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(BY_NAME, pattern):
            raise ValueError(f"shapes: expected a name or pattern of the sweep's (--list), got {pattern!r}")
    return [x for x in SHAPES if not patterns or any(fnmatch.fnmatch(x.name, y) for y in patterns)]
