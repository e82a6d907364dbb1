"""The Triton kernels. Device code only: no torch, no jax, no host logic."""

from .gates import gates_backward, gates_forward
from .mix_keys import mix_keys
from .mix_values import mix_values
from .normaliser import normaliser_backward
from .state import state_scan

__all__ = ["gates_backward", "gates_forward", "mix_keys", "mix_values", "normaliser_backward", "state_scan"]
