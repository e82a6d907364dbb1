"""Kernels compiled for a GPU, through Triton's dispatch and launcher: a later run asks the driver for the same."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tools import stub_driver

WORKER = """
import dataclasses, json, pathlib, sys
from tools import stub_driver
stub = stub_driver.activate(pathlib.Path(sys.argv[1]))
import torch
from frontend_torch import executor
from kernels_triton import plan
from kernels_triton.launch import Descriptor
from tests.test_executor import inputs
from tests.test_plan import problem

sizes, descriptors = json.loads(sys.argv[2])
p = dataclasses.replace(problem(*sizes, dtype="bfloat16"), descriptors=descriptors)
tensors = inputs(p)
forward, backward = plan.forward_pass(p), plan.backward_pass(p)
assert any(isinstance(x, Descriptor) for y in backward.launches for x in y.arguments) == descriptors
ends = []
for _ in range(3):
    env = tensors | executor.launch_all(forward, tensors)
    executor.launch_all(backward, env, earlier=forward)
    ends.append(stub.stub_count())
own = {x.data_ptr() for x in tensors.values()}
launches = stub_driver.launches(stub)
for x in launches:  # where a run's own buffers lie differs from run to run
    x.update({n: x[n] if x[n] in own else "own" for n in stub_driver.FIELDS[-3:]})
kept = len(forward.kept) + len(backward.kept)
each = len(forward.launches + backward.launches)

from triton import knobs
before, after = [], []
def enter(metadata): before.append(metadata.get()["name"])
def leave(metadata): after.append(metadata.get()["name"])
knobs.runtime.launch_enter_hook.add(enter)
knobs.runtime.launch_exit_hook.add(leave)
executor.launch_all(forward, tensors)
knobs.runtime.launch_enter_hook.remove(enter)
knobs.runtime.launch_exit_hook.remove(leave)
executor.launch_all(forward, tensors)
names = [x.kernel.fn.__name__ for x in forward.launches]
hooked = before == names and after == names and stub.stub_count() == ends[-1] + 2 * len(names)
again = [x["function"] for x in stub_driver.launches(stub)[ends[-1]:]]
hooked = hooked and again == [x["function"] for x in launches[:len(names)]] * 2
print(json.dumps([ends, launches, kept, each, hooked]))
"""


@pytest.mark.parametrize("sizes, descriptors", [((1, 4, 512, 64, 64), False), ((1, 8, 600, 128, 256), True)])
def test_a_later_run_asks_the_driver_for_the_same(tmp_path, sizes, descriptors):
    library = stub_driver.build(tmp_path)
    command = [sys.executable, "-c", WORKER, str(library), json.dumps([sizes, descriptors])]
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert run.returncode == 0, run.stderr
    ends, launches, kept, each, hooked = json.loads(run.stdout.splitlines()[-1])
    assert kept == 2 and ends == [each, 2 * each, 3 * each]
    first = launches[:each]
    assert launches[each : 2 * each] == first and launches[2 * each :] == first
    assert len({x["function"] for x in first}) == each
    assert any(x["first"] != "own" for x in first)
    assert any(x["maps"] for x in first) == descriptors
    assert hooked  # who hooks launches, as profilers do, sees each once; else nobody is asked


WAYS = """
import json, pathlib, sys
from tools import stub_driver
stub = stub_driver.activate(pathlib.Path(sys.argv[1]))
import torch
import frontend_torch
from frontend_torch import calls
from kernels_triton import problem
calls.backend_for = lambda backend, x: "triton"
calls.architecture_of = lambda device: "sm_90"
calls.platform_of = lambda tensor: "cuda"
B, H, T, K, V = 1, 2, 128, 64, 64
elements = B * H * T * (K + V)
problem.MIN_DESCRIPTORS, problem.MIN_DESCRIPTORS_ALONE = elements + 1, elements + int(sys.argv[2])
draw = lambda *dims, dtype=torch.bfloat16: torch.randn(dims, dtype=dtype)
tensors = [draw(B, H, T, D) for D in (K, K, V)] + [draw(B, H, T, dtype=torch.float32) for _ in range(2)]
found = []
for gradients in (False, True):
    leaves = [x.clone().requires_grad_(gradients) for x in tensors]
    before = stub.stub_count()
    for _ in range(2):
        h = frontend_torch.mlstm_chunkwise(*leaves)
        if gradients:
            torch.autograd.grad(h, leaves, torch.ones_like(h))
    found.append([bool(x["maps"]) for x in stub_driver.launches(stub)[before:]])
print(json.dumps([[any(found[n][: len(found[n]) // 2]), any(found[n][len(found[n]) // 2 :])] for n in (0, 1)]))
"""


@pytest.mark.parametrize("more, expected", [(0, [[True, True], [False, False]]), (1, [[False, False], [False, False]])])
def test_a_forward_pass_alone_goes_through_descriptors_from_fewer_elements_on(tmp_path, more, expected):
    """The first run and a later one, without gradients and with them."""
    library = stub_driver.build(tmp_path)
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", WAYS, str(library), str(more)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == expected


KEYS = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
from kernels_triton import kernels
order = {"first": sorted, "last": reversed}[sys.argv[1]]
print(sorted({name: getattr(kernels, name).cache_key for name in order(kernels.__all__)}.items()))
"""


def test_a_kernel_has_one_key_in_the_cache_on_disk():
    """Whichever kernels a process launched before it, so that none compiles what another one has compiled."""
    root = pathlib.Path(__file__).parents[1]
    commands = ([sys.executable, "-c", KEYS, order] for order in ("first", "last"))
    found = [subprocess.run(x, capture_output=True, text=True, cwd=root, check=True).stdout for x in commands]
    assert "state_scan" in found[0]
    assert found[0] == found[1]


def test_host_time():
    """The tool that measures it, for few calls: launches are those of the plans."""
    command = [sys.executable, "-m", "tools.host_time", "--calls", "2"]
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = [line.split("│")[1:4] for line in run.stdout.splitlines() if line.startswith("│")]
    assert [int(launches) for _, launches, _ in rows] == [3, 3, 7, 1]
    assert all(float(time) > 0 for *_, time in rows)


def test_host_time_says_what_shape_it_expects():
    command = [sys.executable, "-m", "tools.host_time", "--shape", "1,2"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], timeout=60)
    assert run.returncode == 2 and "expected five numbers B,H,T,K,V from 1" in run.stderr


PROBE = """
import pathlib, sys
from tools import stub_driver
stub_driver.activate(pathlib.Path(sys.argv[1]))
from triton import knobs
cache = pathlib.Path(knobs.cache.dir)
from tools import bench_probe, tune_measure
from tools.bench_cases import IMPLEMENTATIONS, Shape
from tools.host_time import _calls
tune_measure.this_architecture = lambda: "sm_90"
shape = Shape("small", 1, 2, 128, 64, 64)
bench_probe.compile_ours(next(x for x in IMPLEMENTATIONS if x.name == sys.argv[2]), shape, "bfloat16")
before = set(cache.glob("*/*.cubin"))
calls = _calls(*shape.sizes)
for name in ("forward", "forward and backward"):
    calls[name]()
print(len(before), len(set(cache.glob("*/*.cubin")) - before))
"""


@pytest.mark.parametrize("name", ["ours torch", "ours torch, pointers"])
def test_the_benchmark_compiles_beforehand_what_a_call_launches(name, tmp_path):
    library = stub_driver.build(tmp_path)
    command = [sys.executable, "-c", PROBE, str(library), name]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled, missed = map(int, done.stdout.split())
    assert (compiled, missed) == (7, 0)
