"""One method per kernel: the launch it takes for a problem. Which launches, and in what order, is the plan's matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import Config, Tile, configure
from .kernels import chunk_backward, chunk_forward, gates_backward, gates_forward, normaliser_backward, state_scan
from .launch import Descriptor, Launch, Operand, Spec
from .problem import Problem, Strides

# Buffers that the gates' kernel makes and most others read.
GATES = ("c", "a", "alpha", "beta", "gamma")
# And those that the normaliser's kernel makes, backward.
NORMALISER = ("d_inverse", "delta", "state_inverse", "state_delta")


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


class Builder:
    """The launches of one problem."""

    def __init__(self, problem: Problem, config: Config | None = None):
        self.p = problem
        self.config = config or configure(problem)
        self.heads = problem.B * problem.H
        self.L = self.config.L
        self.NT = cdiv(problem.T, self.L)
        self.rows = (problem.B, problem.H, self.NT * self.L)
        self.strides: dict[str, Strides] = dict(problem.strides)
        self.state_dtype = "bfloat16" if problem.dtype == "bfloat16" else "float32"
        # float16 has tf32's mantissa, so its weighted products lose nothing in tf32.
        self.descriptors = problem.descriptors
        self.precision = "tf32" if problem.dtype == "float16" else problem.precision

    def _tokens(self, tile: Tile, *tensors: tuple[str, str]) -> tuple[dict[str, Operand], int]:
        """Parameters `x, x_sb, x_sh, x_st` of (parameter, buffer) pairs; strides in units that keep loads aligned."""
        p = self.p
        used = [s for _, buffer in tensors for s in self.strides[buffer]]
        unit = math.gcd(16, *used) or 16
        parameters: dict[str, Operand] = {}
        for name, buffer in tensors:
            D, block = (p.K, tile.BK) if buffer in ("q", "k") else (p.V, tile.BV)
            strides = self.strides[buffer]
            parameters[name] = buffer
            if self.descriptors:
                # A stride of an axis of size 1 may be anything but must be aligned.
                steps = tuple(s or D for s in strides)
                parameters[name] = Descriptor(buffer, (p.B, p.H, p.T, D), (*steps, 1), (1, 1, tile.BT, block))
            for axis, stride in zip("bht", strides, strict=True):
                parameters[f"{name}_s{axis}"] = stride // unit
        return parameters, unit

    def _states(self, tile: Tile, buffer: str) -> Operand:
        p = self.p
        if not self.descriptors:
            return buffer
        shape = (self.heads * self.NT, p.K, p.V)
        return Descriptor(buffer, shape, (p.K * p.V, p.V, 1), (1, tile.BK, tile.BV))

    def _launch(
        self,
        kernel: Any,
        operands: Mapping[str, Operand | None],
        outputs: dict[str, tuple[str, Spec]],
        programs: int,
        tile: Tile,
        blocks: str = "",
        **constexprs: Any,
    ) -> Launch:
        # An absent operand is filled with a present one: a kernel behind its flag never reads it.
        present = next(x for x in operands.values() if isinstance(x, str))
        return Launch(
            kernel=kernel,
            operands={name: present if x is None else x for name, x in operands.items()},
            outputs=outputs,
            grid=programs,
            constexprs={"H": self.p.H, "L": self.L, **{b: getattr(tile, b) for b in blocks.split()}, **constexprs},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def gates(
        self,
        i: str | None = "i",
        f: str = "f",
        f_is_log: bool = False,
        m_token: str | None = None,
        m_chunk: str | None = None,
    ) -> Launch:
        """Stabilisers and decays. `m_token`, `m_chunk`: given stabilisers, in place of those computed from i and f."""
        p = self.p

        def gate(name: str, buffer: str | None) -> dict[str, str | int | None]:
            sb, sh, st = self.strides[buffer] if buffer else (0, 0, 0)
            return {name: buffer, f"{name}_sb": sb, f"{name}_sh": sh, f"{name}_st": st}

        head = (p.B, p.H)
        return self._launch(
            gates_forward,
            {
                **gate("i", i),
                **gate("f", f),
                "m_initial": "m_initial" if p.has_initial else None,
                "m_token": m_token,
                "m_chunk_given": m_chunk,
                "T": p.T,
            },
            {
                "c": ("c", Spec((*head, 2, self.NT * self.L), "float32")),
                "a": ("a", Spec((*head, 2, self.NT * self.L), "float32")),
                "alpha": ("alpha", Spec(self.rows, "float32")),
                "beta": ("beta", Spec(self.rows, "float32")),
                "gamma": ("gamma", Spec((*head, self.NT), "float32")),
                "floor": ("floor", Spec(self.rows, "float32")),
                "m": ("m", Spec((*head, p.T), "float32")),
                "m_chunk": ("m_chunk", Spec((*head, self.NT + 1), "float32")),
                "m_last": ("m_last", Spec(head, "float32")),
                "picked": ("picked", Spec(head, "int32")),
            },
            self.heads,
            Tile(0, 0, 0, 0, 1, num_warps=4, num_stages=1),
            G=max(1, min(32, self.config.gates // self.L)),
            HAS_INITIAL=p.has_initial,
            HAS_I=i is not None,
            F_IS_LOG=f_is_log,
            M_GIVEN=m_token is not None,
        )

    def _scan(self, backward: bool, operands: dict[str, Any], outputs: dict[str, Any], **flags: Any) -> Launch:
        p, tile = self.p, self.config.dstate if backward else self.config.state
        x, y = ("q", "dh") if backward else ("k", "v")
        strided, unit = self._tokens(tile, ("x", x), ("y", y))
        tiles = cdiv(p.K, tile.BK) * cdiv(p.V, tile.BV)
        head = (p.B, p.H)
        names = ("states", "norms", "state_out", "norm_out", "outer")
        shapes = {
            "states": Spec((*head, self.NT, p.K, p.V), self.state_dtype),
            "norms": Spec((*head, self.NT, p.K), "float32"),
            "state_out": Spec((*head, p.K, p.V), "float32"),
            "norm_out": Spec((*head, p.K), "float32"),
            "outer": Spec((*head, tiles, 2) if flags["HAS_OUTER"] else (1,), "float32"),
        }
        return self._launch(
            state_scan,
            {**strided, **operands, "T": p.T},
            {name: (outputs[name], shapes[name]) for name in names},
            self.heads * tiles,
            tile,
            "BT BK BV",
            K=p.K,
            V=p.V,
            UNIT=unit,
            BACKWARD=backward,
            DESCRIPTORS=self.descriptors,
            BF16=p.dtype == "bfloat16",
            PRECISION=self.precision,
            **flags,
        )

    def state_forward(self) -> Launch:
        """Chunk-start states and the last state."""
        initial = self.p.has_initial
        absent = ("fw_last", "fw_norm_last", "fw_initial", "fw_norm_initial")
        return self._scan(
            False,
            {
                "w": "alpha",
                "u": None,
                "gamma": "gamma",
                "state_in": "c_initial" if initial else None,
                "norm_in": "n_initial" if initial else None,
                **dict.fromkeys(absent),
            },
            {"states": "states", "norms": "norms", "state_out": "c_last", "norm_out": "n_last", "outer": "unused_scan"},
            HAS_STATE_IN=initial,
            HAS_NORM_IN=initial,
            HAS_INITIAL=initial,
            HAS_OUTER=False,
            HAS_NORMS=True,
        )

    def state_backward(self, has_dc_last: bool, has_dn_last: bool, outer: bool = True, norms: bool = True) -> Launch:
        """Cotangents of the states after each chunk, and of the initial state.

        outer: with the products at both ends that the gates' gradients need. norms: n is there and has a cotangent.
        """
        initial = self.p.has_initial and outer
        return self._scan(
            True,
            {
                "w": "state_inverse",
                "u": "state_delta",
                "gamma": "gamma",
                "state_in": "dc_last" if has_dc_last else None,
                "norm_in": "dn_last" if has_dn_last else None,
                "fw_last": "c_last" if outer and has_dc_last else None,
                "fw_norm_last": "n_last" if outer and norms and has_dc_last else None,
                "fw_initial": "c_initial" if initial else None,
                "fw_norm_initial": "n_initial" if initial and norms else None,
            },
            {
                "states": "dstates",
                "norms": "dnorms",
                "state_out": "dc_initial",
                "norm_out": "dn_initial",
                "outer": "outer" if outer else "unused_scan",
            },
            HAS_STATE_IN=has_dc_last,
            HAS_NORM_IN=has_dn_last,
            HAS_INITIAL=initial,
            HAS_OUTER=outer,
            HAS_NORMS=norms,
        )

    def outputs(self, store_d: bool = False) -> Launch:
        """h and the signed normaliser; with store_d the normaliser per token too."""
        p, tile = self.p, self.config.forward
        strided, unit = self._tokens(tile, ("q", "q"), ("k", "k"), ("v", "v"))
        return self._launch(
            chunk_forward,
            {
                **strided,
                **{name: name for name in ("c", "a", "beta", "floor")},
                "states": self._states(tile, "states"),
                "norms": "norms",
                "T": p.T,
            },
            {
                "h": ("h", self._token_spec(p.V, p.dtype)),
                "r": ("r", Spec(self.rows, "float32")),
                "d": ("d", Spec((p.B, p.H, p.T), "float32")) if store_d else ("unused_d", Spec((1,), "float32")),
            },
            self.heads * self.NT * tile.PARTS,
            tile,
            "BT BK BV PARTS",
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            EPS=p.eps,
            STORE_D=store_d,
            BTHD=p.layout == "bthd",
            PAIRS=p.dtype == "float32",
            DESCRIPTORS=self.descriptors,
            BF16=p.dtype == "bfloat16",
            PRECISION=self.precision,
        )

    def normaliser(self, given: str | None = None) -> Launch:
        """1 / d and the cotangent of r per token. given: a buffer with d itself; then nothing flows through it."""
        p, tile = self.p, self.config.normaliser
        sb, sh, st = self.strides["dh"]
        unit = math.gcd(16, sb, sh, st) or 16
        return self._launch(
            normaliser_backward,
            {
                "h": None if given else "h",
                "dh": "dh",
                "dh_sb": sb // unit,
                "dh_sh": sh // unit,
                "dh_st": st // unit,
                "r": given or "r",
                "floor": None if given else "floor",
                "beta": "beta",
                "T": p.T,
            },
            {name: (name, Spec(self.rows, "float32")) for name in NORMALISER},
            self.heads * self.NT * (self.L // tile.BT),
            tile,
            "BT BV",
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            EPS=p.eps,
            EXACT=p.normalizer_grad == "exact" and not given,
            D_GIVEN=given is not None,
            BTHD=p.layout == "bthd",
        )

    def gradients(self, norms: bool = True, inner: bool = True) -> Launch:
        """dq, dk, dv, and the row and column sums for the gates. norms: n is there and has a cotangent."""
        p, tile = self.p, self.config.backward
        strided, unit = self._tokens(tile, ("q", "q"), ("k", "k"), ("v", "v"), ("dh", "dh"))
        tiles = cdiv(p.K, tile.BK)
        sums = Spec((p.B, p.H, 2 * tiles, self.NT * self.L), "float32")
        return self._launch(
            chunk_backward,
            {
                **strided,
                "q_plain": "q",
                "k_plain": "k",
                **{name: name for name in ("c", "a", "alpha", *NORMALISER)},
                "states": self._states(tile, "states"),
                "norms": "norms" if norms else None,
                "dstates": self._states(tile, "dstates"),
                "dnorms": "dnorms" if norms else None,
                "T": p.T,
            },
            {
                "dq": ("dq", self._token_spec(p.K, p.dtype)),
                "dk": ("dk", self._token_spec(p.K, p.dtype)),
                "dv": ("dv", self._token_spec(p.V, p.dtype)),
                "rows": ("row_sums", sums),
                "cols": ("col_sums", sums),
                "inner": ("inner", Spec((p.B, p.H, tiles, self.NT), "float32")),
            },
            self.heads * self.NT * tile.PARTS * tiles,
            tile,
            "BT BS BK BV PARTS",
            K=p.K,
            V=p.V,
            UNIT=unit,
            SCALE=p.scale,
            HAS_NORMS=norms,
            HAS_INNER=inner,
            BTHD=p.layout == "bthd",
            PAIRS=p.dtype == "float32",
            DESCRIPTORS=self.descriptors,
            BF16=p.dtype == "bfloat16",
            PRECISION=self.precision,
        )

    def gates_gradient(self, has_dlast: bool, has_dm_last: bool) -> Launch:
        """di, df and the initial stabiliser's gradient. has_dlast: the last state has a cotangent."""
        p = self.p
        sb, sh, st = self.strides["f"]
        scan = self.config.dstate
        return self._launch(
            gates_backward,
            {
                "f": "f",
                "f_sb": sb,
                "f_sh": sh,
                "f_st": st,
                "gamma": "gamma",
                "rows": "row_sums",
                "cols": "col_sums",
                "inner": "inner",
                "outer": "outer",
                "dm_last": "dm_last" if has_dm_last else None,
                "picked": "picked",
                "T": p.T,
            },
            {
                "di": ("di", self._token_spec(None, p.i_dtype)),
                "df": ("df", self._token_spec(None, p.f_dtype)),
                "dm_initial": ("dm_initial", Spec((p.B, p.H), "float32")),
            },
            self.heads * self.NT,
            Tile(0, 0, 0, 0, 1, num_warps=max(1, min(4, self.L // 32)), num_stages=1),
            NKT=cdiv(p.K, self.config.backward.BK),
            NW=cdiv(p.K, self.config.backward.BK),
            NP=cdiv(p.K, scan.BK) * cdiv(p.V, scan.BV),
            HAS_DLAST=has_dlast,
            HAS_DM_LAST=has_dm_last,
            BTHD=p.layout == "bthd",
        )

    def _token_spec(self, dim: int | None, dtype: str) -> Spec:
        p = self.p
        tokens = (p.B, p.T, p.H) if p.layout == "bthd" else (p.B, p.H, p.T)
        return Spec(tokens if dim is None else (*tokens, dim), dtype)
