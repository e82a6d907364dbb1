"""The Triton kernels. Device code only: no torch, no jax, no host logic."""

from .gates import gates_backward, gates_forward
from .mix_keys import mix_keys
from .mix_values import mix_values
from .normaliser import normaliser_backward
from .state import state_scan

KERNELS = (gates_forward, state_scan, mix_values, normaliser_backward, mix_keys, gates_backward)
