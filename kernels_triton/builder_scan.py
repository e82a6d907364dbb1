"""The launches of the scan over chunks, forward and backward; in segments where heads are few."""

from __future__ import annotations

from typing import Any

from .config import ONE_PIECE, PROGRAMS, cdiv, fused_segments
from .kernels import state_scan
from .kernels.segments import FOLLOW, LAST, ONE, SUM
from .launch import Launch, Spec
from .launch_builder import STATE_WEIGHT, LaunchBuilder

# What each segment adds to the state and to n, and what it leaves of them: parameters and buffers, which are others
# backward, where the scan may be cut into another number of segments.
SUMS = {"sums": "segment_sums", "norm_sums": "segment_norm_sums", "decays": "segment_decays"}


class ScanBuilder(LaunchBuilder):
    """One launch, or two: the first segment and what the others but the last add, then the others side by side."""

    def _tiles(self, backward: bool) -> int:
        tile = self.config.dstate if backward else self.config.state
        return cdiv(self.p.K, tile.BK) * cdiv(self.p.V, tile.BV)

    @staticmethod
    def _sums(backward: bool) -> dict[str, str]:
        return {parameter: f"d{buffer}" if backward else buffer for parameter, buffer in SUMS.items()}

    def _limits(self, backward: bool) -> tuple[int, int]:
        """Into how many segments a scan may be cut: those of 4 chunks or more, and those of 16 or more."""
        if not backward and self.value_parts > 1:
            most = max(1, fused_segments(self.heads, self.value_parts))
            return most, most
        scans = self.heads * self._tiles(backward)
        few, most = (min(n // scans + 1, limit) if scans < ONE_PIECE else 1 for n, limit in PROGRAMS)
        return few, max(few, most)

    def segments(self, backward: bool) -> int:
        """Into how many segments the scan is cut; packed sequences at most, each by its length (`kernels/segments.py`).

        As the gates' kernel, only from so many chunks on: of other lengths there are two plans then, not three.
        """
        NT, (few, most) = cdiv(self.p.T, self.L), self._limits(backward)
        if not self.packed:
            most = max(min(few, NT // 4), min(most, NT // 16))
        if NT <= self.G or most <= 1:
            return 1
        return most if self.packed else cdiv(NT, cdiv(NT, most))

    def _scan(
        self,
        backward: bool,
        segments: Any,
        operands: dict[str, Any],
        outputs: dict[str, tuple[str, Spec]],
        **flags: Any,
    ) -> Launch:
        """segments: ONE, SUM, FOLLOW or LAST, a constant of kernels/state.py. flags: constexprs."""
        p, tile = self.p, self.config.dstate if backward else self.config.state
        x, y = ("q", "dh") if backward else ("k", "v")
        tokens, unit = self._tokens(tile, ("x", x), ("y", y))
        count = self.segments(backward)
        programs = {SUM.value: count - 1, FOLLOW.value: count if self.packed else count - 1}.get(segments.value, 1)
        follows = count > 1 and segments.value in (FOLLOW.value, LAST.value)
        # What the first launch stored, in place: the second one stores the rest.
        begun = {"begun": "states", "begun_norms": "norms"} if segments.value == FOLLOW.value else {}
        begun = {x: y for x, y in begun.items() if y == "states" or flags["HAS_NORMS"]}
        by_descriptor = self.source(tile) and flags["KEEP"]
        return self._launch(
            state_scan,
            {
                **tokens,
                "w": (STATE_WEIGHT if self.pairs else None) if backward else "c",
                "w_low": "c_low" if self.pairs and not backward else None,
                "e": "e" if backward and not self.pairs else None,
                "u": "delta" if backward else None,
                "gamma": "gamma",
                **operands,
                **{x: name if follows else None for x, name in self._sums(backward).items()},
                **{x: outputs[begun[x]][0] if x in begun else None for x in ("begun", "begun_norms")},
                "states_view": self._states(tile, outputs["states"][0]) if by_descriptor else None,
                "segment": 0 if self.packed or segments.value == ONE.value else cdiv(self.NT, count),
                **self.packing,
            },
            outputs,
            self.all_heads * self._tiles(backward) * programs,
            tile,
            "BT BK BV",
            in_place=tuple(begun.items()),
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            SEGMENTS=segments.value,
            FEW=self._limits(backward)[0] if self.packed else 1,
            MOST=count if self.packed else 1,
            UNCUT=self.G,
            PACKED=self.packed,
            PAIRS=self.pairs,
            BACKWARD=backward,
            SOURCE=self.source(tile),
            BF16=p.dtype == "bfloat16",
            PRECISION=self.precision,
            **flags,
        )

    def _scans(
        self,
        backward: bool,
        operands: dict[str, Any],
        names: tuple[str, str, str, str, str],
        keep: bool = True,
        **flags: bool,
    ) -> tuple[Launch, ...]:
        """names: of the outputs' buffers. keep: store the chunks' states, not only what the scan comes to."""
        p, head = self.p, self.p.state_heads
        count = self.segments(backward)
        shapes = (
            self.states_spec if keep else Spec((1,), self.state_dtype),
            self.norms_spec if keep and flags["HAS_NORMS"] else Spec((1,), "float32"),
            Spec((*head, p.K, p.V), p.c_dtype if backward else "float32"),
            Spec((*head, p.K), "float32"),
            Spec((*head, self._tiles(backward), 2) if flags["HAS_OUTER"] else (1,), "float32"),
        )
        parameters = ("states", "norms", "state_out", "norm_out", "outer")
        outputs = {x: (name, shape) for x, name, shape in zip(parameters, names, shapes, strict=True)}
        if count == 1:
            return (self._scan(backward, ONE if keep else LAST, operands, outputs, KEEP=keep, **flags),)
        kept = {x: outputs[x] for x in ("states", "norms")}
        return (
            self._scan_sums(backward, operands, kept, keep, **flags),
            self._scan(backward, FOLLOW if keep else LAST, operands, outputs, KEEP=keep, **flags),
        )

    def _scan_sums(
        self,
        backward: bool,
        operands: dict[str, Any],
        kept: dict[str, tuple[str, Spec]],
        keep: bool,
        **flags: bool,
    ) -> Launch:
        """The first of two launches. kept: the buffers of states and norms, of one element each if not to keep."""
        p = self.p
        # Of packed sequences a segment's place follows from its first chunk: of those kept none has fewer than four.
        of = (p.H, self.NT // 4 + 1) if self.packed else (p.B, p.H, self.segments(backward) - 1)
        added, norms_added, left = self._sums(backward).values()
        outputs = kept | {
            "state_out": (added, Spec((*of, p.K, p.V), "float32")),
            "norm_out": (norms_added, Spec((*of, p.K), "float32")),
            "outer": (left, Spec(of, "float32")),
        }
        start = {name: x if name in ("state_in", "norm_in") else None for name, x in operands.items()}
        of_first = flags | {"HAS_INITIAL": False, "HAS_OUTER": False}
        return self._scan(backward, SUM, start, outputs, KEEP=keep, **of_first)

    def _forward_operands(self) -> tuple[dict[str, Any], dict[str, bool]]:
        """The operands of the forward scan that the initial state is, and the flags for them."""
        p, initial = self.p, self.p.has_initial
        operands = {
            "state_in": "c_initial" if initial else None,
            "norm_in": "n_initial" if initial and p.normalize else None,
            **dict.fromkeys(("fw_last", "fw_norm_last", "fw_initial", "fw_norm_initial")),
        }
        flags = {
            "HAS_STATE_IN": initial,
            "HAS_NORM_IN": initial and p.normalize,
            "HAS_INITIAL": initial,
            "HAS_OUTER": False,
            "HAS_NORMS": p.normalize,
        }
        return operands, flags

    def state_forward(self, last: tuple[str, str] = ("c_last", "n_last")) -> tuple[Launch, ...]:
        """Chunk-start states and the last state, under the names `last`."""
        operands, flags = self._forward_operands()
        names = ("states", "norms" if self.p.normalize else "unused_norms", *last, "unused_scan")
        return self._scans(False, operands, names, **flags)

    def segment_sums(self) -> Launch:
        """What each segment but the last adds to the state, for the fused kernel."""
        operands, flags = self._forward_operands()
        kept = {
            "states": ("unused_sums_states", Spec((1,), self.state_dtype)),
            "norms": ("unused_sums_norms", Spec((1,), "float32")),
        }
        return self._scan_sums(False, operands, kept, keep=False, **flags)

    def segment_state(self) -> tuple[Launch, ...]:
        """The last state alone, from a state of 0, whatever the problem's initial one."""
        operands = ("state_in", "norm_in", "fw_last", "fw_norm_last", "fw_initial", "fw_norm_initial")
        return self._scans(
            False,
            dict.fromkeys(operands),
            ("unused_states", "unused_norms", "c_last", "n_last", "unused_scan"),
            keep=False,
            **dict.fromkeys(("HAS_STATE_IN", "HAS_NORM_IN", "HAS_INITIAL", "HAS_OUTER"), False),
            HAS_NORMS=self.p.normalize,
        )

    def state_backward(
        self, has_dc_last: bool, has_dn_last: bool, outer: bool = True, norms: bool = True, keep: bool = True
    ) -> tuple[Launch, ...]:
        """Cotangents of the states after each chunk (unless not to keep), and of the initial state.

        outer: with the products at both ends that the gates' gradients need. norms: n is there and has a cotangent.
        """
        initial = self.p.has_initial and outer
        return self._scans(
            True,
            {
                "state_in": "dc_last" if has_dc_last else None,
                "norm_in": "dn_last" if has_dn_last else None,
                "fw_last": "c_last" if outer and has_dc_last else None,
                "fw_norm_last": "n_last" if outer and norms and has_dn_last else None,
                "fw_initial": "c_initial" if initial else None,
                "fw_norm_initial": "n_initial" if initial and norms else None,
            },
            (
                "dstates" if keep else "unused_dstates",
                "dnorms" if norms and keep else "unused_dnorms",
                "dc_initial",
                "dn_initial",
                "outer" if outer else "unused_scan",
            ),
            keep=keep,
            HAS_STATE_IN=has_dc_last,
            HAS_NORM_IN=has_dn_last,
            HAS_INITIAL=initial,
            HAS_OUTER=outer,
            HAS_NORMS=norms,
        )
