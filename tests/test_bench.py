"""The benchmark tool: floors, tables of cases, results as JSON, comparison, pictures, and a run on a CPU."""

import dataclasses
import gc
import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest
import torch
from rich.console import Console

from tools import bench, bench_cases, bench_floors, bench_measure, bench_plot, bench_probe, bench_report
from tools.bench_cases import IMPLEMENTATIONS, PASSES, SCALING, SHAPES, SWEEP
from tools.bench_measure import derive
from tools.bench_report import Report, Row

ROOT = Path(__file__).parents[1]
COPY, MATMUL = 3.0, 724.0  # of the machine that the figures below come from
BY_NAME = {shape.name: shape for shape in SHAPES}
SPEED = {"fw": 2.0, "fw+bw": 2.6, "bw": 2.8}  # times the floor


def floor(shape, pass_):
    return bench_floors.floor(shape, 2, pass_, COPY, MATMUL)


def row_of(shape, pass_, x, slower=1.0):
    bounds = floor(shape, pass_)
    ms = slower * SPEED[pass_] * bounds.larger + 0.02
    return Row(
        table=shape.table,
        shape=shape.name,
        sizes=shape.sizes,
        dtype="bfloat16",
        pass_=pass_,
        implementation=x.name,
        times_ms=(ms, 0.97 * ms, 1.04 * ms),
        peak_bytes=int(1.2 * slower * bench_floors.bytes_moved(shape, 2, "fw+bw")),
        launches=3,
        floor_memory_ms=bounds.memory,
        floor_arithmetic_ms=bounds.arithmetic,
        flops=bench_floors.flops(shape, pass_),
        bytes=bench_floors.bytes_moved(shape, 2, pass_),
        same_function=x.same_function,
    )


@pytest.fixture
def report():
    """What a whole run could give: every implementation 20 % slower than the one before it."""
    rows = []
    for shape in (*SHAPES, *SWEEP, *SCALING):
        for pass_ in PASSES if shape.table == "shapes" else PASSES[:2]:
            for n, x in enumerate(x for x in IMPLEMENTATIONS if shape.table in x.tables and not x.small):
                if pass_ in x.passes and "cuda" in x.devices:
                    rows.append(row_of(shape, pass_, x, 1.2**n))
    rates = {"copy_tb_s": COPY, "matmul_tflop_s": {"bfloat16": MATMUL}}
    return Report({"device": "Synthetic", "date": "today"}, rates, rows, 1.0, True)


@pytest.mark.parametrize(
    "name, forward, both",
    [("A", 0.54, 1.6), ("B7", 0.54, 1.6), ("C64", 0.72, 2.2), ("AL", 0.54, 1.6), ("AS", 0.07, 0.2)],
)
def test_memory_floors_are_those_of_the_study(name, forward, both):
    assert floor(BY_NAME[name], "fw").memory == pytest.approx(forward, rel=0.06)
    assert floor(BY_NAME[name], "fw+bw").memory == pytest.approx(both, rel=0.04)


def test_passes_add_up():
    for shape in SHAPES:
        for count in (lambda s, p: bench_floors.bytes_moved(s, 2, p), bench_floors.flops):
            assert count(shape, "fw") + count(shape, "bw") == count(shape, "fw+bw")


def test_operations_of_one_chunk():
    # 2 tokens, one chunk, K = V = 1: half squares 2 * (1 + 1), states 4, per token.
    assert bench_floors.flops(bench_cases.Shape("", 1, 1, 2, 1, 1), "fw") == 2 * (2 * 2 + 4)


def test_floor_is_the_larger_bound():
    small = bench_floors.floor(BY_NAME["A"], 2, "fw", 3.0, 10.0)
    assert small.bound == "arithmetic" and small.larger == small.arithmetic > small.memory
    assert floor(BY_NAME["A"], "fw").bound == "memory"


def test_plan_of_a_default_run():
    jobs = bench_cases.plan("cuda")
    names = {x.name for job in jobs for x in job.implementations}
    assert names == {x.name for x in IMPLEMENTATIONS if "cuda" in x.devices}
    assert {job.shape.table for job in jobs} == {"shapes", "sweep", "scaling"}
    assert {job.dtype.name for job in jobs} == {"bfloat16"}
    by_reference = {job.shape.name for job in jobs if any(x.name.startswith("reference") for x in job.implementations)}
    assert by_reference == {"S"}
    assert not any(job.pass_ == "fw" and "detached" in x.name for job in jobs for x in job.implementations)


def test_plan_selects():
    jobs = bench_cases.plan("cuda", shapes=["A?"], passes=["fw"], implementations=["ours JAX", "reference, XLA"])
    assert [job.shape.name for job in jobs] == ["AL", "AS", "AT"]
    assert all([x.name for x in job.implementations] == ["ours JAX", "reference, XLA"] for job in jobs)
    jobs = bench_cases.plan("cuda", dtypes=["*"], sweep=False, scaling=False)
    assert {job.shape.name for job in jobs if job.dtype.precision == "tf32"} == {"AS", "S"}
    for field in ("shapes", "dtypes", "passes", "implementations"):
        with pytest.raises(ValueError, match=f"{field}: expected a pattern among .*, got 'nothing'"):
            bench_cases.plan("cuda", **{field: ["nothing"]})


def test_json_round_trip(report, tmp_path):
    path = tmp_path / "deep" / "bench.json"
    bench_report.write(path, report)
    assert bench_report.read(path) == report
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match="expected a JSON file of tools.bench"):
            bench_report.read(tmp_path / name)


def slowed(report, factor, prefix):
    rows = [
        dataclasses.replace(x, times_ms=tuple(factor * t for t in x.times_ms))
        if x.implementation.startswith(prefix) and x.shape == "A" and x.pass_ == "fw"
        else x
        for x in report.rows
    ]
    return dataclasses.replace(report, rows=rows)


@pytest.mark.parametrize(
    "factor, prefix, allowed, code",
    [
        (1.0, "ours", 0.05, 0),
        (1.04, "ours", 0.05, 0),
        (1.06, "ours", 0.05, 1),
        (1.06, "ours", 0.1, 0),
        (2.0, "fla", 0.05, 0),
    ],
)
def test_regressions(report, tmp_path, factor, prefix, allowed, code):
    old = tmp_path / "old.json"
    bench_report.write(old, report)
    new = slowed(report, factor, prefix)
    console = Console(width=200, record=True, file=io.StringIO())
    assert bench.judge(new, old, allowed, console) == code
    found = bench_report.changes(new, report, allowed)
    assert len(found) == len(report.rows)
    assert {x.new.implementation for x in found if x.regressed} == (
        {"ours torch", "ours JAX", "ours torch, pointers"} if code else set()
    )


def test_a_row_that_fails_now_has_regressed(report):
    lost = dataclasses.replace(report.rows[0], status="failed", note="OutOfMemoryError", times_ms=())
    [change] = bench_report.changes(dataclasses.replace(report, rows=[lost]), report, 0.05)
    assert change.regressed and change.ratio is None
    [change] = bench_report.changes(report, dataclasses.replace(report, rows=[lost]), 0.05)
    assert not change.regressed


def test_table_shows_every_row(report):
    failed = dataclasses.replace(report.rows[4], status="failed", note="OutOfMemoryError: much", times_ms=())
    absent = dataclasses.replace(report.rows[5], status="not installed", note="fla", times_ms=())
    report.rows[4:6] = [failed, absent]
    console = Console(width=200, record=True, file=io.StringIO())
    bench_report.show(console, report)
    text = console.export_text()
    assert "failed: OutOfMemoryError: much" in text
    assert f"not installed: fla: {absent.implementation}" in text
    assert "A 8,16,8192,128,256" in text and "d log time / d log T = " in text
    assert text.count(" (limit_chunk 64)") == 3 * len(SHAPES) + 2 * (len(SWEEP) + len(SCALING))


def test_best_peer_computes_the_same_function(report):
    peers = {peer.implementation for _, peer in bench_report.best_peers(report.rows)}
    assert peers and all(name.startswith("mlstm-kernels") and "siging" not in name for name in peers)


def test_slopes_take_long_sequences(report):
    assert all(0.95 < slope <= 1.0 for slope in bench_report.slopes(report.rows).values())
    assert len(bench_report.slopes(report.rows)) == 2 * sum(
        "scaling" in x.tables and not x.small and "cuda" in x.devices for x in IMPLEMENTATIONS
    )


def test_pictures(report, tmp_path):
    paths = bench_plot.draw_all(report, tmp_path)
    assert [path.name for path in paths] == [f"bench-{name}.png" for name in ("sweep", "roofline", "memory", "scaling")]
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[0] > 400 and picture.shape[1] > 600 and picture.std() > 0.05
    assert bench_plot.draw_all(Report({}), tmp_path) == []


def test_bars_stand_over_their_shape(report):
    """Of a shape that only the first implementation ran, too."""
    first = report.rows[0].implementation
    rows = [row for row in report.rows if row.shape != "AT" or row.implementation == first]
    (axes,) = bench_plot.memory(Report(report.facts, report.ceilings, rows, 1.0, True)).axes
    least, most = axes.get_xlim()
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert all(least < left and right < most for left, right in bars)
    for place in axes.get_xticks():
        over = [x for bar in bars for x in bar if abs(sum(bar) / 2 - place) < 0.5]
        assert (min(over) + max(over)) / 2 == pytest.approx(place)


def command(tmp_path, *options):
    return [sys.executable, "-m", "tools.bench", "--json", str(tmp_path / "out.json"), *options]


def run(tmp_path, *options):
    return subprocess.run(command(tmp_path, *options), cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_backward_as_a_difference(report):
    both, forward = (next(x for x in report.rows if x.pass_ == pass_) for pass_ in ("fw+bw", "fw"))
    status, _, times = derive({"fw": forward, "fw+bw": both})
    assert status == "ok" and times == [(x - y) / 1e3 for x, y in zip(both.times_ms, forward.times_ms, strict=True)]
    status, note, times = derive({"fw": both, "fw+bw": forward})
    assert (status, times) == ("not available", []) and "noise" in note
    assert derive({"fw": forward})[0] == "not available"


def test_run_on_a_cpu(tmp_path):
    done = run(tmp_path, "--device", "cpu", "--quick", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    report = bench_report.read(tmp_path / "out.json")
    assert report.complete and "CPU" in report.facts["device"] and report.facts["torch"] != "none"
    by_key = {(x.implementation, x.pass_): x for x in report.rows}
    for name in ("reference, torch eager", "reference, XLA"):
        for pass_ in PASSES:
            row = by_key[name, pass_]
            if (name, pass_) == ("reference, XLA", "bw"):  # a difference, which a busy machine may leave none of
                assert row.note.startswith("fw+bw - fw") and all(t > 0 for t in row.times_ms)
                continue
            assert row.status == "ok" and len(row.times_ms) == 2 and row.ms > row.floor_ms / 100
    assert by_key["ours torch", "fw"].status == "not available"
    if by_key["fla simple_gla", "fw"].status == "not installed":
        assert "not installed: fla: fla simple_gla" in done.stdout
    again = run(tmp_path, "--plot", str(tmp_path / "out.json"), "--compare", str(tmp_path / "out.json"))
    assert again.returncode == 0, again.stderr
    assert "0 regressed" in again.stdout


@pytest.mark.parametrize("engine_thread", [False, True])
def test_where_torch_computes_gradients(engine_thread, monkeypatch):
    monkeypatch.setattr(bench_measure, "ceilings", lambda *_: bench_measure.Ceilings(1.0, {}))
    threads, before = torch.get_num_threads(), torch.autograd.is_multithreading_enabled()
    try:
        bench.measure([], bench_measure.Settings("cpu", engine_thread=engine_thread), Report({}), lambda: None)
        assert torch.autograd.is_multithreading_enabled() == engine_thread
    finally:
        torch.autograd.set_multithreading_enabled(before)
        torch.set_num_threads(threads)
        gc.unfreeze()


def test_a_peer_that_tunes_its_kernels_has_longer(monkeypatch):
    def run(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(bench_probe.subprocess, "run", run)
    sizes = (1, 4, 512, 64, 64)
    reasons = [bench_probe.probe((x.name, sizes, "bfloat16")) for x in IMPLEMENTATIONS if x.kind in bench_probe.KINDS]
    assert set(reasons) == {"no result within 150 s", "no result within 900 s"}
    assert reasons.count("no result within 900 s") == 1
    assert bench_probe.probe(("fla simple_gla", sizes, "bfloat16")) == "no result within 900 s"


def test_a_package_by_either_of_its_names(monkeypatch):
    """fla comes whole, or as its core alone."""

    def version(name):
        if name != "fla-core":
            raise importlib.metadata.PackageNotFoundError
        return "0.6.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = bench_report.facts("cpu", "a machine", "today")
    assert facts["fla"] == "0.6.0" and facts["mlstm-kernels"] == "none"


def test_bad_arguments(tmp_path):
    for options in (("--device", "tpu"), ("--device", "cpu", "--shapes", "nothing"), ("--plot", "missing.json")):
        done = run(tmp_path, *options)
        assert done.returncode == 2, done.stdout
        assert "expected" in done.stderr


# The background jobs of a shell ignore the signal, and so does what they start.
HEEDING_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("tools.bench", run_name="__main__", alter_sys=True)
"""


def test_interrupted_run_writes_what_it_has(tmp_path):
    arguments = command(tmp_path, "--device", "cpu", "--rounds", "1000000", "--implementations", "*eager")
    assert arguments[:3] == [sys.executable, "-m", "tools.bench"]
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING_CTRL_C, *arguments[3:]],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the facts: it is about to measure
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in out
    assert json.loads((tmp_path / "out.json").read_text())["complete"] is False
