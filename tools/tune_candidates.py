"""Which tiles of each kernel are worth compiling. Pure; the only place that states what is valid."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from kernels_triton.config import FUSED, TILES, Config, Tile, next_power_of_2
from kernels_triton.problem import Problem

# Per kernel: BT, BK, BV, num_warps, num_stages. A scan takes whole chunks or parts; BS is BT where it counts at all.
BLOCKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "state": ((64, 128), (64, 128), (64, 128, 256), (4, 8), (2, 3)),
    "dstate": ((64, 128), (64, 128), (64, 128, 256), (4, 8), (2, 3)),
    "forward": ((32, 64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)),
    "backward": ((32, 64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4)),
    "normaliser": ((16, 32, 64), (16,), (64, 128, 256), (2, 4), (2,)),
    "fused": ((64,), (64, 128), (64,), (4, 8), (1, 2, 3)),
    "dfused": ((64,), (64,), (64,), (4, 8), (1, 2, 3)),
}
# Where registers multiply, as for float32 in "ieee": each holds its rows of a whole tile, so that tiles are smaller.
WITHOUT_MATRIX_UNITS: dict[str, tuple[tuple[int, ...], ...]] = {
    "state": ((32, 64), (32, 64, 128), (32, 64, 128), (1, 2, 4, 8), (2,)),
    "dstate": ((32, 64), (32, 64, 128), (32, 64, 128), (1, 2, 4, 8), (2,)),
    "forward": ((32, 64), (32, 64, 128), (16, 32, 64), (4, 8), (2,)),
    "backward": ((32, 64), (32, 64, 128), (16, 32), (4, 8), (2,)),
    "normaliser": BLOCKS["normaliser"],
}
MOST_OF_A_STATE = 64  # values that a thread of a scan holds in registers there: with more it is far behind
# The kernel that a field of Config shapes; scans run twice, forward and backward.
KERNELS = {
    "state": ("state_scan", False),
    "dstate": ("state_scan", True),
    "forward": ("chunk_forward", None),
    "backward": ("chunk_backward", None),
    "normaliser": ("normaliser_backward", None),
    "fused": ("fused_forward", None),
    "dfused": ("fused_backward", None),
}


def valid(field: str, tile: Tile, config: Config, K: int, V: int) -> bool:
    """Whether a tile may stand in a configuration for these head dims, and is not the same as a smaller one."""
    widest_k, widest_v = (max(16, next_power_of_2(x)) for x in (K, V))
    if tile.BT > config.L or config.L % tile.BT or tile.BK > widest_k or tile.BV > widest_v:
        return False
    if field in ("forward", "backward") and config.L // tile.BT > 4:
        return False
    if config.L // tile.BT % tile.span:  # there are no two tiles
        return False
    if field == "dfused" and (tile.BT < config.L or tile.BV < V):
        return False
    return field not in FUSED or tile.BK >= K


def hopeless(field: str, tile: Tile, problem: Problem) -> bool:
    """Whether tiles of this kind have all lost on a GPU: not worth compiling."""
    if not problem.matrix_units:
        return "state" in field and tile.BK * tile.BV > MOST_OF_A_STATE * 32 * tile.num_warps
    # Two groups of four warps that share a product of 32 values: never the fastest, often an illegal memory access.
    groups = problem.arch == "sm_90" and field in ("forward", "backward") and tile.num_warps > 4
    return groups and tile.BV < 64


def candidates(field: str, config: Config, problem: Problem) -> Iterator[Tile]:
    """The valid tiles of one kernel, the present one first; with and without descriptors where the problem has them."""
    present: Tile | None = getattr(config, field)
    if present is None:
        return
    yield present
    matrix_units = problem.matrix_units
    blocks = (BLOCKS if matrix_units else WITHOUT_MATRIX_UNITS)[field]
    sources = (1, 0) if problem.descriptors and field != "normaliser" else (1,)
    spans = (1, 2) if field == "backward" and matrix_units else (1,)
    for BT, BK, BV, num_warps, num_stages, source, span in itertools.product(*blocks, sources, spans):
        BS = BT if field in ("forward", "backward", *FUSED) else present.BS
        tile = Tile(BT, BS, BK, BV, num_warps, num_stages, source, span)
        if tile != present and valid(field, tile, config, problem.K, problem.V) and not hopeless(field, tile, problem):
            yield tile


def with_tile(config: Config, field: str, tile: Tile) -> Config:
    """The configuration with one kernel's tile changed."""
    if field not in TILES:
        raise ValueError(f"field: expected one of {', '.join(TILES)}, got {field!r}")
    changed: dict[str, Any] = {field: tile}
    return dataclasses.replace(config, **changed)
