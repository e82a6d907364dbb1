"""What holds for every backend and both frontends; one body each, on the backend that this process can run."""

import itertools
from typing import Any

import array_api_compat
import numpy as np
import pytest

from tests.support import FRAMEWORKS, OUTPUTS, Case, check, make_case, run, same_bits, truth

pytestmark = pytest.mark.parametrize("framework", FRAMEWORKS)


def in_segments(*cuts: int):
    """The operator over [0, cuts[0]), [cuts[0], cuts[1]), ..., each from the state that the one before left."""

    def via(operator):
        def segmented(q, k, v, i, f, **states: Any):
            xp = array_api_compat.array_namespace(q)
            hs = []
            for start, stop in itertools.pairwise((0, *cuts, q.shape[2])):
                h, last = operator(*(x[:, :, start:stop] for x in (q, k, v, i, f)), **states)
                states = dict(zip(("c_initial", "n_initial", "m_initial"), last, strict=True))
                hs.append(h)
            return xp.concat(hs, axis=2), last

        return segmented

    return via


@pytest.mark.parametrize("mode", ["exact", "detached"])
def test_segments_equal_the_whole(framework, backend, mode):
    case = make_case(H=1, T=53, normalizer_grad=mode, chunk_size=16)
    check(run(framework, case, backend, in_segments(1, 17, 38)), case)


def test_runs_repeat_to_the_bit(framework, backend):
    case = make_case(T=70)
    same_bits(run(framework, case, backend), run(framework, case, backend))


# To the kernels "bthd" is a matter of strides: same arithmetic, same bits.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_agree(framework, backend, dtype):
    case = make_case(B=2, T=19, dtype=dtype, chunk_size=16)
    tokens = ("q", "k", "v", "i", "f", "h", "dh", "dq", "dk", "dv", "di", "df")

    def swapped(arrays):
        return {n: np.ascontiguousarray(x.swapaxes(1, 2)) if n in tokens else x for n, x in arrays.items()}

    other = Case(swapped(case.arrays), swapped(case.cotangents), {**case.options, "layout": "bthd"})
    got = run(framework, other, backend)
    check(got, other)
    if backend != "reference":
        same_bits(swapped(run(framework, case, backend)), got)


@pytest.mark.parametrize("chunk_size", [None, 16, 64, 512])
def test_chunk_size_changes_rounding_only(framework, backend, chunk_size):
    case = make_case(H=1, T=70, chunk_size=chunk_size)
    check(run(framework, case, backend), case)


# One, and several tiles of keys and values, the last one ragged.
@pytest.mark.parametrize("K, V", [(1, 1), (70, 133), (130, 67)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_dims(framework, backend, K, V, dtype):
    case = make_case(H=1, T=18, K=K, V=V, dtype=dtype, chunk_size=16)
    check(run(framework, case, backend), case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("i_dtype, f_dtype", [("float32", "float32"), ("float64", "bfloat16"), ("float16", "float64")])
def test_dtypes(framework, backend, dtype, i_dtype, f_dtype):
    case = make_case(H=1, dtype=dtype, i_dtype=i_dtype, f_dtype=f_dtype)
    got = run(framework, case, backend)
    assert got["h"].dtype == case.arrays["v"].dtype
    assert {name: got[f"d{name}"].dtype for name in case.arrays} == {name: x.dtype for name, x in case.arrays.items()}
    assert {got[name].dtype.name for name in OUTPUTS[1:]} == {"float32"}
    check(got, case)


def test_m_initial_of_rank_three(framework, backend):
    case = make_case(T=5)
    column = case.replacing(m_initial=case.arrays["m_initial"][..., None])
    got = run(framework, column, backend)
    assert got["dm_initial"].shape == (1, 2, 1)
    assert got["m_last"].shape == (1, 2)
    same_bits(got | {"dm_initial": got["dm_initial"][..., 0]}, run(framework, case, backend))


SPOILED = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial", "dh", "dc_last", "dn_last", "dm_last")


# Head n has the bad number in its n-th array, in one batch element or the next; all other heads are clean.
def test_bad_numbers_stay_in_their_head(framework, backend):
    case = make_case(B=2, H=len(SPOILED), T=17, K=3, V=2, chunk_size=16)
    clean = run(framework, case, backend)
    # A gate that is wide open or closed is no bad number, nor is a state of no weight.
    for value, harmless in ((np.nan, ()), (np.inf, ("f",)), (-np.inf, ("i", "f", "m_initial"))):
        changed, hit = {}, np.zeros((2, len(SPOILED)), bool)
        for n, name in enumerate(SPOILED):
            x = (case.arrays[name] if name in case.arrays else case.cotangents[name[1:]]).copy()
            x.reshape(2, len(SPOILED), -1)[n % 2, n, -1] = value
            changed[name], hit[n % 2, n] = x, True
        with np.errstate(invalid="ignore"):
            got = run(framework, case.replacing(**changed), backend)
        same_bits({name: x[~hit] for name, x in clean.items()}, {name: x[~hit] for name, x in got.items()})
        finite = np.logical_and.reduce([np.isfinite(x.reshape(*hit.shape, -1)).all(-1) for x in got.values()])
        assert {name for n, name in enumerate(SPOILED) if finite[n % 2, n]} <= set(harmless), value


# A closed gate: of the forget gate, a hard reset (a document boundary); of the input gate, a token left out.
@pytest.mark.parametrize("states", [True, False], ids=["states", "no-states"])
@pytest.mark.parametrize("reset, masked", [((0, 9, 17), ()), ((), (0, 9, 10, 18)), ((5, 16), (3, 16)), ((), range(19))])
def test_closed_gates(framework, backend, reset, masked, states):
    case = make_case(H=1, T=19, states=states, chunk_size=16)

    def closed(value):
        i, f = case.arrays["i"].copy(), case.arrays["f"].copy()
        i[:, :, list(masked)] = value
        f[:, :, list(reset)] = value
        return case.replacing(i=i, f=f)

    check(run(framework, closed(-np.inf), backend), case, like=closed(-300.0))


def rms(x, true):
    """The error's root mean square over that of the truth."""
    return np.linalg.norm(x.astype(np.float64) - true) / max(np.linalg.norm(true), 1e-30)


# A batch of places (within a chunk, every ten tokens, the first token, a chunk's first token), a head per gate.
RESETS = ((20,), tuple(range(3, 37, 10)), (0,), (16,))
GATES = (-np.inf, -1e6, -1e5, -1e4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("input_gate", ["exponential", "sigmoid"])
def test_a_hard_reset_costs_no_digits(framework, backend, dtype, input_gate):
    """No result is less exact than where the gate closes at -30, which is a thousandth of the weakest of these."""
    case = make_case(B=len(RESETS), H=len(GATES), dtype=dtype, chunk_size=16, input_gate=input_gate)

    def closed(*values):
        f = case.arrays["f"].copy()
        for b, tokens in enumerate(RESETS):
            f[b][:, list(tokens)] = np.array(values)[:, None]
        return case.replacing(f=f)

    mild, hard = closed(*[-30.0] * len(GATES)), closed(*GATES)
    errors = [
        {name: rms(got[name], x) for name, x in true.items()}
        for got, true in (
            (run(framework, mild, backend), truth(mild)),
            (run(framework, hard, backend), truth(closed(*[-3000.0] * len(GATES)))),
        )
    ]
    assert {name: (x, errors[0][name]) for name, x in errors[1].items() if not x <= 1.5 * errors[0][name] + 1e-7} == {}


def test_a_weak_input_gate_after_a_reset_outweighs_what_was_before(framework, backend):
    case = make_case(H=1, T=19, chunk_size=16, i_mean=-200.0)
    f = case.arrays["f"].copy()
    f[:, :, 9] = -np.inf
    like = f.copy()
    like[:, :, 9] = -3000.0
    check(run(framework, case.replacing(f=f), backend), case, like=case.replacing(f=like))


@pytest.mark.parametrize("i_mean", [1e3, 1e4])
def test_a_state_handed_on_belongs_to_its_rounded_stabiliser(framework, backend, i_mean):
    """m is float32: off by up to 5e-4 at 1e4, which C and n have to make up for."""
    case = make_case(H=1, T=53, chunk_size=16, i_mean=i_mean)
    got, true = run(framework, case, backend, in_segments(1, 17, 38)), truth(case)
    assert rms(got["h"], true["h"]) < 5e-6
    scale = np.exp(got["m_last"].astype(np.float64) - true["m_last"])
    assert rms(got["c_last"] * scale[..., None, None], true["c_last"]) < 5e-6
    check(got, case)


def test_an_initial_state_of_no_weight_with_the_sigmoid_gate(framework, backend):
    case = make_case(T=37, chunk_size=16, input_gate="sigmoid")
    case = case.replacing(m_initial=np.full_like(case.arrays["m_initial"], -np.inf))
    for via in (None, in_segments(1, 17)):
        got = run(framework, case, backend, via)
        assert not got["m_last"].any()
        check(got, case, like=case.replacing(m_initial=np.full_like(case.arrays["m_initial"], -300.0)))


def test_float16_weights_far_below_one(framework, backend):
    """Before anything has a weight, m is 0: float16 itself has two digits of exp(-12) and none of exp(-20)."""
    for i_mean in (-12.0, -20.0):
        case = make_case(H=1, T=20, states=False, dtype="float16", i_mean=i_mean, chunk_size=16)
        got, exact = run(framework, case, backend), truth(case)
        away = np.linalg.norm(got["c_last"] - exact["c_last"])
        assert away < 1e-3 * np.linalg.norm(exact["c_last"]), i_mean


@pytest.mark.parametrize("operator", ["mlstm_chunkwise", "mlstm_recurrent"])
def test_h_is_0_while_nothing_has_a_weight(framework, backend, operator):
    """An initial state of no weight, and input gates that are closed: padding on the left, say."""
    case = make_case(H=1, T=21, **({"chunk_size": 16} if operator == "mlstm_chunkwise" else {}))

    def closed(value):
        i = case.arrays["i"].copy()
        i[:, :, :18] = value
        return case.replacing(i=i, m_initial=np.full_like(case.arrays["m_initial"], value))

    got = run(framework, closed(-np.inf), backend, operator=operator)
    assert not got["h"][:, :, :18].any()
    check(got, case, like=closed(-3000.0))


@pytest.mark.parametrize("dtype, limit", [("float32", 2e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("T", [16, 53])
def test_gates_gradients_where_the_last_state_alone_is_in_the_loss(framework, backend, dtype, limit, T):
    """One early token holds the state: its cotangent's product with it, which is large, cancels in di and df."""
    case = make_case(T=T, dtype=dtype, chunk_size=16, f_mean=6.0, cotangents=("c_last", "m_last"))
    i = case.arrays["i"].copy()
    i[:, :, 3] += 10.0
    case = case.replacing(i=i)
    got, true = run(framework, case, backend), truth(case)
    assert {name: x for name in ("di", "df") if not (x := rms(got[name], true[name])) < limit} == {}
