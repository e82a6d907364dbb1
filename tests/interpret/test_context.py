import torch.multiprocessing

from tests.interpret import context_worker


def test_four_processes(tmp_path):
    """All in one go: the processes take longer to start than to run."""
    torch.multiprocessing.spawn(context_worker.work, (str(tmp_path / "store"),), context_worker.WORLD)
