"""`tools.sanitize` without a GPU: what its sweep has, and what it makes of a sanitizer's words and deaths."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_triton import kernels as all_kernels
from tools.sanitize_shapes import SHAPES, kernels, select, uses_descriptors

ROOT = Path(__file__).parents[1]
NAME = "48x97-pointers"
# In place of the sanitizer and, without arguments of its own, of the child process: `python` is the rest.
FAKE = """#!{python}
import json, os, sys, time
how = os.environ["HOW"]
tool, name = sys.argv[sys.argv.index("--tool") + 1], sys.argv[-1]
print("========= COMPUTE-SANITIZER")
if how == "crash":
    print("Segmentation fault", flush=True)
    os.kill(os.getpid(), 11)
if how == "hang":
    time.sleep(600)
error = "expected finite results, got others in dq" if how == "nan" else ""
if how != "silent":
    print("RESULT " + json.dumps({{"shape": name, "kernels": ["gates_forward"], "error": error}}))
n = 3 if how == "errors" else 0
if tool == "memcheck":
    print(f"========= ERROR SUMMARY: {{n}} errors")
else:
    print(f"========= RACECHECK SUMMARY: {{n}} hazards displayed ({{n}} errors, 1 warning)")
sys.exit(99 if n else 0)
"""


def start(tmp_path, how, *arguments, **env):
    script = tmp_path / "compute-sanitizer"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return subprocess.Popen(
        [sys.executable, "-m", "tools.sanitize", "--shapes", NAME, "--jobs", "1", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOW": how, "CUDA_VISIBLE_DEVICES": "", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(tmp_path, how, *arguments, **env):
    process = start(tmp_path, how, *arguments, **env)
    output, _ = process.communicate(timeout=120)
    return process.returncode, " ".join(output.split())


@pytest.mark.parametrize(
    "how, code, text",
    [
        ("good", 0, "0 errors, 0 runs failed"),
        ("errors", 1, "6 errors, 2 runs failed"),
        ("crash", 1, "expected the sanitizer's summary, got none"),
        ("silent", 1, "expected the shape's result, got none"),
        ("nan", 1, "expected finite results, got others in dq"),
    ],
)
def test_what_the_sanitizer_says_decides(tmp_path, how, code, text):
    path = tmp_path / "out" / "results.json"
    got, output = run(tmp_path, how, "--json", str(path))
    assert (got, text in output) == (code, True), output
    results = json.loads(path.read_text())["results"]
    assert [(x["shape"], x["tool"]) for x in results] == [(NAME, "memcheck"), (NAME, "racecheck")]
    assert [x["warnings"] for x in results] == [0, 0 if how == "crash" else 1]


def test_a_process_that_hangs_is_ended(tmp_path):
    code, output = run(tmp_path, "hang", "--tool", "memcheck", "--timeout", "10")
    assert code == 1
    assert "expected an end within 10 s, got none" in output


@pytest.mark.parametrize("after", ["filling", "sanitize:"])
def test_an_interrupt_ends_all(tmp_path, after):
    """At once, whether the cache is filled or the sanitizer runs."""
    process = start(tmp_path, "hang", "--tool", "memcheck")
    said = ""
    while after not in said:
        said += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, "interrupted" in output) == (130, True), output


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--tool", "initcheck"], "expected memcheck, racecheck or both, got initcheck"),
        (["--shapes", "7x7"], "expected a name or pattern of the sweep's (--list), got '7x7'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, text):
    code, output = run(tmp_path, "good", *arguments, COLUMNS="200")
    assert (code, text in output) == (2, True), output


def test_no_sanitizer(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.sanitize"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "expected it on PATH or in CUDA_HOME/bin" in done.stderr


def test_the_sweep_has_every_kernel():
    """By racecheck's part of it too."""
    for shapes in (SHAPES, [x for x in SHAPES if x.race]):
        assert {name for x in shapes for name in kernels(x)} == set(all_kernels.__all__)
    assert len(SHAPES) >= 40
    assert len({x.name for x in SHAPES}) == len(SHAPES)


@pytest.mark.parametrize("kernel", sorted(set(all_kernels.__all__) - {"chunk_table", "gates_sums"}))
def test_every_kernel_has_odd_and_even_head_dims(kernel):
    """Those that read head dims at all."""
    of = [x for x in SHAPES if kernel in kernels(x)]
    assert any(x.K % 2 or x.V % 2 for x in of)
    assert any(x.K % 8 == x.V % 8 == 0 for x in of)


def test_both_ways_to_memory():
    assert [x.name for x in SHAPES if x.descriptors != uses_descriptors(x)] == []
    ways = {
        way: {x.name.removesuffix(f"-{way}") for x in SHAPES if x.name.endswith(way)}
        for way in ("descriptors", "pointers")
    }
    assert len(ways["descriptors"] & ways["pointers"]) >= 10
    for kernel in ("chunk_forward", "chunk_backward", "state_scan", "fused_forward", "fused_backward"):
        assert {x.descriptors for x in SHAPES if kernel in kernels(x)} == {True, False}


def test_patterns_select():
    assert [x.name for x in select(["48x97*", "step-*"])] == ["48x97-pointers", "step-48x97", "step-128x256"]
    with pytest.raises(ValueError, match="got 'nothing'"):
        select(["nothing"])
