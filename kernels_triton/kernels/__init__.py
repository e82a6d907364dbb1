"""The Triton kernels. Device code only: no torch, no jax, no host logic."""

from .chunk_backward import chunk_backward
from .chunk_forward import chunk_forward
from .fused import fused_forward
from .fused_backward import fused_backward
from .gates import gates_forward
from .gates_backward import gates_backward
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
    "gates_forward",
    "gates_sums",
    "normaliser_backward",
    "recurrent",
    "state_scan",
]
