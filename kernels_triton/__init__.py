"""The mLSTM operator's kernels, their host plan, its checks and its readable reference. Imports neither torch nor jax."""

__version__ = "0.1.0"
