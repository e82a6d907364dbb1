"""Tile sizes: one pure heuristic over shapes, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import MIN_CHUNK, Problem

# Shared memory of one program, bytes, by architecture: what a configuration must fit.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# As many programs as occupy a large GPU: from here on one program per head is enough.
MANY_HEADS = 128


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """One kernel's blocks: BT tokens against BS tokens at a time, BK keys, BV values; PARTS programs a chunk."""

    BT: int
    BS: int
    BK: int
    BV: int
    PARTS: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """The chunk length L and each kernel's tile."""

    L: int
    gates: int  # tokens that the gates' kernel takes at a time
    state: Tile
    dstate: Tile  # the state kernel backward: it holds a tile of C besides its cotangent
    forward: Tile
    backward: Tile
    normaliser: Tile
    fused: Tile | None = None  # many small heads: instead of state, dstate, forward and backward


def configure(problem: Problem) -> Config:
    """The configuration for a problem; valid for every K, V up to 512 and every chunk size.

    Validity: tiles are powers of two of at least 16, BT divides L.
    """
    heads = problem.B * problem.H
    half = problem.dtype != "float32"
    wide = max(problem.K, problem.V) > 64
    L = problem.chunk_size or (128 if wide and half else 64)

    def tile(BT: int, BS: int, BK: int, BV: int, num_warps: int, num_stages: int, roles: int = 0) -> Tile:
        BT = min(BT, L)
        return Tile(
            BT=BT,
            BS=min(BS, L),
            BK=min(BK, max(MIN_CHUNK, next_power_of_2(problem.K))),
            BV=min(BV, max(MIN_CHUNK, next_power_of_2(problem.V))),
            PARTS=roles * L // BT,
            num_warps=num_warps,
            num_stages=num_stages,
        )

    rows = max(64 if problem.dtype == "bfloat16" else 32, L // 4)  # so that a chunk has at most four row tiles
    if problem.dtype == "bfloat16":
        deep = problem.K > 128
        return Config(
            L=L,
            gates=2048,
            state=tile(128, 16, 64, 128, 4, 2),
            dstate=tile(128, 16, 64, 128, 4, 2),
            forward=tile(rows, rows, 256, 32, 4, 3, roles=1),
            backward=tile(rows, rows, 256, 32 if deep else 64, 8 if deep else 4, 3 if deep else 2, roles=2),
            normaliser=tile(16, 16, 16, 128, 4, 2),
            fused=tile(L, L, 64, 64, 4, 2) if L <= 64 and not wide and heads >= MANY_HEADS else None,
        )
    # float32 operands (float16 inputs too, where a weighted factor is involved) take twice the shared memory.
    return Config(
        L=L,
        gates=2048,
        state=tile(32, 16, 64, 64, 4, 2),
        dstate=tile(32, 16, 64, 64, 4, 2),
        forward=tile(rows, rows, 64, 32, 4, 2, roles=1),
        backward=tile(rows, rows, 64, 32, 4, 2, roles=2),
        normaliser=tile(16, 16, 16, 128, 4, 2),
    )
