"""The launches of the fused kernels, for many heads."""

from __future__ import annotations

from .builder_scan import ScanBuilder
from .config import cdiv
from .kernels import fused_backward, fused_forward
from .kernels.segments import FOLLOW, ONE
from .launch import Launch, Spec
from .launch_builder import GATES, NORMALISER


class FusedBuilder(ScanBuilder):
    """One launch for what otherwise takes a scan over chunks and a kernel of each chunk."""

    def fused_forward(self, save: bool) -> tuple[Launch, ...]:
        """h, the last state and, to save, the chunk-start states; where heads are few, after their segments' sums."""
        p, tile = self.p, self.config.fused
        assert tile is not None
        count = self.segments(backward=False) if self.value_parts > 1 else 1
        before = (self.segment_sums(),) if count > 1 else ()
        sums = self._sums(backward=False).items()
        tokens, unit = self._tokens(tile, ("q", "q"), ("k", "k"), ("v", "v"))
        fused = self._launch(
            fused_forward,
            {
                **tokens,
                **{name: name for name in (*GATES, "floor")},
                "c_initial": "c_initial" if p.has_initial else None,
                "n_initial": "n_initial" if p.has_initial and p.normalize else None,
                **{x: name if count > 1 else None for x, name in sums},
                "segment": 0 if self.packed or count == 1 else cdiv(self.NT, count),
                **self.packing,
            },
            {
                "h": ("h", self._token_spec(p.V, self.h_dtype)),
                "r": self._r(),
                "states": ("states", self.states_spec) if save else ("unused_states", Spec((1,), self.state_dtype)),
                "norms": ("norms", self.norms_spec)
                if save and p.normalize
                else ("unused_norms", Spec((1,), "float32")),
                "c_last": ("c_last", Spec((*p.state_heads, p.K, p.V), "float32")),
                "n_last": ("n_last", Spec((*p.state_heads, p.K), "float32")),
            },
            self.all_heads * self.value_parts * count,
            tile,
            "BT BK BV",
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            EPS=p.eps,
            HAS_INITIAL=p.has_initial,
            SEGMENTS=(FOLLOW if count > 1 else ONE).value,
            FEW=self._limits(backward=False)[0] if self.packed and count > 1 else 1,
            MOST=count if self.packed else 1,
            UNCUT=self.G,
            SAVE=save,
            NORMALIZE=p.normalize,
            BTHD=p.layout == "bthd",
            PACKED=self.packed,
            SOURCE=self.source(tile),
            **self.arithmetic,
        )
        return (*before, fused)

    @property
    def finds_delta(self) -> bool:
        """Whether the fused backward kernel can find dh . h itself: by matrix units, in bfloat16."""
        return self.config.dfused is not None and self.p.exact and self.p.dtype == "bfloat16"

    def fused_backward(self, has_dlast: bool, norms: bool = True, find_delta: bool = False) -> Launch:
        """dq, dk, dv, the initial state's gradient, and what the gates' gradients need, for small heads.

        norms: n has a cotangent. find_delta: `delta` is what `normaliser(factor=True)` left.
        """
        p, tile = self.p, self.config.dfused
        assert tile is not None
        head = (p.B, p.H)
        read = ("q", "k", "v", "dh", *(("h",) if find_delta else ()))
        tokens, unit = self._tokens(tile, *zip(read, read, strict=True))
        last = ("dc_last", "dn_last", "c_last", "n_last")

        def given(name: str, there: bool) -> str | None:
            return name if there and (norms or name not in ("dn_last", "n_last", "n_initial")) else None

        return self._launch(
            fused_backward,
            {
                **tokens,
                **({} if find_delta else {"h": None, "h_sb": 0, "h_sh": 0, "h_st": 0}),
                **self.decays,
                **{name: name for name in NORMALISER},
                "states": self._states(tile, "states"),
                "norms": "norms" if norms else None,
                **{name: given(name, has_dlast) for name in last},
                **{name: given(name, p.has_initial) for name in ("c_initial", "n_initial")},
                **self.packing,
            },
            {
                "dq": ("dq", self._token_spec(p.K, p.dtype)),
                "dk": ("dk", self._token_spec(p.K, p.dtype)),
                "dv": ("dv", self._token_spec(p.V, p.dtype)),
                "rows": ("row_sums", Spec((*head, 2, self.NT * self.L), "float32")),
                "cols": ("col_sums", Spec((*head, 2, self.NT * self.L), "float32")),
                "inner": ("inner", Spec((*head, 1, self.NT), "float32")),
                "outer": ("outer", Spec((*p.state_heads, 1, 2), "float32")),
                "dc_initial": ("dc_initial", Spec((*p.state_heads, p.K, p.V), p.c_dtype)),
                "dn_initial": ("dn_initial", Spec((*p.state_heads, p.K), "float32")),
            },
            self.all_heads,
            tile,
            "BK BV",
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            HAS_LAST=has_dlast,
            HAS_INITIAL=p.has_initial,
            HAS_NORMS=norms,
            FIND_DELTA=find_delta,
            BTHD=p.layout == "bthd",
            PACKED=self.packed,
            PAIRS=self.pairs,
            SOURCE=self.source(tile),
            **self.arithmetic,
        )
