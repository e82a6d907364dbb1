"""Walks along a sequence that are cut into segments, side by side: how long those are, and the state before each."""

import triton
import triton.language as tl

from .common import POINTERS
from .tiles import load_state, load_vector

# How a walk is cut: not at all; or into segments: the first one and what the others but the last add, then the others
# from where those before them end. LAST: what a scan, cut or not, comes to; only the last segment runs.
ONE = tl.constexpr(0)
SUM = tl.constexpr(1)
FOLLOW = tl.constexpr(2)
LAST = tl.constexpr(3)


@triton.jit
def segment_chunks(chunks, FEW: tl.constexpr, MOST: tl.constexpr, UNCUT: tl.constexpr):
    """Chunks per segment of a packed sequence: `ScanBuilder.segments` says the same of one that is alone."""
    most = tl.maximum(tl.maximum(tl.minimum(chunks // 4, FEW), tl.minimum(chunks // 16, MOST)), 1)
    count = tl.cdiv(chunks, tl.cdiv(chunks, most))
    return tl.where(chunks > UNCUT, tl.cdiv(chunks, count), chunks)


@triton.jit
def sums_offset(head, n_chunks, others, PACKED: tl.constexpr):
    """Where a head's sums begin. Of packed sequences no segment but the last has fewer than 4 chunks."""
    return head * (n_chunks // 4 + 1) if PACKED else head * others


@triton.jit
def state_before(
    b_state, b_norm, sums, norm_sums, decays, o_sums, rank, begin, segment, o_k, k0, v0,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The state and n before segment `rank`, from what each segment before it adds to them and leaves of them."""
    for s in tl.range(0, rank, num_stages=1 if PACKED else 3):  # packed, that takes registers
        o_sum = o_sums + ((begin + s * segment) // 4 if PACKED else s)
        decay = tl.load(decays + o_sum)
        b_sum = load_state((sums + o_sum * K * V,), k0, v0, K, V, BK, BV, POINTERS)
        b_state = b_state * decay + b_sum
        if HAS_NORMS:
            b_norm = b_norm * decay + load_vector(norm_sums + o_sum * K, o_k, K, BK)
    return b_state, b_norm
