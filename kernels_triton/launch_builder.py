"""What the launches of one problem have in common: strides, descriptors, specs and constexprs."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from .config import Config, Tile, cdiv, configure
from .launch import Descriptor, Launch, Operand, Spec
from .packing import packed_chunks, table_size
from .problem import Problem, Strides, contiguous_strides

# Buffers that the gates' kernel makes and most others read.
GATES = ("c", "c_low", "a", "a_low", "gamma", "gamma_low")
# And those that the normaliser's kernel makes, backward; the scan's weights only for gradients of pairs.
NORMALISER = ("e", "delta")
STATE_WEIGHT = "state_weight"


class LaunchBuilder:
    """The facts of one problem that its launches share."""

    def __init__(self, problem: Problem, config: Config | None = None):
        self.p = problem
        self.config = config or configure(problem)
        self.heads = problem.B * problem.H
        self.all_heads = math.prod(problem.state_heads)  # of packed sequences each sequence's
        self.L = self.config.L
        self.packed = problem.sequences > 0
        self.NT = packed_chunks(problem.T, problem.sequences, self.L) if self.packed else cdiv(problem.T, self.L)
        self.G = max(1, min(32, self.config.gates // self.L))  # chunks that the gates' kernels take at a time
        self.rows = (problem.B, problem.H, self.NT * self.L)
        self.strides: dict[str, Strides] = dict(problem.strides)
        self.strides["h"] = contiguous_strides(problem.H, problem.T, problem.V, problem.layout)
        self.state_dtype = "bfloat16" if problem.dtype == "bfloat16" else "float32"
        # The backward pass of the recurrent form makes the chunkwise h for itself alone: no need to round it.
        self.h_dtype = "float32" if problem.form == "recurrent" else problem.dtype
        # float16 has tf32's mantissa, so its weighted products lose nothing in tf32.
        self.precision = "tf32" if problem.dtype == "float16" else problem.precision

    @property
    def sigmoid(self) -> bool:
        return self.p.input_gate == "sigmoid"

    def _r(self) -> tuple[str, Spec]:
        """The signed normaliser's buffer; without one a stand-in."""
        return ("r", self.handed_on["r"]) if self.p.normalize else ("unused_r", Spec((1,), "float32"))

    @property
    def pairs(self) -> bool:
        """Whether the gradients need decays of twice float32's digits; the outputs always do."""
        return self.p.dtype == "float32"

    def _gates_backward(self, *names: str) -> dict[str, str | None]:
        """The operands `names` that the gates' kernel made, the low parts of pairs only where they are needed."""
        return {name: name if self.pairs or not name.endswith("_low") else None for name in names}

    @property
    def decays(self) -> dict[str, str | None]:
        """The operands that the gradients' decays come from, before what the normaliser's kernel made of a."""
        return self._gates_backward(*GATES) | {"a": "a" if self.pairs else None}

    @property
    def value_parts(self) -> int:
        """How many programs of the fused forward kernel share a head; 1 without one."""
        return cdiv(self.p.V, self.config.fused.BV) if self.config.fused else 1

    @property
    def packing(self) -> dict[str, Operand | None]:
        """The operands that say where chunks are, T last."""
        return {"chunks": "chunks" if self.packed else None, "sequences": self.p.sequences, "T": self.p.T}

    @functools.cached_property
    def handed_on(self) -> Mapping[str, Spec]:
        """Every buffer that a forward pass may hand on: results, and what the backward pass reads."""
        p, head = self.p, (self.p.B, self.p.H)
        return {
            "h": self._token_spec(p.V, p.dtype),
            "c_last": Spec((*p.state_heads, p.K, p.V), p.c_dtype),
            "n_last": Spec((*p.state_heads, p.K), "float32"),
            "m_last": Spec(p.state_heads, "float32"),
            "chunks": Spec((table_size(p.T, p.sequences, self.L),), "int32"),
            **dict.fromkeys((*GATES[:4], "floor", "r"), Spec(self.rows, "float32")),
            **dict.fromkeys(GATES[4:], Spec((*head, self.NT), "float32")),
            "picked": Spec(p.state_heads, "int32"),
            "states": self.states_spec,
            "norms": self.norms_spec,
        }

    @property
    def states_spec(self) -> Spec:
        """C at each chunk's start, or the cotangents of the state after each chunk."""
        return Spec((self.p.B, self.p.H, self.NT, self.p.K, self.p.V), self.state_dtype)

    @property
    def norms_spec(self) -> Spec:
        """n alike."""
        return Spec((self.p.B, self.p.H, self.NT, self.p.K), "float32")

    def source(self, tile: Tile) -> int:
        """How a kernel reads tokens and states: 0 by pointers, 1 through descriptors (kernels/common.py).

        Packed sequences by pointers: a descriptor reads a whole tile, beyond a sequence's end its neighbour's tokens.
        Those weigh 0, but 0 times an infinity or a NaN is NaN.
        """
        return int(self.p.descriptors and tile.descriptors and not self.packed)

    @property
    def arithmetic(self) -> dict[str, Any]:
        """The constexprs of kernels that multiply tiles."""
        return {
            "BF16": self.p.dtype == "bfloat16",
            "PRECISION": self.precision,
        }

    def _steps(self, buffer: str) -> Strides:
        """The (batch, head, token) strides of a buffer, 0 along an axis of size 1, whose stride may be anything.

        The unit that strides have in common decides how a tile is loaded, and so in which order some sums add.
        """
        sb, sh, st = self.strides[buffer]
        return (sb if self.p.B > 1 else 0, sh if self.p.H > 1 else 0, st if self.p.T > 1 else 0)

    def _tokens(self, tile: Tile, *tensors: tuple[str, str]) -> tuple[dict[str, Operand], int]:
        """Parameters `x, x_sb, x_sh, x_st` of (parameter, buffer) pairs; strides in units that keep loads aligned."""
        p = self.p
        unit = math.gcd(16, *(s for _, buffer in tensors for s in self._steps(buffer)))
        parameters: dict[str, Operand] = {}
        for name, buffer in tensors:
            D, block = (p.K, tile.BK) if buffer in ("q", "k") else (p.V, tile.BV)
            strides = self._steps(buffer)
            parameters[name] = buffer
            if self.source(tile):
                # A stride of an axis of size 1 may be anything but must be aligned.
                steps = tuple(s or D for s in strides)
                parameters[name] = Descriptor(
                    buffer, (p.B, p.H, p.T, D), (*steps, 1), (1, 1, min(tile.BT, self.L), block)
                )
            for axis, stride in zip("bht", strides, strict=True):
                parameters[f"{name}_s{axis}"] = stride // unit
        return parameters, unit

    def _states(self, tile: Tile, buffer: str) -> Operand:
        p = self.p
        if not self.source(tile):
            return buffer
        shape = (self.heads * self.NT, p.K, p.V)
        return Descriptor(buffer, shape, (p.K * p.V, p.V, 1), (1, tile.BK, tile.BV))

    def _strided(self, parameter: str, buffer: str | None = "") -> dict[str, Operand | None]:
        """`x, x_sb, x_sh, x_st` of a tensor read element by element. buffer: if of another name, None if absent."""
        buffer = parameter if buffer == "" else buffer
        sb, sh, st = self._steps(buffer) if buffer else (0, 0, 0)
        return {parameter: buffer, f"{parameter}_sb": sb, f"{parameter}_sh": sh, f"{parameter}_st": st}

    def _launch(
        self,
        kernel: Any,
        operands: Mapping[str, Operand | None],
        outputs: dict[str, tuple[str, Spec]],
        programs: int,
        tile: Tile,
        blocks: str = "",
        chunked: bool = True,
        in_place: tuple[tuple[str, str], ...] = (),
        **constexprs: Any,
    ) -> Launch:
        # An absent operand is filled with a present one: a kernel behind its flag never reads it.
        present = next(x for x in operands.values() if isinstance(x, str))
        return Launch(
            kernel=kernel,
            operands={name: present if x is None else x for name, x in operands.items()},
            outputs=outputs,
            grid=programs,
            constexprs={
                "H": self.p.H,
                **({"L": self.L} if chunked else {}),
                **{b: getattr(tile, b) for b in blocks.split()},
                **constexprs,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            in_place=in_place,
        )

    def _token_spec(self, dim: int | None, dtype: str) -> Spec:
        p = self.p
        tokens = (p.B, p.T, p.H) if p.layout == "bthd" else (p.B, p.H, p.T)
        return Spec(tokens if dim is None else (*tokens, dim), dtype)
