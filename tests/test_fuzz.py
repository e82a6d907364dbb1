"""The hunter without kernels: what it draws, how calls are written, shrunk and survived. Checks are stand-ins here."""

import collections
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tools import fuzz_only
from tools.fuzz_call import FIELDS, Call, kernels, make_arrays, of_others, plant, problem_of, read, ways, work, write
from tools.fuzz_check import Outcome
from tools.fuzz_draw import MOST, draw
from tools.fuzz_hunt import Limits, hunt, summary, write_json
from tools.fuzz_pool import Settings, Worker
from tools.fuzz_shrink import shrink
from tools.fuzz_tolerance import chance, parts

ROOT = Path(__file__).parents[1]
EXITS, HANGS, CRASHES, BREAKS = 13, 14, 15, 16  # seeds of calls at which the stand-in below misbehaves


def drawn(count, device="cuda", only="", seed=0):
    calls = itertools.chain.from_iterable(draw(seed, 5, device, fuzz_only.parse(only)))
    return list(itertools.islice(calls, count))


def test_calls_are_valid_bounded_and_alike_for_a_seed():
    for device in ("cpu", "cuda"):
        calls = drawn(200, device)
        assert calls == drawn(200, device) != drawn(200, device, seed=1)
        for call in calls:
            problem_of(call)
            assert work(call) <= MOST[device]


def test_every_way_through_the_plan_is_drawn():
    calls = drawn(1000)
    found = collections.Counter(way for call in calls for way in ways(call))
    scans = [
        f"{name} {way}{parts}" for name in ("scan",) for way in ("forward", "backward") for parts in ("", " in parts")
    ]
    fused = ["fused forward", "fused forward in parts", "fused backward"]
    assert set(found) == {*scans, *fused, "split gates", "token by token", "packed", "chunk table"}
    assert min(found.values()) >= 5
    names = {name for call in calls for name in kernels(call)}
    assert {"gates_sums", "recurrent", "fused_forward", "fused_backward", "chunk_table"} <= names


def test_every_option_is_drawn():
    calls = drawn(1000)
    values = {name: {getattr(call, name) for call in calls} for name in FIELDS}
    assert [name for name, found in values.items() if len(found) < 2] == ["documents"]  # f_closed does so at random
    assert {-math.inf, -1e6, -60.0} <= values["f_closed"] and -math.inf in values["m_mean"]
    assert sum(call.dtype == "bfloat16" for call in calls) > 400
    assert min(values["K"] | values["V"]) == 1 and max(values["K"] | values["V"]) == 512
    assert sum(call.V % 2 for call in calls) > 400
    assert any(0 in call.lengths for call in calls)


def test_calls_of_a_group_share_their_kernels():
    own = (
        "B",
        "T",
        "seed",
        "i_gate",
        "f_gate",
        "f_closed",
        "i_closed",
        "m_mean",
        "cotangents",
        "lengths",
        "split",
        "plant",
    )
    for group in itertools.islice(draw(0, 5, "cuda"), 50):
        assert len({tuple(getattr(call, name) for name in FIELDS if name not in own) for call in group}) == 1


def test_a_line_names_its_call():
    for call in drawn(300):
        assert read(write(call)) == call
    assert write(Call(K=97, V=64, seed=3)) == "K=97 V=64 T=70 B=1 H=2 dtype=float32 seed=3"
    for line, text in (
        ("K=97 colour=red", "expected one of the fields .*, got 'colour'"),
        ("K=wide", "K: expected a value such as '16', got 'wide'"),
        ("K=600", "expected 1 <= K <= 512, got K = 600"),
        ("strided=yes", "strided: expected True or False, got 'yes'"),
        ("K", "expected field=value, got 'K'"),
        ("dtype=float64", "q: expected dtype .*, got float64"),
        ("i_gate=1", "i_gate: expected"),
        ("split=5", "split: expected states"),
    ):
        with pytest.raises(ValueError, match=text):
            read(line)


@pytest.mark.parametrize(
    "only, fits",
    [
        ("dtype=bfloat16,V=97..512,odd", lambda x: x.dtype == "bfloat16" and x.V >= 97 and x.V % 2),
        ("K=64,V=64", lambda x: x.K == x.V == 64),
        ("K=2..4,even,T=33", lambda x: x.K in (2, 4) and x.T == 33),
        ("normalizer_grad=det*", lambda x: x.normalizer_grad == "detached"),
        ("form=step", lambda x: x.form == "step"),
        ("lengths=5+0+3", lambda x: x.lengths == (5, 0, 3) and x.T == 8),
        ("cotangents=h+c_last", lambda x: x.cotangents == ("h", "c_last")),
        ("eps=0.5..0.6", lambda x: 0.5 <= x.eps <= 0.6),
    ],
)
def test_only(only, fits):
    assert all(fits(call) for call in drawn(20, only=only))


def test_only_says_what_is_wrong():
    for pattern, text in (
        ("colour=red", "expected field=value with a field among .*, got 'colour=red'"),
        ("K=4..2", "expected lo <= hi, got 'K=4..2'"),
        ("K=a..b", "expected numbers as in lo..hi, got 'K=a..b'"),
        ("odd", "expected 'odd' after a field"),
        ("dtype=bfloat16,odd", "expected 'odd' after a field that is a whole number"),
        ("K=many", "K: expected a value such as"),
        ("form=step,chunk_size=64", "expected a pattern that some call fits"),
    ):
        with pytest.raises(ValueError, match=text):
            drawn(1, only=pattern)


def test_arrays_of_a_call():
    call = read("T=40 seed=3 initial=True f_closed=-inf i_closed=-60.0 m_mean=-inf gate_dtype=bfloat16")
    arrays = make_arrays(call)
    assert np.isneginf(arrays["f"].astype(np.float32)).any() and np.isneginf(arrays["m_initial"]).all()
    assert arrays["f"].dtype.name == "bfloat16" and (arrays["i"].astype(np.float32) == -60).any()
    assert all(x.tobytes() == arrays[name].tobytes() for name, x in make_arrays(call).items())
    packed = read("T=9 seed=3 layout=bthd lengths=4,0,5 plant=v")
    before = make_arrays(packed)
    after, s = plant(packed, before)
    assert s in (0, 2) and np.isnan(after["v"]).any()
    for name in packed.inputs:
        x = after[name]
        assert of_others(packed, name, x, s).tobytes() == of_others(packed, name, before[name], s).tobytes()


def test_chance_of_few_and_of_many_parts():
    rng = np.random.default_rng(0)
    for n in (1, 3, 10, 1000):
        norms = np.sqrt((rng.standard_normal((20_000, n)) ** 2).mean(1))
        assert np.quantile(norms, 0.9999) < chance(n) < 1.3 * norms.max()
    assert parts(np.zeros((16, 5))) == 1
    assert 1 <= parts(rng.standard_normal((16, 1))) < 1.01
    assert 300 < parts(rng.standard_normal((16, 1000))) < 1000
    together = rng.standard_normal((16, 1)) * np.ones((1, 1000))  # one number decides over all elements
    assert parts(together) < 4


def test_shrinking_ends_at_the_smallest_call():
    def fails(call):
        return call.K >= 5 and call.V % 2 == 1 and call.T >= 3

    start = read("K=97 V=33 T=300 B=2 H=4 dtype=bfloat16 seed=3 initial=True last=True strided=True chunk_size=64")
    small, tried = shrink(start, fails, tries=500)
    assert small == read("K=5 V=1 T=3 B=1 H=1 dtype=bfloat16 seed=3") and tried < 100
    assert shrink(start, fails, tries=7)[1] == 7
    assert shrink(start, fails, seconds=-1.0) == (start, 0)
    assert shrink(start, lambda _: False, tries=500)[0] == start
    packed = read("T=9 layout=bthd lengths=4,0,5 plant=v dtype=bfloat16")
    small, _ = shrink(packed, lambda call: call.plant == "v", tries=500)
    assert len(small.lengths) == 2 and small.T == 1


def misbehaving(call, device):
    """A check that may not come back; K above 7 fails."""
    if call.seed == EXITS:
        os._exit(3)
    if call.seed == HANGS:
        time.sleep(1000)
    if call.seed == CRASHES:
        os.kill(os.getpid(), signal.SIGSEGV)
    if call.K > 7:
        return Outcome(write(call), ("too wide",), kind="wide")
    return Outcome(write(call), fatal=call.seed == BREAKS, rows=(("h", 0.5, 1.0),), kernels=("k",), ways=("w",))


def test_a_worker_that_dies_hangs_or_breaks_is_replaced():
    worker = Worker(Settings(limit_s=3.0, check=misbehaving))
    try:
        seeds = (0, EXITS, 1, HANGS, 2, CRASHES, 3, BREAKS, 4)
        outcomes = {seed: worker.run(Call(K=2, seed=seed)) for seed in seeds}
    finally:
        worker.stop()
    assert outcomes[EXITS].problems == ("the process died: exit code 3",)
    assert outcomes[HANGS].problems == ("no result within 3 s",)
    assert outcomes[CRASHES].problems == ("the process died: signal 11, SIGSEGV",)
    assert all(outcomes[seed].ok for seed in (0, 1, 2, 3, 4, BREAKS))
    assert worker.started == 5
    worker.process.join(10)
    assert not worker.process.is_alive()


def test_a_hunt_goes_on_shrinks_and_keeps_its_failures(tmp_path):
    calls = [Call(K=2, seed=0), Call(K=2, seed=EXITS), Call(K=90, T=300, seed=1), Call(K=3, seed=2), Call(K=80, seed=3)]
    result = hunt(
        iter([calls[:3], calls[3:], [Call()]]), Settings(check=misbehaving), 1, Limits(count=5), progress=False
    )
    assert [x.line for x in result.outcomes] == [write(call) for call in calls]
    assert result.failed == len(result.failures) == 3 and not result.interrupted
    died, wide, again = result.failures
    assert died.smallest.problems == ("the process died: exit code 3",)
    smallest = read(wide.smallest.line)
    assert (smallest.K, smallest.T, smallest.V) == (8, 1, 1) and wide.tried > 5
    assert again.tried == 0  # the same kind of failure
    text = "\n".join(summary(result))
    assert "5 calls, each through PyTorch and JAX: 3 failed" in text
    assert "0.50 of its tolerance" in text and "the process died 1" in text
    path = tmp_path / "deep" / "failures.json"
    write_json(path, result, {"device": "none"})
    kept = json.loads(path.read_text())
    assert kept["failed"] == 3 and kept["failures"][1]["repro"] == wide.smallest.line
    assert all(read(x["repro"]) for x in kept["failures"])


def test_a_hunt_ends_in_time():
    endless = draw(0, 5, "cpu", fuzz_only.parse("K=1..7"))
    start = time.monotonic()
    result = hunt(endless, Settings(check=misbehaving), 2, Limits(seconds=8.0), progress=False)
    assert time.monotonic() - start < 60 and result.outcomes and not result.failed


def command(*options):
    return subprocess.run(
        [sys.executable, "-m", "tools.fuzz", *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_bad_arguments():
    for options, text in (
        (("--device", "tpu"), "got tpu"),
        (("--only", "colour=red"), "colour"),
        (("--repro", "K=600"), "600"),
        (("--seconds", "0"), "equal to 1"),
    ):
        done = command(*options)
        assert done.returncode == 2, done.stdout
        assert text in done.stderr


# The background jobs of a shell ignore the signal, and so does what they start.
HEEDING_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("tools.fuzz", run_name="__main__", alter_sys=True)
"""


def test_interrupted_hunt_sums_up_and_ends_its_workers(tmp_path):
    path = tmp_path / "failures.json"
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING_CTRL_C, "--count", "100000", "--jobs", "1", "--json", str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the facts: it is about to start
    time.sleep(3.0)
    process.send_signal(signal.SIGINT)  # to the parent alone: its workers must end by its doing
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "each through PyTorch and JAX" in out and "interrupted" in out
    assert json.loads(path.read_text())["interrupted"] is True
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("expected no process of the hunt any more")
