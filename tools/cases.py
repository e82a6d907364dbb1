"""The case table: what the two frontends, and any third implementation, are compared on. Data only; NumPy arrays."""

from __future__ import annotations

import fnmatch
import itertools
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Arrays = dict[str, np.ndarray]

INPUTS = ("q", "k", "v", "i", "f")
INITIAL = ("c_initial", "n_initial", "m_initial")
LAST = ("c_last", "n_last", "m_last")
# Options of the operator, and the value at which an implementation that lacks the option still does the same.
DEFAULTS: Mapping[str, Any] = {
    "return_last_states": False,
    "eps": 1e-6,
    "chunk_size": None,
    "qk_scale": None,
    "normalizer_grad": "exact",
    "layout": "bhtd",
    "precision": "ieee",
    "save_states": True,
    "input_gate": "exponential",
    "normalize": True,
}
# Options that another form does not have.
LACKING: Mapping[str, tuple[str, ...]] = {
    "chunkwise": (),
    "recurrent": ("chunk_size", "save_states"),
    "step": ("return_last_states", "chunk_size", "normalizer_grad", "layout", "precision", "save_states"),
}
DOCUMENT = 17  # tokens per document in the cases that have several in one sequence
CLOSED = -60.0  # the forget gate's pre-activation at a document's first token


@dataclass(frozen=True)
class Case:
    """One call of the operator and of its gradients."""

    name: str
    B: int = 1
    H: int = 2
    T: int = 70
    K: int = 16
    V: int = 32
    dtype: str = "float32"  # of q, k, v, h
    gate_dtype: str = "float32"  # of i, f
    f_dtype: str = ""  # of f, if it is not that of i
    c_dtype: str = "float32"  # of C, before and after; the token-by-token forms take bfloat16 too
    layout: str = "bhtd"
    strided: bool = False  # torch: q, k, v are views; bhtd: of (B, T, H, D) memory, bthd: slices of wider rows
    initial: bool = False  # initial states are given
    last: bool = False  # last states are returned
    cotangents: tuple[str, ...] = ()  # the outputs that get one; none named: all outputs
    normalizer_grad: str = "exact"
    chunk_size: int | None = None
    precision: str = "ieee"
    save_states: bool = True
    input_gate: str = "exponential"
    normalize: bool = True
    qk_scale: float | None = None
    eps: float = 1e-6
    i_gate: tuple[float, float] = (0.0, 1.0)  # mean and standard deviation
    f_gate: tuple[float, float] = (3.0, 1.0)
    documents: bool = False  # the forget gate closes every DOCUMENT tokens
    form: str = "chunkwise"  # or "recurrent", or "step" for one token
    lengths: tuple[int, ...] = ()  # of packed sequences, T tokens together; B is 1, the layout bthd
    table: bool = False  # packed sequences come with their chunk table, in chunks of chunk_size
    gradients: bool = True  # False: a forward pass alone, as in inference
    gpu: bool = False  # too large for the interpreter

    def __post_init__(self) -> None:
        if self.lengths and (self.layout, self.T) != ("bthd", sum(self.lengths)):
            raise ValueError(f"lengths: expected layout 'bthd' and T = {sum(self.lengths)}, got {self}")
        unknown = set(self.cotangents) - set(self.outputs)
        if unknown:
            raise ValueError(f"cotangents: expected names among {self.outputs}, got {sorted(unknown)}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("h", *LAST) if self.last else ("h",)

    @property
    def driven(self) -> tuple[str, ...]:
        """The outputs that get a cotangent."""
        return self.cotangents or self.outputs if self.gradients else ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*INPUTS, *INITIAL) if self.initial else INPUTS

    def options(self) -> dict[str, Any]:
        """The operator's options, by their names in the public function."""
        found = {name: self.last if name == "return_last_states" else getattr(self, name) for name in DEFAULTS}
        return {name: x for name, x in found.items() if name not in LACKING[self.form]}

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where packed sequences begin, and where the last one ends."""
        return (0, *itertools.accumulate(self.lengths))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output, tokens after heads whatever the layout."""
        head = (len(self.lengths) or self.B if name.startswith(("c", "n", "m")) else self.B, self.H)
        tails: dict[str, tuple[int, ...]] = {"i": (self.T,), "f": (self.T,)}
        tails |= {"q": (self.T, self.K), "k": (self.T, self.K), "v": (self.T, self.V), "h": (self.T, self.V)}
        tails |= {"c": (self.K, self.V), "n": (self.K,), "m": ()}
        return (*head, *tails[name.split("_")[0]])

    def dtype_of(self, name: str) -> str:
        """The dtype of an input or output."""
        if name in ("i", "f"):
            return self.f_dtype or self.gate_dtype if name == "f" else self.gate_dtype
        if name in ("c_initial", "c_last"):
            return self.c_dtype
        return "float32" if "_" in name else self.dtype


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name, bfloat16 too."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def make_inputs(case: Case, seed: int = 0) -> Arrays:
    """Inputs and cotangents (d_h, d_c_last, ...) of a case, in their own dtypes; tokens after heads.

    They depend on the case's name and the seed alone.
    """
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    arrays: Arrays = {}
    for name in (*case.inputs, *(f"d_{output}" for output in case.driven)):
        of = name.removeprefix("d_")
        x = rng.standard_normal(case.shape(of))
        if name in ("i", "f"):
            mean, std = case.i_gate if name == "i" else case.f_gate
            x = mean + std * x
        if name == "f" and case.documents:
            x[:, :, ::DOCUMENT] = CLOSED
        arrays[name] = np.ascontiguousarray(x.astype(np.float32).astype(numpy_dtype(case.dtype_of(of))))
    return arrays


def _gpu(name: str, **fields: Any) -> Case:
    return Case(name, **({"B": 1, "H": 4, "T": 2048, "gpu": True} | fields))


def _states(name: str, **fields: Any) -> Case:
    return Case(name, **({"initial": True, "last": True} | fields))


def _packed(name: str, lengths: tuple[int, ...] = (5, 0, 33, 1, 16), **fields: Any) -> Case:
    more = {"H": 1, "chunk_size": 16, "initial": True, "last": True} | fields
    return Case(name, lengths=lengths, T=sum(lengths), layout="bthd", **more)


HALF = ("bfloat16", "float16")
MODES = ("exact", "detached")
GATE_DTYPES = (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float64"))
CHUNKS = (16, 32, 128, 256, 512)
HEADS = ((1, 1), (1, 16), (5, 48), (17, 33), (72, 136))
GPU_HEADS = ((64, 64), (128, 128), (128, 256), (256, 512))
# Heads that the assembler of CUDA 12.8 made wrong kernels for, silently; random calls found them (docs/fuzz.md).
GPU_ODD_HEADS = (
    *((256, 105), (128, 257), (160, 129), (156, 97), (256, 495)),
    *((65, 257), (256, 255), (48, 97), (64, 97), (256, 257)),
)
MANY: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "B": 2,
    "H": 64,
    "T": 520,
    "K": 64,
    "V": 64,
    "initial": True,
    "last": True,
}

PACKED_MODEL: Mapping[str, Any] = {"H": 4, "K": 128, "V": 256, "chunk_size": None, "gpu": True}
SIGMOID: Mapping[str, Any] = {"input_gate": "sigmoid"}
PLAIN: Mapping[str, Any] = {"input_gate": "sigmoid", "normalize": False}

CASES: tuple[Case, ...] = (
    # dtypes and modes, from zero and from given states
    Case("two-chunks", T=128),
    Case("two-chunks-detached", T=128, normalizer_grad="detached"),
    *(Case(f"{d}-{mode}", dtype=d, normalizer_grad=mode) for d in HALF for mode in MODES),
    *(_states(f"states-{mode}", normalizer_grad=mode, chunk_size=32) for mode in MODES),
    *(_states(f"states-{d}", dtype=d, chunk_size=32, H=1) for d in HALF),
    *(Case(f"{d}-gates-{g}", T=40, H=1, dtype=d, gate_dtype=g) for d, g in GATE_DTYPES),
    # states on one side only, and every kind of cotangent
    Case("initial-only", T=40, H=1, initial=True),
    Case("last-only", T=40, H=1, last=True),
    *(_states(f"only-d_{x}", T=40, H=1, chunk_size=16, cotangents=(x,)) for x in ("h", *LAST)),
    _states("only-d_h-d_m_last", T=40, H=1, chunk_size=16, cotangents=("h", "m_last")),
    # layouts and views
    Case("bthd", B=2, T=40, K=17, layout="bthd"),
    _states("bthd-states-bfloat16", T=40, layout="bthd", dtype="bfloat16"),
    Case("strided", B=2, T=40, strided=True),
    Case("strided-bfloat16", T=40, strided=True, dtype="bfloat16"),
    Case("strided-bthd", T=40, strided=True, layout="bthd"),
    Case("batch", B=2, H=3, T=16),
    # lengths
    Case("one-token", T=1),
    _states("one-token-states", T=1),
    *(_states(f"length-{T}", T=T, H=1, chunk_size=16) for T in (7, 16, 47)),
    Case("length-127", T=127, H=1, dtype="bfloat16"),
    *(Case(f"chunk-{L}", T=130, H=1, K=16, V=16, chunk_size=L) for L in CHUNKS),
    # head dimensions, one of them over more than one tile
    *(_states(f"heads-{K}x{V}", T=20, H=1, K=K, V=V) for K, V in HEADS),
    Case("heads-72x136-bfloat16", T=20, H=1, K=72, V=136, dtype="bfloat16"),
    # gates
    *(_states(f"documents-{mode}", documents=True, H=1, normalizer_grad=mode, chunk_size=32) for mode in MODES),
    Case("strong-input", H=1, i_gate=(0.0, 10.0)),
    Case("weak-input", H=1, i_gate=(-10.0, 1.0), f_gate=(5.0, 1.0)),
    Case("strong-forgetting", H=1, f_gate=(-6.0, 1.0)),
    Case("uneven-forgetting", H=1, f_gate=(0.0, 15.0)),
    # options
    *(Case(f"precision-{p}", T=40, H=1, precision=p) for p in ("tf32x3", "tf32")),
    *(_states(f"recompute-{d}", T=40, H=1, dtype=d, save_states=False) for d in ("float32", "bfloat16")),
    # the sigmoid input gate
    *(_states(f"sigmoid-{mode}", **SIGMOID, normalizer_grad=mode, chunk_size=32) for mode in MODES),
    *(_states(f"sigmoid-{d}", **SIGMOID, dtype=d, H=1) for d in HALF),
    *(_states(f"sigmoid-plain-{d}", **PLAIN, dtype=d, chunk_size=32, H=1) for d in ("float32", "bfloat16")),
    Case("sigmoid-bthd", **SIGMOID, layout="bthd", T=40),
    Case("sigmoid-plain-recompute", **PLAIN, T=40, H=1, save_states=False),
    _states("sigmoid-documents", **SIGMOID, documents=True, H=1, chunk_size=32, i_gate=(0.0, 10.0)),
    # token by token
    *(_states(f"recurrent-{d}", form="recurrent", dtype=d, T=9, K=17) for d in ("float32", "bfloat16")),
    *(Case(f"forward-{T}", T=T, H=1, dtype="bfloat16", gradients=False) for T in (9, 40)),
    _states("recurrent-bfloat16-state", form="recurrent", dtype="bfloat16", c_dtype="bfloat16", T=9, K=17),
    _states("recurrent-detached", form="recurrent", T=20, H=1, normalizer_grad="detached"),
    Case("recurrent-bthd", form="recurrent", T=9, layout="bthd", strided=True),
    Case("recurrent-documents", form="recurrent", T=40, H=1, documents=True, last=True),
    _states("recurrent-sigmoid", form="recurrent", **SIGMOID, T=9),
    _states("recurrent-plain", form="recurrent", **PLAIN, T=9),
    *(_states(f"step-{d}", form="step", T=1, B=2, K=17, V=23, dtype=d) for d in ("float32", *HALF)),
    _states("step-sigmoid", form="step", T=1, **SIGMOID),
    _states("step-plain", form="step", T=1, **PLAIN),
    # packed sequences, of lengths 0 and 1 too
    *(_packed(f"packed-{mode}", normalizer_grad=mode) for mode in MODES),
    *(_packed(f"packed-{d}", dtype=d) for d in HALF),
    _packed("packed-one-sequence", lengths=(70,)),
    _packed("packed-without-states", initial=False, last=False),
    _packed("packed-sigmoid", **SIGMOID),
    _packed("packed-plain-recompute", **PLAIN, save_states=False),
    _packed("packed-table", table=True),
    _packed("packed-strided", strided=True, lengths=(17, 30)),
    Case("scale-and-eps", T=40, H=1, qk_scale=1.0, eps=1e-2),
    # sizes of real models, on a GPU alone
    *(_gpu(f"gpu-{d}-{K}x{V}", dtype=d, K=K, V=V) for d in ("bfloat16", "float32") for K, V in GPU_HEADS),
    *(_gpu(f"gpu-{d}-detached", dtype=d, K=128, V=256, normalizer_grad="detached") for d in ("bfloat16", "float32")),
    *(_gpu(f"gpu-{d}-long", dtype=d, K=128, V=256, T=4096, f_gate=(5.0, 1.0)) for d in ("bfloat16", "float32")),
    *(
        _gpu(f"gpu-odd-{K}x{V}", dtype="bfloat16", K=K, V=V, B=2, T=300, initial=True, last=True)
        for K, V in GPU_ODD_HEADS
    ),
    *(  # long chunks: (359, 15) lost its row sums, by ptxas 12.9 and 13.0 too (tools/sass.py)
        _gpu(f"gpu-chunk-256-{K}x{V}", dtype="bfloat16", K=K, V=V, B=2, T=600, chunk_size=256, last=True)
        for K, V in ((359, 15), (128, 256))
    ),
    _gpu("gpu-chunk-256-float32", K=65, V=65, T=600, chunk_size=256, last=True),
    _gpu("gpu-ragged", dtype="bfloat16", K=128, V=256, T=1000, initial=True, last=True),
    _gpu("gpu-ragged-float32", K=100, V=200, T=1000, initial=True, last=True),
    _gpu("gpu-float16", dtype="float16", K=128, V=128, T=1000),
    _gpu("gpu-strided", dtype="bfloat16", K=128, V=128, B=2, strided=True),
    _gpu("gpu-bthd", dtype="bfloat16", K=128, V=128, B=2, layout="bthd"),
    *(
        _gpu(f"gpu-recompute-{mode}", dtype="bfloat16", K=128, V=256, save_states=False, normalizer_grad=mode)
        for mode in MODES
    ),
    # many heads (fused kernels), and a few long ones (gates in two launches)
    *(_gpu(f"gpu-many-heads-{mode}", **MANY, normalizer_grad=mode) for mode in MODES),
    _gpu("gpu-many-heads-recompute", **MANY, save_states=False),
    # many heads of some parts of V (fused forward)
    *(
        _gpu(f"gpu-many-heads-{K}x{V}", **{**MANY, "K": K, "V": V, "T": 1000})
        for K, V in ((128, 256), (100, 200), (64, 128), (128, 512))
    ),
    *(
        _gpu(f"gpu-many-heads-{K}x{V}-chunk-{L}", **{**MANY, "K": K, "V": V, "chunk_size": L})
        for K, V, L in ((128, 256, 16), (128, 256, 32), (128, 256, 64), (64, 64, 16))
    ),
    # the same kernel of few heads, in segments
    _gpu("gpu-segments-128x256", dtype="bfloat16", H=16, T=5000, K=128, V=256, initial=True, last=True),
    _gpu("gpu-segments-128x128", dtype="bfloat16", H=4, T=20000, K=128, V=128, f_gate=(6.0, 1.0)),
    _gpu("gpu-many-heads-128x256-bthd", **{**MANY, "K": 128, "V": 256, "layout": "bthd", "save_states": False}),
    _gpu("gpu-many-heads-128x256-plain", **{**MANY, **PLAIN, "K": 128, "V": 256}),
    # heads in number between: one scan in one piece, and a kernel of each chunk
    _gpu("gpu-some-heads-128x256", dtype="bfloat16", B=2, H=16, T=1000, K=128, V=256, initial=True, last=True),
    _gpu("gpu-long-heads", dtype="bfloat16", H=2, T=16384, K=64, V=64, f_gate=(6.0, 1.0), initial=True, last=True),
    _gpu("gpu-documents", dtype="bfloat16", K=64, V=128, documents=True, initial=True, last=True),
    *(_gpu(f"gpu-{p}", K=128, V=128, T=1000, precision=p) for p in ("tf32x3", "tf32")),
    # the other entries of the tables of tile sizes
    *(_gpu(f"gpu-{p}-256x512", K=256, V=512, T=1000, precision=p) for p in ("tf32x3", "tf32")),
    *(_gpu(f"gpu-{p}-some-heads", B=2, H=12, K=128, V=256, T=520, precision=p) for p in ("tf32x3", "tf32", "ieee")),
    *(_gpu(f"gpu-float16-{K}x{V}", dtype="float16", K=K, V=V, T=1000) for K, V in ((64, 64), (256, 512))),
    _gpu("gpu-segments", dtype="bfloat16", H=33, T=8192, K=64, V=64),
    *(_gpu(f"gpu-chunk-{L}", dtype="bfloat16", K=64, V=64, T=1000, chunk_size=L) for L in (16, 512)),
    *(_gpu(f"gpu-sigmoid-{mode}", **SIGMOID, dtype="bfloat16", K=128, V=256, normalizer_grad=mode) for mode in MODES),
    *(_gpu(f"gpu-sigmoid-plain-{d}", **PLAIN, dtype=d, K=128, V=256) for d in ("bfloat16", "float32")),
    *(_gpu(f"gpu-many-heads-sigmoid-{n}", **MANY, input_gate="sigmoid", normalize=n) for n in (True, False)),
    *(
        _packed(
            f"gpu-packed-{d}", (1, 700, 0, 3000, 64, 129, 2000), H=4, dtype=d, K=128, V=256, chunk_size=None, gpu=True
        )
        for d in ("bfloat16", "float32")
    ),
    _packed("gpu-packed-many-heads", (500, 20), H=128, dtype="bfloat16", K=64, V=64, chunk_size=None, gpu=True),
    _packed("gpu-packed-many-heads-128x256", (500, 20, 130), dtype="bfloat16", **{**PACKED_MODEL, "H": 128}),
    _packed("gpu-packed-segments-128x256", (5000, 20, 2500), dtype="bfloat16", **{**PACKED_MODEL, "H": 16}),
    _packed("gpu-packed-plain", (700, 1300), **PLAIN, dtype="bfloat16", **PACKED_MODEL),
    *(
        _gpu(f"gpu-recurrent-{d}", form="recurrent", dtype=d, T=16, K=256, V=512, initial=True, last=True)
        for d in ("bfloat16", "float32")
    ),
    _gpu("gpu-step", form="step", dtype="bfloat16", T=1, B=4, K=256, V=512, initial=True, last=True),
    _gpu("gpu-bfloat16-512x512", dtype="bfloat16", K=512, V=512, T=520, H=2),
)


def select(patterns: Iterable[str], cuda: bool) -> list[Case]:
    """Cases whose name matches one of the glob patterns; without patterns all that suit the device.

    Raises ValueError for a pattern that matches none.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(case.name, pattern) for case in CASES):
            raise ValueError(
                f"cases: expected a pattern that matches a case's name (--list shows them), got {pattern!r}"
            )
    if not patterns:
        return [case for case in CASES if cuda or not case.gpu]
    return [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
