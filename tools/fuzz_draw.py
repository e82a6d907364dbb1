"""Draws random calls in groups, whose calls share what is compiled in: one compilation serves them all.

Each group comes from the seed and its own number alone, and groups are alike in distribution: however many run before
time is up, they are a fair sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kernels_triton.problem import MAX_HEAD_DIM

from .cases import INITIAL, LAST
from .fuzz_call import Call, problem_of, work
from .fuzz_only import Only

# Bounds on `fuzz_call.work`: of float64 and its rounded copies in a GPU's memory; of the interpreter's time.
MOST = {"cpu": 2.5e4, "cuda": 2.5e7}
DRAWS = 2000  # of one group, before a pattern counts as one that no call fits
POWERS = (16, 32, 64, 128, 256, 512)
# Mean and standard deviation of the gates; the first is that of most calls.
I_GATES = ((0.0, 1.0), (0.0, 10.0), (1000.0, 1.0), (-10.0, 1.0))
F_GATES = ((3.0, 1.0), (0.0, 15.0), (-6.0, 1.0), (6.0, 1.0))
CLOSED = (-math.inf, -1e6, -60.0)
# Not -1e6: forget gates below that count as that, and an exact tie of the two has no one gradient (docs/numerics.md).
CLOSED_INPUT = (-8e5, -60.0)


class Draw:
    """Draws of one group."""

    def __init__(self, rng: np.random.Generator, device: str, only: Only):
        self.rng, self.cuda, self.only = rng, device == "cuda", only

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one(self, *values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def some(self, name: str, *values: Any, weight: float = 0.5) -> Any:
        """A field: its first value with that weight, else one of the others."""
        return self.only.pick(
            self.rng, name, lambda: values[0] if len(values) == 1 or self.chance(weight) else self.one(*values[1:])
        )

    def upto(self, most: float) -> int:
        """A whole number from 1 to most, small ones as likely as large ones: its logarithm is uniform."""
        return int(math.exp(self.rng.uniform(0, math.log(most + 1))))

    def head_dim(self, name: str) -> int:
        most = MAX_HEAD_DIM if self.cuda else 80

        def draw() -> int:
            kind = self.rng.random()
            if kind < 0.35:  # just beside a power of two, or on it
                x = int(self.one(*(p for p in POWERS if p <= most))) + int(self.rng.integers(-1, 2))
            elif kind < 0.7:  # odd, any size
                x = int(self.rng.integers(0, most // 2)) * 2 + 1
            else:
                x = self.upto(most) if self.chance(0.5) else int(self.rng.integers(1, most + 1))
            return min(max(x, 1), MAX_HEAD_DIM)

        return self.only.pick(self.rng, name, draw)

    def batch(self) -> tuple[int, int]:
        """B and H: few heads, some, many (the scan in one piece from 96 programs on), or enough to be fused (128)."""
        kind = self.rng.random()
        if not self.cuda and kind < 0.97:
            return self.one(1, 1, 2), self.one(1, 1, 2, 3)
        if kind < 0.6:
            return self.one(1, 1, 2, 3), self.one(1, 1, 2, 3, 4, 5)
        heads = int(self.rng.integers(6, 96)) if kind < 0.75 else int(self.rng.integers(96, 200))
        return self.one((1, heads), (-(-heads // 3), 3), (-(-heads // 16), 16))

    def tokens(self, chunk: int | None, heads: int, long: bool) -> int:
        if long:  # several times the chunks that the gates' kernel takes at once
            return int(self.rng.integers(530, 1100) if chunk in (16, 32) else self.rng.integers(1030, 2600))
        if not self.cuda:
            return self.upto(90)
        return self.upto(420) if self.chance(0.7) else int(self.rng.integers(1, 700))

    def shared(self, small: bool) -> dict[str, Any]:
        """What the calls of a group have in common: all that kernels are compiled for. small: head dims up to 64."""
        s: dict[str, Any] = {}
        s["form"] = self.some("form", "chunkwise", "recurrent", "step", weight=0.88)
        s["dtype"] = self.some("dtype", "bfloat16", "float32", "float16", weight=0.6)
        s["gate_dtype"] = self.some("gate_dtype", "float32", s["dtype"], "float64", "bfloat16", weight=0.6)
        s["f_dtype"] = self.some("f_dtype", "", "float32", "bfloat16", "float16", weight=0.85)
        s["K"], s["V"] = self.head_dim("K"), self.head_dim("V")
        if small:
            s["K"], s["V"] = (self.only.pick(self.rng, name, lambda: self.upto(64)) for name in ("K", "V"))
        s["input_gate"] = self.some("input_gate", "exponential", "sigmoid", weight=0.8)
        if s["input_gate"] == "sigmoid":
            s["normalize"] = self.some("normalize", True, False)
        s["qk_scale"] = self.some("qk_scale", None, 1.0, 0.1, weight=0.8)
        s["eps"] = self.some("eps", 1e-6, 0.0, 1e-2, weight=0.8)
        step, recurrent = s["form"] == "step", s["form"] == "recurrent"
        s["initial"] = step or self.some("initial", True, False)
        s["last"] = step or self.some("last", True, False)
        s["gradients"] = self.some("gradients", True, False, weight=0.9)
        if (step or recurrent) and s["initial"]:
            s["c_dtype"] = self.some("c_dtype", "float32", "bfloat16", weight=0.6)
        if step:
            return s
        s["layout"] = self.some("layout", "bhtd", "bthd")
        s["normalizer_grad"] = self.some("normalizer_grad", "exact", "detached", weight=0.7)
        s["strided"] = self.some("strided", False, True, weight=0.7)
        if s["dtype"] == "float32":
            s["precision"] = self.some("precision", "ieee", "tf32x3", "tf32")
        if recurrent:
            return s
        # Long chunks seldom: their kernels take a minute to compile.
        sizes = (256, 512) if self.chance(0.08) else (16, 32, 64, 128)
        s["chunk_size"] = self.some("chunk_size", None, *sizes, weight=0.4)
        s["save_states"] = self.some("save_states", True, False, weight=0.75)
        s["descriptors"] = self.some("descriptors", True, False, weight=0.75)
        packed = s["layout"] == "bthd" and self.chance(0.4)
        s["packed"] = packed or "lengths" in self.only.terms
        if s["packed"]:
            s["layout"] = "bthd"
            s["table"] = s["chunk_size"] is not None and self.some("table", True, False)
        return s

    def values(self, s: dict[str, Any], B: int, H: int, T: int, states: bool) -> dict[str, Any]:
        """What a call of the group has for itself, which compiles nothing. states: last states get a cotangent."""
        x: dict[str, Any] = {"B": B, "H": H, "T": T, "seed": self.only.pick(self.rng, "seed", self.seed)}
        mean, std = self.some("i_gate", *I_GATES, weight=0.7)
        x["i_gate"] = (mean, std)
        x["f_gate"] = self.some("f_gate", *F_GATES, weight=0.6)
        x["f_closed"] = self.some("f_closed", 0.0, *CLOSED, weight=0.75)
        x["i_closed"] = self.some("i_closed", 0.0, *CLOSED_INPUT, weight=0.85)
        if s["initial"]:
            x["m_mean"] = self.some("m_mean", 0.0, 30.0, -30.0, -math.inf, weight=0.75)
        if s["gradients"]:
            names = ("h", *LAST) if s["last"] else ("h",)
            picked = tuple(name for name in names if self.chance(0.6) and (states or name == "h"))
            if states and not set(picked) & set(LAST):
                picked = (*picked, self.one(*LAST))
            x["cotangents"] = self.only.pick(self.rng, "cotangents", lambda: picked or ("h",))
        if s.get("packed"):
            x["lengths"] = self.only.pick(self.rng, "lengths", lambda: self.lengths(T))
            x["T"] = sum(x["lengths"])
            if len(x["lengths"]) > 1 and self.chance(0.3):
                x["plant"] = self.one("q", "k", "v", "i", "f", *(INITIAL if s["initial"] else ()))
        elif s["initial"] and s["last"] and s["form"] == "chunkwise" and T > 1 and self.chance(0.3):
            x["split"] = int(self.rng.integers(1, T))
        return x

    def seed(self) -> int:
        return int(self.rng.integers(1_000_000))

    def lengths(self, T: int) -> tuple[int, ...]:
        """T tokens in up to 6 sequences, some of them empty."""
        N = self.one(1, 2, 3, 4, 6)
        cuts = np.sort(self.rng.integers(0, T + 1, N - 1))
        if N > 2 and self.chance(0.5):
            cuts[0] = cuts[1]
        return tuple(int(x) for x in np.diff([0, *cuts, T]))

    def group(self, size: int) -> list[Call]:
        """Calls that share their kernels; none if a bound does not let them be drawn."""
        many = self.cuda and self.chance(0.08)  # small heads, and so many that the backward pass is fused too
        s = self.shared(small=many)
        # Some heads of bfloat16 in parts of V, long: the fused forward kernel, in segments.
        parts = self.cuda and not many and s["form"] == "chunkwise" and s["dtype"] == "bfloat16" and self.chance(0.06)
        B, H = self.batch()
        if many:
            B, H = self.one((1, 128), (9, 16), (43, 3))
        if parts:
            B, H = self.one((1, 16), (2, 8), (1, 32))
            s["K"] = self.only.pick(self.rng, "K", lambda: int(self.rng.integers(1, 129)))
            s["V"] = self.only.pick(self.rng, "V", lambda: int(self.rng.integers(65, 129)))
        B, H = (1, max(B, H) if many else H) if s.get("packed") else (B, H)
        H = self.only.pick(self.rng, "H", lambda: H)
        long = parts or (self.cuda and s["form"] == "chunkwise" and self.chance(0.2))
        states = s["last"] and self.chance(0.7)
        calls, T = [], 0
        for n in range(size):
            if n == 0 or self.chance(0.5):  # else the shape of the one before, which JAX has traced

                def tokens() -> int:
                    short = s["form"] != "chunkwise"
                    return self.upto(40) if short else self.tokens(s.get("chunk_size"), B * H, long)

                T = 1 if s["form"] == "step" else self.only.pick(self.rng, "T", tokens)
            own = self.only.pick(self.rng, "B", lambda: B)
            fields = {name: x for name, x in s.items() if name != "packed"}
            try:
                call = Call(**(fields | self.values(s, own, H, T, states)))
            except ValueError:  # a pattern's value that does not go with the others
                continue
            if self.fits(call):
                calls.append(call)
        return calls

    def fits(self, call: Call) -> bool:
        """Whether the operator takes the call, it is not too large, it is asked for, and its result is defined."""
        if work(call) > MOST["cuda" if self.cuda else "cpu"] or not self.only.fits(call):
            return False
        if call.m_mean == -math.inf and call.i_closed:  # a state without any weight
            return False
        problem_of(call)
        return True


def draw(seed: int, size: int, device: str, only: Only | None = None) -> Iterator[list[Call]]:
    """Groups of up to `size` calls, without end. Raises ValueError where no call fits `only`."""
    for number in range(10**9):
        rng = np.random.default_rng([seed, number])
        for _ in range(DRAWS):
            calls = Draw(rng, device, only or Only()).group(size)
            if calls:
                break
        else:
            raise ValueError("only: expected a pattern that some call fits, got one that none does")
        yield calls
