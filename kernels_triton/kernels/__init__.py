"""The Triton kernels. Device code only: no torch, no jax, no host logic."""

import sys

from triton import JITFunction

from .chunk_backward import chunk_backward
from .chunk_forward import chunk_forward
from .fused import fused_forward
from .fused_backward import fused_backward
from .gates import gates_forward
from .gates_backward import gates_backward
from .gates_backward_sums import gates_backward_sums
from .gates_sums import gates_sums
from .normaliser import normaliser_backward
from .packing import chunk_table
from .recurrent import recurrent
from .state import state_scan

__all__ = [
    "chunk_backward",
    "chunk_forward",
    "chunk_table",
    "fused_backward",
    "fused_forward",
    "gates_backward",
    "gates_backward_sums",
    "gates_forward",
    "gates_sums",
    "normaliser_backward",
    "recurrent",
    "state_scan",
]


def _settle_keys() -> None:
    """Have the keys of all kernels in Triton's cache on disk found now, in one order.

    Before Triton 3.9 a key depends on which of the functions that a kernel calls had theirs before: processes that
    launch kernels in another order would compile anew what the cache holds. Takes 40 ms.
    """
    modules = (x for name, x in sorted(sys.modules.items()) if name.startswith(__name__ + "."))
    for function in (x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)):
        _ = function.cache_key


_settle_keys()
