"""A sequence split over devices: four processes of PyTorch, eight devices of JAX."""

import subprocess
import sys
from pathlib import Path

import torch.multiprocessing

from tests.interpret import context_worker


def test_four_processes(tmp_path):
    """All in one go: the processes take longer to start than to run."""
    torch.multiprocessing.spawn(context_worker.work, (str(tmp_path / "store"),), context_worker.WORLD)


def test_eight_devices():
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpret.jax_context_worker"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ran = [line.removesuffix(" ok") for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert ran == ["reference", "communication", "kernels", "partitioned"]
