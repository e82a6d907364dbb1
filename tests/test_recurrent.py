"""The token-by-token forms: a short sequence in one kernel, and one token of inference."""

import itertools

import array_api_compat
import numpy as np
import pytest
import torch

from tests.support import FRAMEWORKS, LAST, MODULES, Case, check, make_case, run, same_bits, to_torch

pytestmark = pytest.mark.parametrize("framework", FRAMEWORKS)

OPTIONS = (
    {},
    {"input_gate": "sigmoid"},
    {"input_gate": "sigmoid", "normalize": False},
)


def in_steps(first: int, step):
    """A whole sequence as one call over the first tokens, the rest token by token."""

    def via(operator):
        options = {n: x for n, x in operator.keywords.items() if n in ("eps", "input_gate", "normalize", "backend")}

        def stepped(q, k, v, i, f, c_initial, n_initial, m_initial):
            xp = array_api_compat.array_namespace(q)
            hs, states = [], (c_initial, n_initial, m_initial)
            if first:
                h, states = operator(*(x[:, :, :first] for x in (q, k, v, i, f)), *states)
                hs.append(h)
            for t in range(first, q.shape[2]):
                h, states = step(*(x[:, :, t] for x in (q, k, v, i, f)), *states, **options)
                hs.append(h[:, :, None])
            return xp.concat(hs, axis=2), states

        return stepped

    return via


@pytest.mark.parametrize("options", OPTIONS, ids=["exponential", "sigmoid", "plain"])
@pytest.mark.parametrize("states", [True, False], ids=["states", "no-states"])
def test_recurrent(framework, backend, options, states):
    case = make_case(T=5, states=states, **options)
    check(run(framework, case, backend, operator="mlstm_recurrent"), case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("K, V", [(1, 3), (33, 130)])
def test_recurrent_in_other_shapes(framework, backend, dtype, K, V):
    case = make_case(H=1, T=3, K=K, V=V, dtype=dtype, layout="bthd", f_dtype="bfloat16")
    check(run(framework, case, backend, operator="mlstm_recurrent"), case)


@pytest.mark.parametrize("options", OPTIONS, ids=["exponential", "sigmoid", "plain"])
def test_steps_equal_the_whole(framework, backend, options):
    """Values and gradients, of single steps alone and of steps after a prefill."""
    case = make_case(H=1, T=6, K=17, V=13, **options)
    for first in (0, 4):
        check(run(framework, case, backend, in_steps(first, MODULES[framework].mlstm_step)), case)


def test_prefill_extend_and_decode_equal_one_call(framework, backend):
    """40 tokens, then 16 (which take the form token by token), then single steps; 1e-5 of one call over all."""
    case = make_case(H=2, T=60, K=24, V=40, cotangents=())
    case = case.but(return_last_states=True)
    operator, step = (getattr(MODULES[framework], x) for x in ("mlstm_chunkwise", "mlstm_step"))
    convert = to_torch if framework == "torch" else (lambda x: x)
    arrays = {name: convert(x) for name, x in case.arrays.items()}
    tokens = [arrays[name] for name in ("q", "k", "v", "i", "f")]
    states = [arrays[name] for name in ("c_initial", "n_initial", "m_initial")]
    h_whole, whole = operator(*tokens, *states, return_last_states=True, backend=backend)
    hs = []
    for start, stop in itertools.pairwise((0, 40, 56)):
        h, states = operator(*(x[:, :, start:stop] for x in tokens), *states, return_last_states=True, backend=backend)
        hs.append(np.asarray(h))
    for t in range(56, 60):
        h, states = step(*(x[:, :, t] for x in tokens), *states, backend=backend)
        hs.append(np.asarray(h)[:, :, None])
    h = np.concatenate(hs, axis=2)
    for x, y in ((h, h_whole), *zip(states, whole, strict=True)):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= 1e-5 * np.abs(y).max()


def test_bfloat16_state(framework, backend):
    """C is rounded to bfloat16 once per step and not otherwise."""
    case = make_case(T=1, K=20, V=24)
    convert = to_torch if framework == "torch" else (lambda x: x)
    token = [convert(case.arrays[name][:, :, 0]) for name in ("q", "k", "v", "i", "f")]
    c, n, m = (convert(case.arrays[f"{name}_initial"]) for name in "cnm")
    step = MODULES[framework].mlstm_step
    xp = array_api_compat.array_namespace(c)
    low = c.to(torch.bfloat16) if framework == "torch" else c.astype("bfloat16")
    h, (c_next, n_next, m_next) = step(*token, low, n, m, backend=backend)
    assert str(c_next.dtype).endswith("bfloat16")
    wide = low.to(torch.float32) if framework == "torch" else low.astype("float32")
    h_wide, (c_wide, *others) = step(*token, wide, n, m, backend=backend)
    rounded = c_wide.to(torch.bfloat16) if framework == "torch" else c_wide.astype("bfloat16")
    same = (lambda x, y: xp.all(x == y)) if backend != "reference" else (lambda x, y: xp.all(xp.abs(x - y) <= 1e-6))
    assert same(h, h_wide)
    assert same(n_next, others[0]) and same(m_next, others[1])
    assert xp.all(xp.abs(c_next - rounded) <= (2**-7 if backend == "reference" else 0) * xp.abs(rounded))


def step_as_operator(operator):
    """A step with the operator's arrays, so that it can be differentiated and compared like one."""
    step = MODULES["torch" if "torch" in operator.func.__module__ else "jax"].mlstm_step

    def stepped(q, k, v, i, f, c_initial, n_initial, m_initial):
        return step(q, k, v, i, f, c_initial, n_initial, m_initial, backend=operator.keywords["backend"])

    return stepped


def test_gradients_of_a_step_with_a_bfloat16_state(framework, backend):
    case = make_case(T=1, K=20, V=24, dtype="bfloat16")
    c = case.arrays["c_initial"].astype(case.arrays["q"].dtype)
    flat = {n: x[:, :, 0] if n in ("q", "k", "v", "i", "f") else x for n, x in case.arrays.items()} | {"c_initial": c}
    cotangents = {n: x[:, :, 0] if n == "h" else x for n, x in case.cotangents.items()}
    cotangents["c_last"] = cotangents["c_last"].astype(c.dtype)
    got = run(framework, Case(flat, cotangents, {}), backend, step_as_operator)
    assert got["dc_initial"].dtype == got["c_last"].dtype == c.dtype
    exact = case.replacing(c_initial=c.astype("float32"), dc_last=cotangents["c_last"].astype("float32"))
    want = run(framework, exact, backend)
    for name, x in got.items():
        y = want[name][:, :, 0] if name in ("h", "dq", "dk", "dv", "di", "df") else want[name]
        error = np.abs(x.astype(np.float64) - y.astype(np.float64)).max() / np.abs(y.astype(np.float64)).max()
        assert error <= 2**-7, name


BAD = {
    "rank": ({"q": (2, 3, 1, 4)}, ValueError, r"q: expected rank 3, \(B, H, K\), got shape \(2, 3, 1, 4\)"),
    "values": ({"v": (2, 3)}, ValueError, r"v: expected rank 3, \(B, H, V\), got shape"),
    "keys": ({"k": (2, 3, 5)}, ValueError, r"k: expected shape \(B, H, K\) = \(2, 3, 4\), got \(2, 3, 5\)"),
    "gates": ({"f": (3, 2)}, ValueError, r"f: expected shape \(B, H\) = \(2, 3\), got \(3, 2\)"),
    "c": ({"c": (2, 3, 6, 4)}, ValueError, r"c: expected shape \(B, H, K, V\) = \(2, 3, 4, 6\), got"),
    "m": ({"m": (3, 2)}, ValueError, r"m: expected shape \(B, H\) = \(2, 3\) or \(B, H, 1\), got"),
    "eps": ({"eps": -1.0}, ValueError, r"eps: expected a finite number >= 0"),
    "gate": ({"input_gate": "relu"}, ValueError, r"input_gate: expected one of"),
    "plain": ({"normalize": False}, ValueError, r"normalize: expected True with input_gate='exponential'"),
    "dtype": ({"c": np.zeros((2, 3, 4, 6), np.float16)}, TypeError, r"c: expected dtype float32 or bfloat16, got flo"),
}


@pytest.mark.parametrize("change, error, text", BAD.values(), ids=BAD)
def test_bad_step(framework, backend, change, error, text):
    shapes = {"q": (2, 3, 4), "k": (2, 3, 4), "v": (2, 3, 6), "i": (2, 3), "f": (2, 3)}
    shapes |= {"c": (2, 3, 4, 6), "n": (2, 3, 4), "m": (2, 3)}
    convert = to_torch if framework == "torch" else (lambda x: x)
    arguments = dict(shapes) | change
    arguments = {n: np.zeros(x, np.float32) if isinstance(x, tuple) else x for n, x in arguments.items()}
    arguments = {n: convert(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    with pytest.raises(error, match=text):
        MODULES[framework].mlstm_step(**arguments, backend=backend)


def test_short_sequences_without_gradients(framework, backend):
    """Up to 16 tokens `mlstm_chunkwise` takes the form token by token by itself, unless it has a chunk size."""
    case = make_case(T=16, cotangents=()).but(return_last_states=True)
    convert = to_torch if framework == "torch" else (lambda x: x)
    arrays = {name: convert(x) for name, x in case.arrays.items()}

    def results(operator, **options):
        h, last = getattr(MODULES[framework], operator)(**arrays, return_last_states=True, backend=backend, **options)
        return {name: np.asarray(x) for name, x in zip(("h", *LAST), (h, *last), strict=True)}

    by_chunks = results("mlstm_chunkwise", chunk_size=16)
    assert by_chunks.keys() == results("mlstm_chunkwise").keys()
    if backend != "reference":
        by_tokens = results("mlstm_recurrent")
        same_bits(results("mlstm_chunkwise"), by_tokens)
        assert any(x.tobytes() != by_tokens[name].tobytes() for name, x in by_chunks.items())
