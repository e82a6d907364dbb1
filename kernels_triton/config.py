"""Tile sizes: one pure heuristic over shapes, dtype and architecture."""

from __future__ import annotations

from dataclasses import dataclass

from .problem import MIN_CHUNK, Problem

# Shared memory of one program, bytes, by architecture: what a configuration must fit.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """The block sizes of one kernel: BT row tokens, BS column tokens, BK keys, BV values."""

    BT: int
    BS: int
    BK: int
    BV: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Config:
    """The chunk length L and each kernel's tile."""

    L: int
    state: Tile
    dstate: Tile  # the state kernel backward: it holds a tile of C besides its cotangent
    values: Tile
    keys: Tile
    normaliser: Tile


def configure(problem: Problem) -> Config:
    """The configuration for a problem; valid for every K, V up to 512 and every chunk size.

    Validity: tiles are powers of two of at least 16, BT and BS divide L.
    """
    half = problem.dtype != "float32"
    wide = max(problem.K, problem.V) > 64
    L = problem.chunk_size or (128 if wide and half else 64)

    def tile(BT: int, BS: int, BK: int, BV: int, num_stages: int, num_warps: int = 4) -> Tile:
        return Tile(
            BT=min(BT, L),
            BS=min(BS, L),
            BK=min(BK, max(MIN_CHUNK, next_power_of_2(problem.K))),
            BV=min(BV, max(MIN_CHUNK, next_power_of_2(problem.V))),
            num_warps=num_warps,
            num_stages=num_stages,
        )

    if problem.dtype == "bfloat16":
        return Config(
            L=L,
            state=tile(128, 16, 64, 128, num_stages=2),
            dstate=tile(64, 16, 64, 128, num_stages=2),
            values=tile(64, 64, 64, 128, num_stages=2),
            keys=tile(64, 64, 128, 32, num_stages=2),
            normaliser=tile(64, 16, 16, 128, num_stages=2),
        )
    # float32 operands (float16 inputs too, where a weighted factor is involved) take twice the shared memory.
    return Config(
        L=L,
        state=tile(32, 16, 64, 64, num_stages=2),
        dstate=tile(32, 16, 64, 64, num_stages=2),
        values=tile(32, 32, 32, 64, num_stages=2),
        keys=tile(32, 32, 64, 32, num_stages=2),
        normaliser=tile(32, 16, 16, 128, num_stages=2),
    )
