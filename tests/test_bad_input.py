"""Bad input is named before anything is launched: argument, what was expected, what came; the same in both frontends."""

import numpy as np
import pytest
import torch

import frontend_jax
import frontend_torch
from kernels_triton.backend import interpreting
from tests.support import OPERATORS, make_case, to_torch

CASE = make_case(B=2, H=3, T=5, K=4, V=6)


def _zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def _without(*names):
    return dict.fromkeys(names)


# (what to change, the error, what its text says)
BAD = {
    "rank": ({"q": _zeros(2, 3, 5)}, ValueError, r"q: expected rank 4, \(B, H, T, K\), got shape \(2, 3, 5\)"),
    "gate-rank": ({"i": _zeros(2, 3)}, ValueError, r"i: expected rank 3, \(B, H, T\), got shape \(2, 3\)"),
    "keys": (
        {"k": _zeros(2, 3, 5, 8)},
        ValueError,
        r"k: expected shape \(B, H, T, K\) = \(2, 3, 5, 4\), got \(2, 3, 5, 8\)",
    ),
    "values": ({"v": _zeros(2, 3, 7, 6)}, ValueError, r"v: expected shape \(B, H, T, V\) = \(2, 3, 5, 6\), got"),
    "gates": ({"f": _zeros(2, 5, 3)}, ValueError, r"f: expected shape \(B, H, T\) = \(2, 3, 5\), got \(2, 5, 3\)"),
    "layout": ({"layout": "bthd", "i": _zeros(2, 5, 3)}, ValueError, r"i: expected shape \(B, T, H\) = \(2, 3, 5\)"),
    "c": ({"c_initial": _zeros(2, 3, 6, 4)}, ValueError, r"c_initial: expected shape \(B, H, K, V\) = \(2, 3, 4, 6\)"),
    "n": ({"n_initial": _zeros(2, 3, 6)}, ValueError, r"n_initial: expected shape \(B, H, K\) = \(2, 3, 4\), got"),
    "m": ({"m_initial": _zeros(3, 2)}, ValueError, r"m_initial: expected shape \(B, H\) = \(2, 3\) or \(B, H, 1\)"),
    "mixed-dtypes": (
        {"k": _zeros(2, 3, 5, 4, dtype="float16")},
        TypeError,
        r"k: expected the dtype of q, float32, got",
    ),
    "integers": ({"q": _zeros(2, 3, 5, 4, dtype="int32")}, TypeError, r"q: expected dtype float32 or .*, got int32"),
    "integer-gates": ({"i": _zeros(2, 3, 5, dtype="int32")}, TypeError, r"i: expected dtype .*, got int32"),
    "half-states": ({"n_initial": _zeros(2, 3, 4, dtype="float16")}, TypeError, r"n_initial: expected dtype float32"),
    "one-state-missing": (
        _without("m_initial"),
        ValueError,
        r"m_initial: expected all of c_initial, .* got only c_ini",
    ),
    "two-missing": (
        _without("c_initial", "m_initial"),
        ValueError,
        r"c_initial, m_initial: expected .* only n_initial",
    ),
    "input-gate": (
        {"input_gate": "relu"},
        ValueError,
        r"input_gate: expected one of 'exponential', 'sigmoid', got 're",
    ),
    "not-normalised": ({"normalize": False}, ValueError, r"normalize: expected True with input_gate='exponential'"),
    "normalise": ({"normalize": 1}, TypeError, r"normalize: expected a bool, got int"),
    "no-tokens": (
        {"q": _zeros(2, 3, 0, 4), "k": _zeros(2, 3, 0, 4), "v": _zeros(2, 3, 0, 6)}
        | {"i": _zeros(2, 3, 0), "f": _zeros(2, 3, 0)},
        ValueError,
        r"q: expected T >= 1, got T = 0",
    ),
    "wide-keys": (
        {"q": _zeros(2, 3, 5, 513), "k": _zeros(2, 3, 5, 513)},
        ValueError,
        r"q: expected 1 <= K <= 512, got",
    ),
    "wide-values": ({"v": _zeros(2, 3, 5, 513)}, ValueError, r"v: expected 1 <= V <= 512, got V = 513"),
    "no-keys": (
        {"q": _zeros(2, 3, 5, 0), "k": _zeros(2, 3, 5, 0)},
        ValueError,
        r"q: expected 1 <= K <= 512, got K = 0",
    ),
    "chunk-48": ({"chunk_size": 48}, ValueError, r"chunk_size: expected a power of two from 16 to 512, got 48"),
    "chunk-8": ({"chunk_size": 8}, ValueError, r"chunk_size: expected a power of two from 16 to 512, got 8"),
    "chunk-1024": ({"chunk_size": 1024}, ValueError, r"chunk_size: expected a power of two .*, got 1024"),
    "chunk-float": ({"chunk_size": 64.0}, TypeError, r"chunk_size: expected an int or None, got float"),
    "layout-name": ({"layout": "btdh"}, ValueError, r"layout: expected one of 'bhtd', 'bthd', got 'btdh'"),
    "mode-name": (
        {"normalizer_grad": "none"},
        ValueError,
        r"normalizer_grad: expected one of 'exact', 'detached', got",
    ),
    "precision-name": ({"precision": "high"}, ValueError, r"precision: expected one of 'ieee', .*, got 'high'"),
    "backend-name": ({"backend": "cuda"}, ValueError, r"backend: expected one of 'triton', .*, got 'cuda'"),
    "eps-negative": ({"eps": -1e-6}, ValueError, r"eps: expected a finite number >= 0.0, got -1e-06"),
    "eps-kind": ({"eps": "small"}, TypeError, r"eps: expected a Python number, got str"),
    "scale": ({"qk_scale": float("nan")}, ValueError, r"qk_scale: expected a finite number, got nan"),
    "eps-huge": ({"eps": 10**400}, ValueError, r"eps: expected a finite number, got an integer beyond all floats"),
    "flag": ({"return_last_states": "no"}, TypeError, r"return_last_states: expected a bool, got str"),
    "backend-kind": ({"backend": [1, 2]}, ValueError, r"backend: expected one of 'triton', .*, got \[1, 2\]"),
    "no-q": ({"q": None}, TypeError, r"q: expected an array, got None"),
    "no-gates": ({"f": None}, TypeError, r"f: expected an array, got None"),
    "triton-on-cpu": ({"backend": "triton"}, ValueError, r"backend: 'triton' expected arrays on a CUDA or ROCm device"),
}
if not interpreting():
    text = r"backend: 'interpret' expected TRITON_INTERPRET=1 in the environment before Python starts"
    BAD["interpret-not-set"] = ({"backend": "interpret"}, ValueError, text)


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    """Any execution of a plan, or of the reference, is a failure."""

    def launched(*_, **__):
        raise AssertionError("something was executed")

    for name in (
        "frontend_torch.adapter.run",
        "frontend_torch.library.run",
        "frontend_jax.operator.run_batched",
        "kernels_triton.reference.chunkwise",
        "kernels_triton.reference.recurrent",
    ):
        monkeypatch.setattr(name, launched)


def _call(framework, changes):
    arguments = {**CASE.arrays, **changes}
    if framework == "torch":
        arguments = {n: to_torch(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    return OPERATORS[framework](**arguments)


@pytest.mark.parametrize("framework", OPERATORS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(framework, name):
    changes, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        _call(framework, changes)


@pytest.mark.parametrize("framework, kind", [("torch", r"torch\.Tensor"), ("jax", r"jax\.Array")])
def test_not_an_array(framework, kind):
    with pytest.raises(TypeError, match=rf"v: expected a {kind}, got list"):
        _call(framework, {"v": [1.0, 2.0]})


def test_mixed_devices():
    with pytest.raises(ValueError, match=r"f: expected the device of q, cpu, got meta"):
        _call("torch", {"f": torch.zeros(2, 3, 5, device="meta")})


@pytest.mark.parametrize("kind", ["sparse", "numpy"])
def test_not_a_dense_tensor(kind):
    q = to_torch(CASE.arrays["q"]).to_sparse() if kind == "sparse" else CASE.arrays["q"]
    text = "a dense tensor, got layout torch.sparse_coo" if kind == "sparse" else "a torch.Tensor, got ndarray"
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "numpy"), pytest.raises(TypeError) as error:
        OPERATORS["torch"](**{n: to_torch(x) for n, x in CASE.arrays.items()} | {"q": q})
    assert f"q: expected {text}" in str(error.value)


@pytest.mark.parametrize(
    "out, text",
    [
        (5, "out_states: expected three tensors, c, n and m, got int"),
        ((torch.zeros(2, 3, 4, 6), None, torch.zeros(2, 3)), r"out_states\[1\]: expected an array, got None"),
        ((None, torch.zeros(2, 3, 4), torch.zeros(2, 3)), r"out_states\[0\]: expected an array, got None"),
    ],
)
def test_bad_out_states(out, text):
    arrays = [to_torch(x) for x in CASE.arrays.values()]
    token = [x[:, :, 0] for x in arrays[:5]]
    with pytest.raises(TypeError, match=text):
        frontend_torch.mlstm_step(*token, *arrays[5:], out_states=out)


@pytest.mark.parametrize("kind", ["nested", "quantised"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # PyTorch's own, of both kinds
def test_another_kind_of_memory(kind):
    v = to_torch(CASE.arrays["v"])
    v = torch.nested.nested_tensor(list(v)) if kind == "nested" else torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=f"v: expected a dense tensor, got a {kind} one"):
        OPERATORS["torch"](**{n: to_torch(x) for n, x in CASE.arrays.items()} | {"v": v})


def step_arguments():
    arrays = [to_torch(x).clone() for x in make_case(B=1, H=1, T=1, K=4, V=4).arrays.values()]
    return [x.squeeze(2) if n < 5 else x for n, x in enumerate(arrays)]


def memory(*sizes):
    """Tensors of (1, 1, ...) that start at these places of one piece of memory."""
    whole = torch.zeros(64)
    return [whole[start : start + size] for start, size in sizes]


OVERLAPS = {  # out_states' places in one piece of memory, and the text
    "n-in-c": ((0, 16), (12, 4), (20, 1), r"out_states\[1\]: expected memory of its own, .* also out_states\[0\]'s"),
    "m-in-n": ((0, 16), (16, 4), (19, 1), r"out_states\[2\]: expected memory of its own, .* also out_states\[1\]'s"),
    "m-in-c": ((1, 16), (17, 4), (1, 1), r"out_states\[2\]: expected memory of its own, .* also out_states\[0\]'s"),
}


@pytest.mark.parametrize("c, n, m, text", OVERLAPS.values(), ids=OVERLAPS)
def test_out_states_that_share_memory(c, n, m, text):
    c, n, m = memory(c, n, m)
    out = c.view(1, 1, 4, 4), n.view(1, 1, 4), m.view(1, 1)
    for _ in range(2):  # the second time the step is a settled one
        with pytest.raises(ValueError, match=text):
            frontend_torch.mlstm_step(*step_arguments(), out_states=out)


def test_out_states_that_share_memory_with_inputs():
    arguments = step_arguments()
    whole = torch.zeros(64)
    arguments[5] = whole[:16].view(1, 1, 4, 4)
    out = [torch.zeros_like(x) for x in arguments[5:]]
    for place, text in ((4, "c"), (0, None), (16, None)):
        out[0] = whole[place : place + 16].view(1, 1, 4, 4)
        if text:
            with pytest.raises(ValueError, match=rf"out_states\[0\]: expected memory of its own, .* also {text}'s"):
                frontend_torch.mlstm_step(*arguments, out_states=tuple(out), backend="reference")
        else:
            with pytest.raises(AssertionError, match="something was executed"):
                frontend_torch.mlstm_step(*arguments, out_states=tuple(out), backend="reference")
    whole = torch.zeros(8)
    arguments[0], out[0], out[1] = whole[:4].view(1, 1, 4), torch.zeros(1, 1, 4, 4), whole[2:6].view(1, 1, 4)
    with pytest.raises(ValueError, match=r"out_states\[1\]: expected memory of its own, .* also q's"):
        frontend_torch.mlstm_step(*arguments, out_states=tuple(out))


@pytest.mark.parametrize("module", [frontend_torch, frontend_jax])
@pytest.mark.parametrize("ids, got", [([0, 0, 1], "list"), (None, "NoneType"), ([0.0, 1.0], "dtype")])
def test_bad_document_ids(module, ids, got):
    if got == "dtype":
        ids = torch.tensor(ids) if module is frontend_torch else np.array(ids, np.float32)
    with pytest.raises(TypeError, match=f"ids: expected .*, got {got}"):
        module.cu_seqlens_from_document_ids(ids)


def test_bad_chunk_table():
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to T = 9, got 5 to 99"):
        frontend_torch.make_chunk_table(torch.tensor([5, 3, 99]), 9, 16)
    with pytest.raises(ValueError, match="backend: expected one of 'triton'"):
        frontend_torch.make_chunk_table(torch.tensor([0, 9]), 9, 16, backend="x")


def test_the_case_itself_is_good():
    with pytest.raises(AssertionError, match="something was executed"):
        _call("torch", {"backend": "reference"})
