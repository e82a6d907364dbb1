"""jit with sharded arrays, on eight devices of a CPU, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from frontend_jax import sharding
from kernels_triton.config import configure
from tests.test_plan import problem


@pytest.mark.parametrize(
    "worker, checks",
    [
        ("jax_sharding_worker", ["reference", "interpreted", "partitioned", "mapped", "packed"]),
        ("jax_explicit_worker", ["readme", "reference", "interpreted", "compiled"]),
    ],
)
def test_eight_devices(worker, checks):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.interpret.{worker}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [f"{check} ok" for check in checks]


def test_a_device_computes_in_the_chunks_of_the_whole(monkeypatch):
    """What a pass saves is shaped by them, and the partitioner cuts it along batch and heads alone."""
    whole = problem(B=8, H=4, layout="bthd")
    local = sharding.local_problem(whole, (2, whole.T, 2, whole.K))
    assert (local.B, local.H, local.chunk_size) == (2, 2, whole.chunk_size)
    assert local.stride("q") == (local.T * 2 * local.K, local.K, 2 * local.K)
    few = configure(local)
    monkeypatch.setattr(
        sharding, "configure", lambda p: configure(p) if p.B * p.H > 8 else type(few)(**{**vars(few), "L": few.L // 2})
    )
    assert sharding.local_problem(whole, (2, whole.T, 2, whole.K)).chunk_size == configure(whole).L
