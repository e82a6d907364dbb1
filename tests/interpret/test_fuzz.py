"""A short hunt through the kernels in Triton's interpreter, and proof that the hunter sees what is wrong."""

import functools
import itertools

import numpy as np
import pytest

from tools import compare
from tools.fuzz_call import case_of, make_arrays, read
from tools.fuzz_check import Checker, check, in_two
from tools.fuzz_draw import draw
from tools.fuzz_hunt import Limits, hunt, same_way, summary
from tools.fuzz_pool import Settings
from tools.fuzz_shrink import shrink

NORMAL = read("K=33 V=17 T=40 B=1 H=2 dtype=bfloat16 seed=1 initial=True last=True")
PACKED = read("K=3 V=2 T=9 B=1 H=1 dtype=bfloat16 seed=1 layout=bthd lengths=4,5 plant=v")


def test_a_short_hunt_finds_nothing():
    result = hunt(draw(5, 3, "cpu"), Settings(limit_s=300.0), 1, Limits(count=18), progress=False)
    assert len(result.outcomes) == 18 and result.processes == 1
    assert [(x.line, x.problems) for x in result.outcomes if not x.ok] == []
    assert "0 failed" in summary(result)[0]


@functools.cache
def worse(factor):
    """The normal call's results, with errors so many times as large."""
    arrays = make_arrays(NORMAL)
    truth = compare.truth(case_of(NORMAL), arrays)

    def change(results):
        wide = {name: truth[name] + factor * (x.astype(np.float64) - truth[name]) for name, x in results.items()}
        return {name: x.astype(results[name].dtype) for name, x in wide.items()}

    return change


def inaccurate(outcome):
    return {name for name, error, tolerance in outcome.rows if error > tolerance}


def test_three_times_the_error_is_seen_where_matrix_units_round():
    assert check(NORMAL).ok
    seen = inaccurate(check(NORMAL, change=worse(3.0)))
    assert {"h", "dq", "dk", "dv", "dc_initial"} <= seen


@pytest.mark.parametrize("name", ["h", "n_last", "dq", "di", "df", "dm_initial"])
def test_an_error_of_a_twentieth_is_seen_in_any_tensor(name):
    outcome = check(NORMAL, change=lambda x: {**x, name: (x[name] * x[name].dtype.type(1.05)).astype(x[name].dtype)})
    assert name in inaccurate(outcome)
    assert any(problem.startswith("PyTorch and JAX differ") for problem in outcome.problems)


def test_an_injected_fault_is_shrunk():
    def fault(results):
        dk = results["dk"].copy()
        dk[..., 4:] *= 2  # of keys from the fifth on
        return {**results, "dk": dk}

    found = check(NORMAL, change=fault)
    assert not found.ok
    small, _ = shrink(NORMAL, lambda call: same_way(check(call, change=fault), found), tries=60, seconds=120)
    assert small.K == 5 and small.V == small.B == small.H == 1 and small.T < 5


def test_bits_that_move_are_seen():
    count = itertools.count()
    outcome = check(NORMAL, change=lambda x: {**x, "h": x["h"] + np.array(next(count), x["h"].dtype)})
    assert outcome.problems[0] == "other bits in a second run: h"


def test_a_nan_is_seen():
    outcome = check(NORMAL, change=lambda x: {**x, "dv": np.full_like(x["dv"], np.nan)})
    assert "dv" in inaccurate(outcome)


def test_what_reaches_neighbours_is_seen():
    assert check(PACKED).ok
    outcome = check(PACKED, change=lambda x: {**x, "dq": x["dq"] + np.array(1, x["dq"].dtype)})
    assert any(problem.startswith("NaN in v of sequence") and "dq" in problem for problem in outcome.problems)


def test_two_calls_that_hand_no_state_on_are_seen():
    call = read("K=5 V=3 T=20 B=1 H=1 dtype=float32 seed=1 initial=True last=True split=7")
    assert check(call).ok
    operator = compare.frontend("torch")

    def forgetful(c_initial, n_initial, m_initial, **options):
        return operator(c_initial=c_initial * 0, n_initial=n_initial * 0, m_initial=m_initial * 0, **options)

    checker, arrays = Checker(call, "cpu"), make_arrays(call)
    truth = compare.truth(case_of(call), arrays)

    def handed(q, k, v, i, f, c_initial, n_initial, m_initial, **options):
        return forgetful(c_initial, n_initial, m_initial, q=q, k=k, v=v, i=i, f=f, **options)

    results = checker.torch(arrays, in_two(handed, 7, 2))
    assert compare.frobenius_error(results["h"], truth["h"]) > 0.05


def test_what_an_error_says():
    def fails(results):
        raise ValueError("no such\nthing")

    outcome = check(read("K=5 V=3 T=20 B=1 H=1 dtype=float32 seed=1"), change=fails)
    assert outcome.problems == ("ValueError: no such thing",) and outcome.kind == "ValueError"


@pytest.mark.parametrize(
    "line",
    [
        "K=63 V=16 T=20 B=1 H=3 dtype=float16 seed=632457 layout=bthd last=True cotangents=h chunk_size=16 eps=0.0 "
        "i_gate=0.0,10.0 f_gate=-6.0,1.0 i_closed=-1000000.0",
        "K=5 V=1 T=1 B=1 H=1 dtype=bfloat16 seed=425965 initial=True last=True chunk_size=32 f_closed=-1000000.0 "
        "i_closed=-1000000.0",
        "K=1 V=2 T=1 B=1 H=1 dtype=float16 seed=512029 last=True cotangents=h i_gate=-10.0,1.0",
    ],
)
def test_calls_that_the_hunt_once_reported(line):
    """q . n near 0; a stabiliser that float32 rounds by 0.03; weights that float16 has few digits of."""
    assert check(read(line)).problems == ()
