"""One method per kernel: the launch it takes for a problem. Which launches, and in what order, is the plan's matter."""

from __future__ import annotations

import dataclasses
import math

from .builder_fused import FusedBuilder
from .builder_recurrent import RecurrentBuilder
from .config import MANY_HEADS, Tile, cdiv
from .kernels import (
    chunk_backward,
    chunk_forward,
    gates_backward,
    gates_backward_sums,
    gates_forward,
    gates_sums,
    normaliser_backward,
)
from .launch import Launch, Spec
from .launch_builder import GATES, NORMALISER, STATE_WEIGHT


class Builder(FusedBuilder, RecurrentBuilder):
    """The launches of one problem."""

    @property
    def split_gates(self) -> bool:
        """Few heads, and more chunks than one program takes at a time: the gates take two launches then.

        Packed sequences are many heads: each takes its own program, with the same bits.
        """
        return not self.packed and self.heads < MANY_HEADS and self.NT > self.G

    @property
    def _gates_tile(self) -> Tile:
        """Four tokens per thread, in both kernels: how many warps there are decides in which order they add."""
        return Tile(0, 0, 0, 0, num_warps=max(1, self.G * self.L // 128), num_stages=1)

    @property
    def _token_warps(self) -> int:
        """Of kernels that take a chunk's tokens one per thread."""
        return max(1, min(4, self.L // 32))

    def gates_sums(self) -> Launch:
        """Prefix sums inside the chunks."""
        head = (self.p.B, self.p.H)
        return self._launch(
            gates_sums,
            {**self._strided("i"), **self._strided("f"), "T": self.p.T},
            {
                "sums": ("sums", Spec((*head, 2, self.NT * self.L), "float32")),
                "totals": ("totals", Spec((*head, 4, self.NT), "float32")),
                "tokens": ("tokens", Spec((*head, self.NT), "int32")),
                "groups": ("groups", Spec((*head, 4, cdiv(self.NT, self.G)), "int32")),
            },
            self.heads * cdiv(self.NT, self.G),
            self._gates_tile,
            G=self.G,
            SIGMOID=self.sigmoid,
        )

    def gates(
        self,
        i: str | None = "i",
        f: str = "f",
        f_is_log: bool = False,
        m_token: str | None = None,
        m_chunk: str | None = None,
        split: bool = False,
        rounded: bool = True,
    ) -> Launch:
        """Stabilisers and decays. `m_token`, `m_chunk`: given stabilisers, in place of those computed from i and f.

        split: after `gates_sums`. rounded: all chunks' states are handed on with `m_chunk`, a float32, not the last one
        alone.
        """
        p = self.p
        head = (p.B, p.H)
        return self._launch(
            gates_forward,
            {
                **self._strided("i", i),
                **self._strided("f", f),
                "m_initial": "m_initial" if p.has_initial else None,
                "m_token": m_token,
                "m_chunk_given": m_chunk,
                **{name: name if split else None for name in ("sums", "totals", "tokens", "groups")},
                **self.packing,
            },
            {
                **{name: (name, self.handed_on[name]) for name in (*GATES, "floor")},
                "m": ("m", Spec((*head, p.T), "float32")),
                "m_chunk": ("m_chunk", Spec((*head, self.NT + 1), "float32")),
                **{name: (name, self.handed_on[name]) for name in ("m_last", "picked")},
            },
            self.heads * cdiv(self.NT, self.G) if split else self.all_heads,
            self._gates_tile,
            G=self.G,
            HAS_INITIAL=p.has_initial,
            HAS_I=i is not None,
            F_IS_LOG=f_is_log,
            M_GIVEN=m_token is not None,
            ROUNDED=rounded and m_token is None,
            SPLIT=split,
            SIGMOID=self.sigmoid,
            PACKED=self.packed,
        )

    def outputs(self, store_d: bool = False) -> Launch:
        """h and the signed normaliser; with store_d the normaliser per token too."""
        p, tile = self.p, self.config.forward
        tokens, unit = self._tokens(tile, ("q", "q"), ("k", "k"), ("v", "v"))
        return self._launch(
            chunk_forward,
            {
                **tokens,
                **{name: name for name in (*GATES, "floor")},
                "states": self._states(tile, "states"),
                "norms": "norms" if p.normalize else None,
                **self.packing,
            },
            {
                "h": ("h", self._token_spec(p.V, self.h_dtype)),
                "r": self._r(),
                "d": ("d", Spec((p.B, p.H, p.T), "float32")) if store_d else ("unused_d", Spec((1,), "float32")),
            },
            self.heads * self.NT * (self.L // tile.BT),
            tile,
            "BT BK BV",
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            EPS=p.eps,
            STORE_D=store_d,
            NORMALIZE=p.normalize,
            BTHD=p.layout == "bthd",
            PACKED=self.packed,
            SOURCE=self.source(tile),
            **self.arithmetic,
        )

    def normaliser(self, given: str | None = None, factor: bool = False) -> Launch:
        """1 / d and the cotangent of r per token. given: a buffer with d itself; then nothing flows through it.

        factor: of that cotangent all but its factor dh . h, for a kernel that finds it.
        """
        p, tile = self.p, self.config.normaliser
        reads = p.exact and not given and not factor  # else there is so little to do that a program takes a whole chunk
        if not reads:
            tile = dataclasses.replace(tile, BT=self.L, num_warps=self._token_warps)
        sb, sh, st = self._steps("dh")
        unit = math.gcd(16, sb, sh, st)
        return self._launch(
            normaliser_backward,
            {
                "h": "h" if reads else None,
                "dh": "dh",
                "dh_sb": sb // unit,
                "dh_sh": sh // unit,
                "dh_st": st // unit,
                "r": given or ("r" if p.normalize else None),
                "floor": "floor" if p.normalize and not given else None,
                "a": "a",
                **{name: name if self.pairs else None for name in ("a_low", "gamma", "gamma_low")},
                **self.packing,
            },
            {
                **{name: (name, Spec(self.rows, "float32")) for name in NORMALISER},
                "state_weight": (STATE_WEIGHT, Spec(self.rows, "float32"))
                if self.pairs
                else ("unused_state_weight", Spec((1,), "float32")),
            },
            self.heads * self.NT * (self.L // tile.BT),
            tile,
            "BT BV",
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            EPS=p.eps,
            EXACT=p.exact and not given,
            FACTOR=factor,
            NORMALIZE=p.normalize,
            D_GIVEN=given is not None,
            BTHD=p.layout == "bthd",
            PACKED=self.packed,
            PAIRS=self.pairs,
        )

    def gradients(self, norms: bool = True, inner: bool = True) -> Launch:
        """dq, dk, dv, and the row and column sums for the gates. norms: n is there and has a cotangent."""
        p, tile = self.p, self.config.backward
        tokens, unit = self._tokens(tile, ("q", "q"), ("k", "k"), ("v", "v"), ("dh", "dh"))
        tiles = cdiv(p.K, tile.BK)
        rows = self.L // tile.BT
        span = tile.span if rows % tile.span == 0 and tile.BS == tile.BT else 1
        # <dC', C>: in bfloat16 matrix units find it beside dk. Others need float32's digits: dv's last program adds it
        # up, or one of its own where those of dv have more than a tile to do.
        trace = inner and p.dtype == "bfloat16"
        roles = 2 * rows + rows // span + (inner and not trace and span > 1)
        sums = Spec((p.B, p.H, 2 * tiles, self.NT * self.L), "float32")
        return self._launch(
            chunk_backward,
            {
                **tokens,
                **self.decays,
                **{name: name for name in NORMALISER},
                "states": self._states(tile, "states"),
                "norms": "norms" if norms else None,
                "dstates": self._states(tile, "dstates"),
                "dnorms": "dnorms" if norms else None,
                **self.packing,
            },
            {
                "dq": ("dq", self._token_spec(p.K, p.dtype)),
                "dk": ("dk", self._token_spec(p.K, p.dtype)),
                "dv": ("dv", self._token_spec(p.V, p.dtype)),
                "rows": ("row_sums", sums),
                "cols": ("col_sums", sums),
                "inner": ("inner", Spec((p.B, p.H, tiles, self.NT), "float32")),
            },
            self.heads * self.NT * roles * tiles,
            tile,
            "BT BS BK BV",
            SPAN=span,
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            HAS_NORMS=norms,
            HAS_INNER=inner,
            TRACE=trace,
            ROLES=roles,
            BTHD=p.layout == "bthd",
            PACKED=self.packed,
            PAIRS=self.pairs,
            SOURCE=self.source(tile),
            **self.arithmetic,
        )

    def gates_gradient(self, has_dlast: bool, has_dm_last: bool) -> tuple[Launch, ...]:
        """di, df and the initial stabiliser's gradient. has_dlast: the last state has a cotangent."""
        p = self.p
        fused = self.config.dfused is not None
        key_tiles = 1 if fused else cdiv(p.K, self.config.backward.BK)
        scan_tiles = 1 if fused else self._tiles(backward=True)
        tile = Tile(0, 0, 0, 0, num_warps=self._token_warps, num_stages=1)
        sums = has_dlast and not self.sigmoid
        gains = self._launch(
            gates_backward_sums,
            {"rows": "row_sums", "cols": "col_sums", **self.packing},
            {"gains": ("gains", Spec((p.B, p.H, 3, self.NT), "float32"))},
            self.heads * self.NT,
            tile,
            NKT=key_tiles,
            PACKED=self.packed,
        )
        gradient = self._launch(
            gates_backward,
            {
                **self._strided("f"),
                **self._strided("i", "i" if self.sigmoid else None),
                "gamma": "gamma",
                "rows": "row_sums",
                "cols": "col_sums",
                "inner": "inner",
                "outer": "outer",
                "dm_last": "dm_last" if has_dm_last else None,
                "picked": "picked",
                "gains": "gains" if sums else None,
                **self.packing,
            },
            {
                "di": ("di", self._token_spec(None, p.i_dtype)),
                "df": ("df", self._token_spec(None, p.f_dtype)),
                "dm_initial": ("dm_initial", Spec(p.state_heads, "float32")),
            },
            self.heads * self.NT,
            tile,
            NKT=key_tiles,
            NW=key_tiles,
            NP=scan_tiles,
            HAS_DLAST=has_dlast,
            HAS_DM_LAST=has_dm_last,
            SIGMOID=self.sigmoid,
            BTHD=p.layout == "bthd",
            PACKED=self.packed,
        )
        return (gains, gradient) if sums else (gradient,)
