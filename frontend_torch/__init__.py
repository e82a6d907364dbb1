"""The mLSTM operator for PyTorch."""

from .operator import mlstm_chunkwise
from .recurrent import mlstm_recurrent, mlstm_step

__all__ = ["mlstm_chunkwise", "mlstm_recurrent", "mlstm_step"]
