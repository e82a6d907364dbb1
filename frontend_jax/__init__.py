"""The mLSTM operator for JAX."""

from kernels_triton.packing import ChunkTable

from .context import mlstm_context_parallel
from .operator import mlstm_chunkwise
from .packing import cu_seqlens_from_document_ids, make_chunk_table
from .recurrent import mlstm_recurrent, mlstm_step

__all__ = [
    "ChunkTable",
    "cu_seqlens_from_document_ids",
    "make_chunk_table",
    "mlstm_chunkwise",
    "mlstm_context_parallel",
    "mlstm_recurrent",
    "mlstm_step",
]
