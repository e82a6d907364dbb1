"""Tile sizes: committed tables by architecture (configs/*.json), read by one pure function of the problem."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from .problem import LONGEST_CHUNK, MAX_CHUNK, PRECISIONS, Problem

# Shared memory of one program, bytes, by architecture: what a configuration must fit.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# The table of each architecture that has one or shares one; any other takes the one with the smallest shared memory.
TABLES = {"sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}
FALLBACK = "gfx942"
# BK and BV of smaller head dims. The assembler of Triton up to 3.7.1 (ptxas 12.8) gives some Hopper products of
# narrower tiles a wrong address, silently (docs/validation.md).
MIN_BLOCK = {"float32": 16, "bfloat16": 64, "float16": 64}
# As many programs as occupy a large GPU: from here on one program per head is enough.
MANY_HEADS = 128
# A scan of so many programs runs in one piece. One of fewer is cut into segments, of which each of two launches runs
# all but one, so that most tokens are read twice: into as many as make that 256 programs, or 512 where segments are
# long, up to a bound, since each reads the sums of all before it.
ONE_PIECE = 96
MAX_SEGMENTS = 33
PROGRAMS = ((256, MAX_SEGMENTS), (512, 9))
# Programs of a fused kernel that a large GPU runs at once. Where a head takes several, for its segments and parts of V,
# they do some work again: that pays only if the last round of programs leaves few multiprocessors idle.
SIDE_BY_SIDE = 264


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """One kernel's blocks: BT tokens against BS tokens at a time, BK keys, BV values."""

    BT: int
    BS: int
    BK: int
    BV: int
    num_warps: int
    num_stages: int
    descriptors: int = 1  # 0: by pointers even where descriptors may be had; some kernels are faster so
    span: int = 1  # backward: tiles of BT tokens that a program has dv of, 1 or 2


@dataclass(frozen=True)
class Config:
    """The chunk length L and each kernel's tile."""

    L: int
    gates: int  # tokens that the gates' kernel takes at a time
    state: Tile
    dstate: Tile  # the state kernel backward
    forward: Tile
    backward: Tile
    normaliser: Tile
    fused: Tile | None = None  # many heads: instead of state and forward
    dfused: Tile | None = None  # many small heads: instead of dstate and backward; only with fused


FUSED = ("fused", "dfused")
# Kernels whose values may be spread over more warps (`configure`).
SPREAD = ("state", "dstate", "forward", "backward")
TILES = tuple(x.name for x in fields(Config) if x.name not in ("L", "gates"))


@functools.cache
def table(arch: str) -> tuple[Mapping[str, Any], ...]:
    """The entries for an architecture, the first that suits a problem counts.

    An entry: dtypes; perhaps precisions, by default all; K and V, the largest head dims; heads, the fewest and the most
    of them; perhaps longest, the largest chunk_size that a call may ask for; measured, on what tiles were last
    searched, or null: the compile check's choice; and a Config for chunks of L tokens, its tiles as lists in Tile's
    order.
    """
    name = TABLES.get(arch, FALLBACK)
    return tuple(json.loads((resources.files(__package__) / "configs" / f"{name}.json").read_text())["entries"])


def serves(entry: Mapping[str, Any], problem: Problem) -> bool:
    """Whether an entry of a table is for such a problem."""
    fewest, most = entry["heads"]
    fits = problem.K <= entry["K"] and problem.V <= entry["V"]
    fits = fits and problem.precision in entry.get("precisions", PRECISIONS)
    fits = fits and (problem.chunk_size or 0) <= entry.get("longest", MAX_CHUNK)
    return problem.dtype in entry["dtypes"] and fits and fewest <= problem.B * problem.H <= (most or 2**31)


def fused_segments(heads: int, parts: int) -> int:
    """Into how many segments, at most, the fused kernel cuts heads of so many parts of V; 0 if it does not pay.

    Whatever their length: a packed sequence has the bits of one alone. Measured: docs/performance.md.
    """
    if parts == 1:
        return int(heads >= MANY_HEADS)
    segments = max(1, min(MAX_SEGMENTS, SIDE_BY_SIDE // (heads * parts)))
    if segments == 2 and parts > 2:  # the first launch, half of the scan, leaves half of the places empty
        return 0
    programs = heads * parts * segments
    rounds = cdiv(programs, SIDE_BY_SIDE)
    return segments if programs >= 0.8 * rounds * SIDE_BY_SIDE else 0


def value_by_value(problem: Problem) -> bool:
    """Whether rows of 16-bit values start at odd ones, so that each value is loaded alone, to a register of its own."""
    return problem.dtype != "float32" and (problem.K % 2 == 1 or problem.V % 2 == 1)


def configure(problem: Problem) -> Config:
    """The configuration for a problem; valid for every K, V up to 512 and every chunk size.

    Validity: blocks are powers of two of at least 16; BT and BS divide L; a chunk has at most eight tiles of BT tokens.
    """
    entry = next(x for x in table(problem.arch) if serves(x, problem))
    L: int = problem.chunk_size or entry["L"]
    nvidia = problem.arch.startswith("sm_")

    def block(size: int, most: int, least: int = MIN_BLOCK[problem.dtype]) -> int:
        return least if size < least else min(most, next_power_of_2(size))

    def tile(name: str) -> Tile:
        BT, BS, BK, BV, num_warps, num_stages, *rest = entry[name]
        descriptors = rest[0] if rest else 1
        span = rest[1] if len(rest) > 1 else 1
        holds_row = name in ("forward", "backward")
        long = holds_row and L > entry["L"]
        if long:  # a program holds a row of scores as long as the chunk
            least = min(64, L // (4 if problem.matrix_units else 8))
            BT, BS, num_warps, span = max(BT, least), max(BS, least), max(num_warps, L // 64), 1
        if (long and nvidia) or (holds_row and L > LONGEST_CHUNK):
            BK = min(BK, 32 if problem.dtype == "float32" else 64)
        spread = nvidia and name in SPREAD and (long or value_by_value(problem))
        if spread:
            # Over more threads: with so many values in each, ptxas spills kilobytes, and has spilt wrongly
            # (tools/sass.py).
            num_warps = max(num_warps, 8)
        if holds_row and L > LONGEST_CHUNK:  # the stage functions alone: it fits, it is not fast
            spread, num_stages = True, 1
        # Two groups of warps that share a product of 32 values have ended with an illegal memory access.
        values = block(problem.V, max(BV, 64), 64) if spread and problem.matrix_units else block(problem.V, BV)
        return Tile(
            BT=min(BT, L),
            BS=min(BS, L),
            BK=block(problem.K, BK),
            BV=values,
            num_warps=num_warps,
            num_stages=num_stages,
            descriptors=descriptors,
            span=span,
        )

    tiles = {name: tile(name) for name in TILES if name in entry}
    parts = cdiv(problem.V, tiles["fused"].BV) if "fused" in tiles else 1
    if L > entry["L"] or not fused_segments(problem.B * problem.H, parts):
        tiles = {name: x for name, x in tiles.items() if name not in FUSED}
    return Config(L=L, gates=entry["gates"], **tiles)
