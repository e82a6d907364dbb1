"""The mLSTM operator for PyTorch."""

from .operator import mlstm_chunkwise

__all__ = ["mlstm_chunkwise"]
