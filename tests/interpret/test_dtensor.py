"""DTensor and FSDP2 on four processes: over batch and heads the operator runs on its shards, without communication."""

import torch.multiprocessing

from tests.interpret import dtensor_worker


def test_four_processes(tmp_path):
    """All in one go: the processes take longer to start than to run."""
    torch.multiprocessing.spawn(dtensor_worker.work, (str(tmp_path / "store"),), dtensor_worker.WORLD)
