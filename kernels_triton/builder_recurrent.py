"""The launch of the recurrence token by token."""

from __future__ import annotations

from .config import Tile, cdiv, next_power_of_2
from .kernels import recurrent
from .launch import Launch
from .launch_builder import LaunchBuilder

# Elements of a state that one program holds, and the fewest values: rows of 64 bytes or more keep memory busy.
STATE_ELEMENTS = 8192
MIN_VALUES = 16


class RecurrentBuilder(LaunchBuilder):
    """One launch for a whole short sequence."""

    def recurrent(self) -> Launch:
        """h and the last state."""
        p = self.p
        BK = max(16, next_power_of_2(p.K))
        BV = min(max(MIN_VALUES, STATE_ELEMENTS // BK), max(16, next_power_of_2(p.V)))
        strided = ("q", "k", "v", "i", "f")
        initial = {"c_initial": True, "n_initial": p.normalize, "m_initial": True}
        return self._launch(
            recurrent,
            {
                **{x: y for name in strided for x, y in self._strided(name).items()},
                **{name: name if p.has_initial and there else None for name, there in initial.items()},
                "T": p.T,
            },
            {name: (name, self.handed_on[name]) for name in ("h", "c_last", "n_last", "m_last")},
            self.heads * cdiv(p.V, BV),
            Tile(0, 0, BK, BV, num_warps=4, num_stages=1),
            "BK BV",
            chunked=False,
            in_place=(("c_initial", "c_last"),) if p.donate else (),
            K=p.K,
            V=p.V,
            SCALE=p.scale,
            EPS=p.eps,
            HAS_INITIAL=p.has_initial,
            SIGMOID=self.sigmoid,
            NORMALIZE=p.normalize,
            BTHD=p.layout == "bthd",
        )
