"""Which assembler our kernels are compiled with, which is refused, and that other people's kernels keep theirs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kernels_triton import assembler

ROOT = pathlib.Path(__file__).parents[1]
BANNER = """ptxas: NVIDIA (R) Ptx optimizing assembler
Copyright (c) 2005-2025 NVIDIA Corporation
Built on Tue_May_27_02:18:05_PDT_2025
Cuda compilation tools, release {release}, V{release}.{patch}
Build cuda_{release}.r{release}/compiler.36037853_0"""
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "CUDA_HOME", "CUDA_PATH", assembler.UNSAFE)


def fake(folder, release, patch=1, name="ptxas", otherwise="exit 255"):
    """A script that says it is that version of ptxas. otherwise: what it does instead of assembling."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    banner = BANNER.format(release=release, patch=patch)
    path.write_text(f"#!/bin/sh\nif [ $1 = --version ]; then echo '{banner}'; else {otherwise}; fi\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def nobody_chose(monkeypatch):
    from triton import knobs

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("ptxas", "ptxas_blackwell"):
        monkeypatch.delitem(vars(knobs.nvidia), name, raising=False)
    monkeypatch.setattr(assembler, "driver_release", lambda: None)


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Makes fake assemblers the only ones there are."""

    def set_up(*releases):
        paths = [fake(tmp_path / x, x) for x in releases]
        monkeypatch.setattr(assembler, "candidates", lambda: iter(paths))
        return paths

    return set_up


@pytest.mark.parametrize(
    "banner, version",
    [
        (BANNER.format(release="12.9", patch=86), (12, 9, 86)),
        (BANNER.format(release="13.0", patch=88), (13, 0, 88)),
        ("Cuda compilation tools, release 12.10, V12.10.7-rc1 (internal)", (12, 10, 7)),
        ("Cuda compilation tools, release 12.8", (12, 8, 0)),
        ("ptxas 12.9.86", None),
        ("ptxas: command not understood", None),
        ("", None),
    ],
)
def test_the_version_is_read_from_what_ptxas_prints(banner, version):
    assert assembler.parse_version(banner) == version


def test_a_file_that_is_no_assembler_is_passed_over(tmp_path):
    text, folder = tmp_path / "text", tmp_path / "folder"
    text.write_text("not executable")
    folder.mkdir()
    failing, silent = tmp_path / "failing", tmp_path / "silent"
    failing.write_text("#!/bin/sh\necho release 12.9\nexit 3\n")
    silent.write_text("#!/bin/sh\n")
    for path in (failing, silent):
        path.chmod(0o755)
    assert [assembler.read(x) for x in (tmp_path / "missing", text, folder, failing, silent)] == [None] * 5


def test_a_file_is_asked_again_once_it_has_changed(tmp_path):
    path = fake(tmp_path, "12.8")
    assert assembler.read(path).version == (12, 8, 1)
    fake(tmp_path, "13.0", patch=1234)
    assert assembler.read(path).version == (13, 0, 1234)


def test_the_newest_is_taken_and_the_first_of_several_as_new(tmp_path):
    releases = ("12.8", "12.10", "12.9", "12.10")
    paths = [fake(tmp_path / str(n), x) for n, x in enumerate(releases)]
    found = assembler.newest([tmp_path / "missing", *paths])
    assert (found.path, found.version, found.release) == (str(paths[1]), (12, 10, 1), "12.10")
    assert assembler.newest([]) is None


def test_one_whose_code_the_driver_loads_comes_before_a_newer_one(tmp_path):
    paths = [fake(tmp_path / x, x) for x in ("12.8", "12.9", "13.1")]
    assert assembler.newest(paths, driver=12).release == "12.9"
    assert assembler.newest(paths, driver=13).release == assembler.newest(paths, driver=None).release == "13.1"
    assert assembler.newest(paths[2:], driver=12).release == "13.1"


def test_it_is_looked_for_in_wheels_and_toolkits(monkeypatch, tmp_path):
    import triton

    wheels = [fake(tmp_path / "nvidia" / x / "bin", "12.9") for x in ("cu13", "cuda_nvcc")]
    home, path, on_path = (fake(tmp_path / x / "bin", "12.9") for x in ("home", "path", "tool"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {name: x for name, x in sys.modules.items() if name != "nvidia"})
    monkeypatch.setenv("CUDA_HOME", str(home.parents[1]))
    monkeypatch.setenv("CUDA_PATH", str(path.parents[1]))
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=":")
    found = list(assembler.candidates())
    shipped = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assert found[:2] == [shipped / "ptxas", shipped / "ptxas-blackwell"]
    places = [found.index(x) for x in (*wheels, home, path, on_path)]
    assert places == sorted(places) and found[-2] == pathlib.Path("/usr/local/cuda/bin/ptxas")


def test_what_triton_ships_is_new_enough_for_hopper():
    """Whatever else is installed: a wheel of Triton alone serves."""
    shipped = [x for x in assembler.candidates() if "triton" in x.parts]
    assert assembler.newest(shipped).version >= assembler.OLDEST


@pytest.mark.parametrize("by", ["environment", "knob"])
def test_the_users_choice_wins_over_a_newer_one(by, monkeypatch, only, tmp_path):
    from triton import knobs

    only("13.0")
    users = fake(tmp_path / "users", "12.9")
    if by == "environment":
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(users))
    else:
        monkeypatch.setitem(vars(knobs.nvidia), "ptxas", str(users))
    assert assembler.choose(90).path == assembler.choose(80).path == str(users)
    assert assembler.choose(100).release == "13.0"


def test_blackwell_has_a_variable_of_its_own(monkeypatch, only, tmp_path):
    only("13.0")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", str(fake(tmp_path / "users", "12.9")))
    assert assembler.choose(100).release == "12.9"
    assert assembler.choose(90).release == "12.9"  # Triton 3.9 reads it on Hopper too
    assert assembler.choose(80).release == "13.0"


def test_a_bare_name_is_looked_for_on_path(monkeypatch, only, tmp_path):
    only("13.0")
    users = fake(tmp_path / "users", "12.9", name="my-ptxas")
    monkeypatch.setenv("PATH", str(users.parent), prepend=":")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "my-ptxas")
    assert assembler.choose(90).path == str(users)


def test_a_users_choice_that_does_not_run_is_an_error(monkeypatch, only):
    only("13.0")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/nowhere/ptxas")
    with pytest.raises(RuntimeError, match="TRITON_PTXAS_PATH: expected the path of a ptxas .*, got /nowhere/ptxas; "):
        assembler.choose(90)


def test_none_at_all_is_an_error(only):
    only()
    with pytest.raises(RuntimeError, match="ptxas: expected one in Triton's wheel, in nvidia-cuda-nvcc or on PATH"):
        assembler.choose(90)


def test_an_old_one_is_refused_on_hopper_alone(only, monkeypatch):
    (path,) = only("12.8")
    refusal = (
        rf"ptxas: expected version 12\.9 or newer on Hopper \(sm_90\), got 12\.8\.1 at {path}, which miscompiles .*; "
        r"pip install nvidia-cuda-nvcc, or set TRITON_PTXAS_PATH to a newer ptxas \(docs/versions\.md\)"
    )
    with pytest.raises(RuntimeError, match=refusal):
        assembler.choose(90)
    assert assembler.choose(80).release == assembler.choose(100).release == "12.8"
    monkeypatch.setattr(assembler, "driver_release", lambda: 12)
    with pytest.raises(RuntimeError, match="pip install 'nvidia-cuda-nvcc-cu12>=12.9', or"):
        assembler.choose(90)


def test_an_old_choice_of_the_user_is_refused_too(monkeypatch, only, tmp_path):
    only("13.0")
    users = fake(tmp_path / "users", "12.8")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(users))
    with pytest.raises(RuntimeError, match=f"got 12.8.1 at {users}, .*; unset TRITON_PTXAS_PATH, or set it to a newer"):
        assembler.choose(90)


def test_for_testing_the_choice_is_tritons_and_nothing_is_refused(monkeypatch, only):
    only("13.0")
    monkeypatch.setenv(assembler.UNSAFE, "1")
    from triton.backends.nvidia.compiler import get_ptxas

    assert assembler.choose(90).path == get_ptxas(90).path
    monkeypatch.setenv(assembler.UNSAFE, "0")
    assert assembler.choose(90).release == "13.0"


def test_ptx_is_of_the_version_that_triton_chooses_where_the_assembler_knows_it(tmp_path):
    newer, older = (assembler.read(fake(tmp_path / x, x)) for x in ("13.4", "12.4"))
    assert assembler.ptx_version(newer, 90) == assembler.tritons_ptx_version(90)
    assert assembler.ptx_version(older, 90) == 84


def test_an_unknown_triton_is_an_error():
    """One whose functions look the assembler up in another way would go on with its own."""
    with pytest.raises(RuntimeError, match="triton: expected a version from 3.6 to 3.9, whose .* looks up get_ptxas"):
        assembler._looking_up(fake, get_ptxas=None)


def test_jaxlib_takes_the_first_on_path_however_old(monkeypatch, tmp_path):
    folder = tmp_path / "site-packages" / "jax_cuda13_plugin"
    folder.mkdir(parents=True)
    wheel = fake(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin", "13.0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assembler, "TOOLKITS", ())
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert pathlib.Path(assembler.found_by_xla(folder).path).samefile(wheel)
    monkeypatch.setenv("CUDA_HOME", str(fake(tmp_path / "home" / "bin", "12.6").parents[1]))
    assert assembler.found_by_xla(folder).release == "12.6"
    fake(tmp_path / "tools", "12.8")
    found = assembler.found_by_xla(folder)
    assert found.path == str(tmp_path / "tools" / "ptxas")
    with pytest.raises(RuntimeError, match="got 12.8.1 at .*; put the folder of a newer ptxas first on PATH, or"):
        assembler.check(found, 90, assembler.XLA_REMEDY)
    assembler.check(found, 80, assembler.XLA_REMEDY)
    fake(tmp_path / "tools", "11.2")  # XLA passes over it
    assert assembler.found_by_xla(folder).release == "12.6"


def test_jax_refuses_it_before_it_traces_a_launch(monkeypatch, tmp_path):
    from frontend_jax import executor
    from kernels_triton import plan
    from tests.test_plan import problem

    fake(tmp_path, "12.8")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = plan.forward_pass(problem(1, 2, 40, 16, 16))
    for capability, expected in ((90, "got 12.8.1 at"), (80, "not refused")):
        monkeypatch.setattr(executor, "_capabilities", lambda capability=capability: {capability})
        monkeypatch.setattr(executor, "_triton_call", lambda: (not_refused, "out_shape", {}))
        with pytest.raises(RuntimeError, match=expected):
            executor.launch_all(program, dict.fromkeys(program.inputs))


def not_refused(*_, **__):
    raise RuntimeError("not refused")


def test_jaxlibs_assembler_gets_ptx_that_it_knows(monkeypatch, tmp_path):
    from frontend_jax import executor

    for release, options in (("12.4", {"ptx_version": 84}), ("13.4", {})):
        monkeypatch.setenv("PATH", str(fake(tmp_path / release, release).parent))
        assert executor.assembler_options(80) == options


# Real compilations for Hopper against the stub driver, in a process of their own: a forward pass of ours, and while each
# of its kernels is assembled and after it another thread's kernel.
WORKER = """
import json, os, pathlib, re, subprocess, sys, threading
from tools import stub_driver
stub = stub_driver.activate(pathlib.Path(sys.argv[1]))
import torch, triton, triton.language as tl
from triton.backends.nvidia import compiler as nvidia
from frontend_torch import executor
from kernels_triton import assembler, plan
from tests.test_executor import inputs
from tests.test_plan import problem

@triton.jit
def theirs(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE)) + 1)

def settings():
    return [str(nvidia.get_ptxas(90)), nvidia.get_ptxas_version(90), os.environ.get("TRITON_PTXAS_PATH")]

def another():
    other = threading.Thread(target=lambda: theirs.warmup(torch.empty(4096), SIZE=16 << len(used), grid=(1,)))
    other.start()
    other.join()

class Watched:
    def __getattr__(self, name):
        return getattr(subprocess, name)

    def run(self, command, **options):
        source = next(pathlib.Path(x).read_text() for x in command if x.endswith(".ptx"))
        used.append((re.search("[.]entry (\\w+)", source)[1], command[0], settings()))
        if used[-1][0] != "theirs":
            another()
        return subprocess.run(command, **options)

used, error = [], ""
nvidia.subprocess = Watched()
before = settings()
p = problem(1, 2, 64, 32, 32, dtype="bfloat16")
try:
    executor.launch_all(plan.forward_pass(p, False), inputs(p))
except Exception as e:
    error = f"{type(e).__name__}: {e}"
another()
print(json.dumps([before, settings(), used, error, stub.stub_count()]))
"""


def compiled(tmp_path, **environment):
    """(what our kernels were assembled with, the error, the number of launches, their keys in the cache on disk).

    Asserts that the other kernels kept the assembler that they had before.
    """
    from tools import stub_driver

    cache = tmp_path / "cache" / str(len(environment))
    env = {name: x for name, x in os.environ.items() if name not in VARIABLES}
    env |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    } | environment
    script = tmp_path / "worker.py"  # Triton reads a kernel's source
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(stub_driver.build(tmp_path))]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    before, after, used, error, launches = json.loads(run.stdout.splitlines()[-1])
    assert all(settings == before for *_, settings in used) and after == before
    own = before[0].split("'")[1]
    theirs = [path for name, path, _ in used if name == "theirs"]
    assert theirs and set(theirs) == {own}
    keys = {path.parent.name for path in cache.glob("*/*.cubin") if path.stem != "theirs"}
    return {path for name, path, _ in used if name != "theirs"}, error, launches, keys


def test_other_kernels_keep_their_assembler_and_the_cache_tells_ours_apart(tmp_path):
    shipped = [x for x in assembler.candidates() if "triton" in x.parts]
    real = assembler.newest(shipped).path
    newest = fake(tmp_path / "new" / "bin", "13.99", otherwise=f'exec {real} "$@"')
    first = compiled(tmp_path, CUDA_HOME=str(newest.parents[1]))
    assert first[:2] == ({str(newest)}, "") and first[2] == len(first[3]) > 1
    second = compiled(tmp_path, CUDA_HOME="", TRITON_PTXAS_PATH=real)
    assert second[:2] == ({real}, "") and second[2] == first[2] == len(second[3])
    assert not first[3] & second[3]


def test_other_kernels_keep_their_assembler_when_ours_fails(tmp_path):
    newest = fake(tmp_path / "new" / "bin", "13.99")
    used, error, launches, keys = compiled(tmp_path, CUDA_HOME=str(newest.parents[1]))
    assert used == {str(newest)} and error.startswith("PTXASError") and not launches and not keys


def test_nothing_is_launched_that_an_old_assembler_made(tmp_path):
    real = assembler.newest(x for x in assembler.candidates() if "triton" in x.parts).path
    old = fake(tmp_path / "old", "12.8", otherwise=f'exec {real} "$@"')
    chosen = dict.fromkeys(("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"), str(old))  # 3.9 reads the second
    used, error, launches, keys = compiled(tmp_path, **chosen)
    assert not used and not launches and not keys and f"got 12.8.1 at {old}, which miscompiles" in error
    used, error, launches, keys = compiled(tmp_path, **chosen, MLSTM_UNSAFE_OLD_PTXAS="1")
    assert used == {str(old)} and launches == len(keys) > 1 and not error
