"""The mLSTM operator for JAX."""

from .operator import mlstm_chunkwise

__all__ = ["mlstm_chunkwise"]
