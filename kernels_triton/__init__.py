"""The mLSTM operator's kernels, host plan, checks and readable reference. Imports neither torch nor jax."""

__version__ = "0.1.0"
