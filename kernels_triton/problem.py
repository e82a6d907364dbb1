"""What a call asks for, as a hashable value: shapes, dtypes, strides and options. No arrays, no framework."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

Strides = tuple[int, int, int]

MAX_HEAD_DIM = 512
MIN_CHUNK, MAX_CHUNK = 16, 512
# The longest chunk that the operator computes in: beyond, each program's row of scores leaves the registers. The stage
# functions, whose states are those of the chunks asked for, compute in any.
LONGEST_CHUNK = 256
# Offsets inside a chunk are computed in 32 bits: the most elements from one token to the next.
MAX_TOKEN_STRIDE = 2**31 // MAX_CHUNK - 1
# Elements of q and v together from which descriptors pay for the host's time that they take: in passes with gradients,
# where the host has more to do besides, and in a forward pass alone.
MIN_DESCRIPTORS = 2**27
MIN_DESCRIPTORS_ALONE = 2**25
INPUT_DTYPES = ("float32", "bfloat16", "float16")
GATE_DTYPES = (*INPUT_DTYPES, "float64")
C_DTYPES = ("float32", "bfloat16")  # of the state that the recurrent form takes
OFFSET_DTYPES = ("int32", "int64")
LAYOUTS = ("bhtd", "bthd")
NORMALIZER_GRADS = ("exact", "detached")
INPUT_GATES = ("exponential", "sigmoid")
PRECISIONS = ("ieee", "tf32x3", "tf32")
BACKENDS = ("triton", "interpret", "reference", "auto")


# The longest sequence that is computed token by token where nothing asks for gradients.
SHORT = 16

DEFAULT_ARCH = "sm_90"  # whose tile sizes are taken where there is no GPU


def architecture(capability: str) -> str:
    """The tables' name of a GPU architecture: of a compute capability such as "9.0", or of "gfx942:sramecc+"."""
    if capability.startswith("gfx"):
        return capability.split(":")[0]
    return "sm_" + capability.replace(".", "") if capability else DEFAULT_ARCH


@dataclass(frozen=True)
class Problem:
    """One call of the operator. Strides are those of the (batch, head, token) axes, in elements."""

    B: int
    H: int
    T: int
    K: int
    V: int
    dtype: str  # of q, k, v
    i_dtype: str
    f_dtype: str
    strides: tuple[tuple[str, Strides], ...]  # of q, k, v, i, f
    layout: str
    scale: float
    eps: float
    chunk_size: int | None
    normalizer_grad: str
    precision: str
    has_initial: bool
    arch: str = DEFAULT_ARCH  # whose tile sizes to take
    save_states: bool = True  # for the backward pass; otherwise it computes them again
    input_gate: str = "exponential"
    normalize: bool = True
    form: str = "chunkwise"  # or "recurrent": token by token
    c_dtype: str = "float32"  # of the recurrent form's C, before and after
    sequences: int = 0  # packed ones; 0: the batch is B sequences of T tokens
    has_table: bool = False  # the packed sequences' chunk table is given
    donate: bool = False  # C is written where it was read, in JAX: for a donated array
    descriptors: bool = False  # read q, k, v and states through tensor descriptors: the same bits, sooner

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # kept: each call looks its plans up by it
        return self._hash

    @property
    def exact(self) -> bool:
        """Whether gradients flow through a normaliser."""
        return self.normalize and self.normalizer_grad == "exact"

    @property
    def matrix_units(self) -> bool:
        """Whether they compute the products; otherwise registers multiply."""
        return (self.dtype, self.precision) != ("float32", "ieee")

    def descriptors_pay(self, recorded: bool) -> bool:
        """Whether they pay for being made; recorded: in a pass with gradients, or for one."""
        least = MIN_DESCRIPTORS if recorded else MIN_DESCRIPTORS_ALONE
        return self.B * self.H * self.T * (self.K + self.V) >= least

    @property
    def state_heads(self) -> tuple[int, int]:
        """The leading axes of initial and last states."""
        return (self.sequences or self.B, self.H)

    def stride(self, name: str) -> Strides:
        return dict(self.strides)[name]


def suits_descriptors(shape: tuple[int, ...], strides: Sequence[int], itemsize: int, address: int) -> bool:
    """Whether a tensor's memory can be read through a tensor descriptor: aligned to 16 bytes, no axis broadcast."""
    steps = [stride for size, stride in zip(shape, strides, strict=True) if size > 1]
    aligned = all(stride * itemsize % 16 == 0 for stride in strides[:-1])
    return address % 16 == 0 and aligned and shape[-1] * itemsize % 16 == 0 and all(0 < s < 2**35 for s in steps)


def contiguous_strides(H: int, T: int, D: int, layout: str) -> Strides:
    """(batch, head, token) strides of a contiguous tensor with D elements per token, in either layout."""
    return (T * H * D, D, H * D) if layout == "bthd" else (H * T * D, T * D, D)
