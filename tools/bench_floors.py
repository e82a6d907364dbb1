"""How fast a pass can be at best: bytes over the copy bandwidth, and operations over the rate of matrix products.

Pure functions of sizes; rates come from the run that measures (bench_measure.ceilings).
"""

from __future__ import annotations

from dataclasses import dataclass

from .bench_cases import Shape

CHUNK = 64  # tokens; shorter chunks have fewer operations, but too many states to store


@dataclass(frozen=True)
class Floor:
    """The two lower bounds of one pass, in milliseconds."""

    memory: float
    arithmetic: float

    @property
    def larger(self) -> float:
        return max(self.memory, self.arithmetic)

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.arithmetic else "arithmetic"


def bytes_moved(shape: Shape, itemsize: int, pass_: str) -> int:
    """Each input read once, each output written once; i and f have the dtype of q.

    fw:    reads q, k, v, i, f; writes h.
    bw:    reads q, k, v, i, f, h, dh; writes dq, dk, dv, di, df. (h: the exact gradient of the normaliser needs dh.h.)
    fw+bw: both.

    With N = B H T tokens: fw N (2 K + 2 V + 2), bw N (4 K + 4 V + 4) elements. States are not counted: an
    implementation may recompute them.
    """
    B, H, T, K, V = shape.sizes
    qkvif = 2 * K + V + 2
    elements = {"fw": qkvif + V, "bw": (qkvif + 2 * V) + qkvif}
    elements["fw+bw"] = elements["fw"] + elements["bw"]
    return B * H * T * elements[pass_] * itemsize


def flops(shape: Shape, pass_: str, chunk: int = CHUNK) -> int:
    """Operations of the chunkwise form, two per multiply-add, with no masked product computed. L = min(chunk, T).

    fw, per token:  L K (q.k) + L V (S v)                                       half of an L by L square each
                    + 2 K V (q C) + 2 K V (k v^T into C)
    bw, per token:  L (K + V) (q.k and dh.v) + L (2 K + V) (dq, dk, dv)
                    + 2 K V each for dq, dk, dv from the states and for q dh^T into dC
    fw+bw:          both. Nothing recomputed but S; normalisers and gates, of order K + V + L, left out.
    """
    B, H, T, K, V = shape.sizes
    L = min(chunk, T)
    forward = L * (K + V) + 4 * K * V
    backward = L * (3 * K + 2 * V) + 8 * K * V
    per_token = {"fw": forward, "bw": backward, "fw+bw": forward + backward}
    return B * H * T * per_token[pass_]


def floor(shape: Shape, itemsize: int, pass_: str, copy_tb_s: float, matmul_tflop_s: float) -> Floor:
    """Both bounds, from rates in 1e12 bytes and operations per second."""
    memory = bytes_moved(shape, itemsize, pass_) / (copy_tb_s * 1e12)
    arithmetic = flops(shape, pass_) / (matmul_tflop_s * 1e12)
    return Floor(memory * 1e3, arithmetic * 1e3)
