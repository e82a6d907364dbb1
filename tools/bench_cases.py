"""What the benchmark measures: shapes, dtypes, passes and implementations. Data only; imports no framework."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

X = TypeVar("X")

PASSES = ("fw", "fw+bw", "bw")
TABLES = ("shapes", "sweep", "scaling")
HEADS = "heads"  # a table of its own, which is measured only when asked for, and of ours alone


@dataclass(frozen=True)
class Shape:
    """One problem size."""

    name: str
    B: int
    H: int
    T: int
    K: int
    V: int
    table: str = "shapes"
    small: bool = False  # launches and Python count here, not the GPU's rates; the reference backend runs too
    count_launches: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return (self.B, self.H, self.T, self.K, self.V)


@dataclass(frozen=True)
class Dtype:
    """The dtype of all inputs, and how products of float32 are computed."""

    name: str
    dtype: str
    precision: str = "ieee"

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Implementation:
    """One column of the comparison.

    kind: which function of bench_implementations builds it. modules: what must be installed.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    modules: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    tables: tuple[str, ...] = TABLES
    devices: tuple[str, ...] = ("cuda",)
    small: bool = False  # by default on small shapes alone
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")

    @property
    def same_function(self) -> bool:
        """A peer that computes the same operator, exponential input gate and all: what ours is compared with."""
        return self.kind == "mlstm_kernels" and "siging" not in self.name


@dataclass(frozen=True)
class Job:
    """All implementations of one pass over one shape, to be measured side by side."""

    shape: Shape
    dtype: Dtype
    pass_: str
    implementations: tuple[Implementation, ...]


A = Shape("A", 8, 16, 8192, 128, 256, count_launches=True)
AS = Shape("AS", 1, 16, 8192, 128, 256)
S = Shape("S", 1, 4, 512, 64, 64, small=True, count_launches=True)
SHAPES: tuple[Shape, ...] = (
    A,
    Shape("B7", 8, 8, 8192, 256, 512),
    Shape("C64", 8, 64, 8192, 64, 64, count_launches=True),
    Shape("AL", 1, 16, 65536, 128, 256),
    AS,
    Shape("A96", 8, 16, 8192, 96, 192),  # head dims that are no powers of two
    Shape("AT", 8, 16, 8191, 128, 256),  # no whole number of chunks
    S,
)
SWEEP_TOKENS = 65536
SWEEP = tuple(Shape(f"T{T}", SWEEP_TOKENS // T, 16, T, 128, 256, "sweep") for T in (2**n for n in range(9, 17)))
SCALING = tuple(Shape(f"scale-T{T}", 1, 8, T, 128, 128, "scaling") for T in (4**n for n in range(5, 11)))

# Odd head dims between the even ones beside them: V of K = 64 and K = 128, then K of V = 256.
HEAD_DIMS = (
    *((64, V) for V in (96, 97, 98, 104)),
    *((128, V) for V in (255, 256, 257, 264)),
    *((K, 256) for K in (127, 129, 136)),
)
HEAD_SHAPES = tuple(Shape(f"heads-{K}x{V}", 8, 16, 2048, K, V, HEADS) for K, V in HEAD_DIMS)

CPU_SHAPES = (
    Shape("CPU", 1, 2, 256, 32, 32, small=True),
    Shape("CPU-odd", 2, 3, 191, 24, 40, small=True),
)
CPU_SWEEP = tuple(Shape(f"T{T}", 1024 // T, 2, T, 16, 16, "sweep", small=True) for T in (128, 256, 512, 1024))
CPU_SCALING = tuple(Shape(f"scale-T{T}", 1, 2, T, 16, 16, "scaling", small=True) for T in (128, 512, 2048))
CPU_HEAD_SHAPES = tuple(Shape(f"heads-16x{V}", 1, 2, 256, 16, V, HEADS, small=True) for V in (16, 17))

QUICK = {"cuda": (AS, S), "cpu": CPU_SHAPES[:1]}
OTHER_DTYPES = {"cuda": (AS, S), "cpu": CPU_SHAPES[:1]}  # for all but the first of these
DTYPES: tuple[Dtype, ...] = (
    Dtype("bfloat16", "bfloat16"),
    Dtype("float16", "float16"),
    Dtype("float32-tf32", "float32", "tf32"),
    Dtype("float32-tf32x3", "float32", "tf32x3"),
    Dtype("float32-ieee", "float32", "ieee"),
)

MLSTM_KERNELS = "mlstm_kernels.torch.chunkwise."
LIMIT_CHUNK = MLSTM_KERNELS + "triton_limit_chunk:mlstm_chunkwise__limit_chunk"
XL_CHUNK = MLSTM_KERNELS + "triton_xl_chunk:mlstm_chunkwise__xl_chunk"
SIGING = MLSTM_KERNELS + "triton_xl_chunk_siging:mlstm_siging_chunkwise__xl_chunk"
BACKWARD = ("fw+bw", "bw")  # for options that change nothing in a forward pass alone
NOT_SCALING = ("shapes", "sweep")


def _peer(name: str, target: str, tables: tuple[str, ...] = TABLES, note: str = "", **options: Any) -> Implementation:
    return Implementation(
        f"mlstm-kernels {name}",
        "mlstm_kernels",
        {"target": target, **options},
        ("mlstm_kernels",),
        tables=tables,
        note=note,
    )


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("ours torch", "ours_torch", modules=("triton",), tables=(*TABLES, HEADS)),
    Implementation("ours JAX", "ours_jax", modules=("jax", "jax_triton"), tables=(*TABLES, HEADS)),
    Implementation(
        "ours torch, pointers",
        "ours_torch",
        {"descriptors": "0"},
        ("triton",),
        tables=("shapes",),
        note="without tensor descriptors, as JAX",
    ),
    Implementation(
        "ours torch detached",
        "ours_torch",
        {"normalizer_grad": "detached"},
        ("triton",),
        passes=BACKWARD,
        tables=("shapes",),
    ),
    Implementation(
        "ours torch save_states=False",
        "ours_torch",
        {"save_states": False},
        ("triton",),
        passes=BACKWARD,
        tables=("shapes",),
    ),
    Implementation(
        "ours torch, CUDA graph",
        "ours_graph",
        modules=("triton",),
        passes=("fw", "fw+bw"),
        tables=("shapes",),
        small=True,
    ),
    # limit_chunk takes gates in the dtype of q alone; xl_chunk compiled for half gates aborts Triton 3.6.
    _peer("limit_chunk 64", LIMIT_CHUNK, chunk_size=64, half_gates=True),
    _peer("xl_chunk 128", XL_CHUNK, chunk_size=128),
    _peer("xl_chunk 128, states kept", XL_CHUNK, chunk_size=128, recompute_states_in_bw=False),
    _peer("xl_chunk 256", XL_CHUNK, NOT_SCALING, chunk_size=256),
    _peer("xl_chunk_siging 128", SIGING, ("shapes",), "sigmoid input gate", chunk_size=128),
    Implementation(
        "fla simple_gla",
        "fla",
        modules=("fla",),
        tables=NOT_SCALING,
        note="no input gate, no normaliser; log decay precomputed",
    ),
    Implementation("torch SDPA", "sdpa", tables=NOT_SCALING, note="causal softmax attention"),
    Implementation(
        "reference, torch.compile",
        "reference_torch",
        {"compile": True},
        passes=("fw", "fw+bw"),  # a compiled graph runs backward once
        tables=("shapes",),
        devices=("cuda",),
        small=True,
    ),
    Implementation("reference, torch eager", "reference_torch", tables=(*TABLES, HEADS), devices=("cpu",)),
    Implementation(
        "reference, XLA", "reference_jax", modules=("jax",), tables=TABLES, devices=("cuda", "cpu"), small=True
    ),
)


def matching(items: Sequence[X], patterns: Iterable[str], what: str, name: Callable[[X], str]) -> list[X]:
    """The items whose name matches one of the glob patterns; all of them without patterns.

    Raises ValueError for a pattern that matches none.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(name(x), pattern) for x in items):
            raise ValueError(f"{what}: expected a pattern among {', '.join(map(name, items))}, got {pattern!r}")
    return [x for x in items if not patterns or any(fnmatch.fnmatch(name(x), p) for p in patterns)]


def shapes_of(device: str, sweep: bool, scaling: bool, heads: bool = False) -> tuple[Shape, ...]:
    """All shapes that a device has, of the tables asked for."""
    on_gpu = device == "cuda"
    return (
        *(SHAPES if on_gpu else CPU_SHAPES),
        *(() if not sweep else SWEEP if on_gpu else CPU_SWEEP),
        *(() if not scaling else SCALING if on_gpu else CPU_SCALING),
        *(() if not heads else HEAD_SHAPES if on_gpu else CPU_HEAD_SHAPES),
    )


def plan(
    device: str,
    *,
    shapes: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    passes: Iterable[str] = (),
    implementations: Iterable[str] = (),
    quick: bool = False,
    sweep: bool = True,
    scaling: bool = True,
    heads: bool = False,
) -> list[Job]:
    """The jobs of a run, in order. Patterns are globs; raises ValueError for one that matches nothing."""
    shapes, implementations = tuple(shapes), tuple(implementations)
    available = shapes_of(device, sweep, scaling, heads)
    wanted = matching(available, shapes, "shapes", lambda x: x.name)
    if quick and not shapes:
        wanted = [x for x in available if x in QUICK[device] or x.table != "shapes"]
    chosen_dtypes = matching(DTYPES, tuple(dtypes) or (DTYPES[0].name,), "dtypes", lambda x: x.name)
    chosen_passes = matching(PASSES, passes, "passes", str)
    chosen = matching(IMPLEMENTATIONS, implementations, "implementations", lambda x: x.name)
    jobs = []
    for dtype in chosen_dtypes:
        for shape in wanted:
            if dtype is not DTYPES[0] and not shapes and shape not in OTHER_DTYPES[device]:
                continue
            for pass_ in chosen_passes:
                if pass_ == "bw" and shape.table != "shapes":
                    continue
                taken = tuple(x for x in chosen if _applies(x, shape, pass_, device, bool(implementations)))
                jobs.append(Job(shape, dtype, pass_, taken))
    return [job for job in jobs if job.implementations]


def _applies(x: Implementation, shape: Shape, pass_: str, device: str, by_name: bool) -> bool:
    """Whether an implementation is measured here. One that is asked for by name runs on large shapes too.

    On a CPU what needs a GPU stays in the table of shapes, to be listed as such.
    """
    if pass_ not in x.passes or shape.table not in x.tables:
        return False
    if device not in x.devices:
        return device == "cpu" and shape.table == "shapes"
    return by_name or shape.small or not x.small
