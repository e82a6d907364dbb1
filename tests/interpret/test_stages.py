"""The documented stage functions: the operator's detached gradients, in both frontends to the bit."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import frontend_jax.stages
import frontend_torch.stages
from frontend_torch import mlstm_chunkwise
from kernels_triton import stages

B, H, T, K, V, L = 1, 2, 70, 24, 40, 32
NT = -(-T // L)
PADDED = NT * L
GENERATOR = torch.Generator().manual_seed(3)


def _random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR).to(dtype)


class Call:
    """One forward pass with its inputs, cotangents and the operator's own results."""

    def __init__(self, dtype):
        q, k = _random(B, H, T, K, dtype=dtype), _random(B, H, T, K, dtype=dtype)
        v, self.dh = _random(B, H, T, V, dtype=dtype), _random(B, H, T, V, dtype=dtype)
        i, f = _random(B, H, T), _random(B, H, T) + 2
        self.arrays = (q, k, v, i, f, _random(B, H, K, V), _random(B, H, K), _random(B, H))
        self.dc_last = _random(B, H, K, V)

    def gradients(self, with_last):
        leaves = [x.clone().requires_grad_() for x in self.arrays]
        options = {"return_last_states": True, "chunk_size": L, "normalizer_grad": "detached", "backend": "interpret"}
        h, (c, _, _) = mlstm_chunkwise(*leaves, **options)
        return torch.autograd.grad([h, c] if with_last else [h], leaves, [self.dh, self.dc_last][: 1 + with_last])


def chunked(x, fill):
    """(B, H, T) -> (B, H, NT, L); what stands beyond T must not matter."""
    tail = torch.full((B, H, PADDED - T), fill)
    return torch.cat([x, tail], -1).reshape(B, H, NT, L)


def close(x, y, tolerance):
    x, y = x.double(), y.double()
    assert torch.linalg.norm(x - y) <= tolerance * torch.linalg.norm(y)


def to_jax(x):
    if not isinstance(x, torch.Tensor):
        return x
    return jnp.asarray(x.float().numpy(), dtype=str(x.dtype).removeprefix("torch."))


def in_both(name, *args, **kwargs):
    """The stage through torch, after checking that JAX gives the same bits."""
    ours = getattr(frontend_torch.stages, name)(*args, **kwargs)
    theirs = getattr(frontend_jax.stages, name)(*map(to_jax, args), **{n: to_jax(x) for n, x in kwargs.items()})

    def check(x, y):
        if isinstance(x, tuple):
            assert len(x) == len(y)
            for a, b in zip(x, y, strict=True):
                check(a, b)
        elif x is None:
            assert y is None
        else:
            assert x.shape == y.shape
            assert str(x.dtype).removeprefix("torch.") == y.dtype.name
            assert np.array_equal(x.float().numpy(), np.asarray(y.astype("float32")))

    check(ours, theirs)
    return ours


# float32: the stages see rounded m and log-sigmoid, not the pairs; bfloat16: such differences can cross a rounding.
@pytest.fixture(params=[(torch.float32, 2e-6), (torch.bfloat16, 2e-3)], ids=["float32", "bfloat16"])
def call(request):
    dtype, tolerance = request.param
    return Call(dtype), tolerance


def test_stages_compose_to_the_operator(call):
    case, tolerance = call
    q, k, v, i, f, c0, n0, m0 = case.arrays
    h, d, m, last, (cs, ns, ms) = in_both(
        "_mlstm_chunkwise_fw", *case.arrays, return_last_states=True, return_all_states=True, chunk_size=L
    )
    options = {"chunk_size": L, "backend": "interpret"}
    expected, states = mlstm_chunkwise(*case.arrays, return_last_states=True, **options)
    # A stage hands on every chunk's state with its float32 stabiliser; the operator the last one alone.
    for x, y in zip((h, *last), (expected, *states), strict=True):
        close(x, y, tolerance)
    assert (cs.shape, ns.shape, ms.shape) == ((B, H, NT * K, V), (B, H, NT * K), (B, H, NT + 1))
    assert (d.shape, m.shape) == ((B, H, T), (B, H, T))

    log_f, i_chunks = chunked(torch.nn.functional.logsigmoid(f), float("nan")), chunked(i, float("nan"))
    sizes = {"chunk_size": L, "num_chunks": NT}
    cs2, ns2, ms2, c_last, n_last = in_both(
        "_mlstm_chunkwise__recurrent_fw_C", k, v, i_chunks, log_f, c0, n0, m0, **sizes
    )
    for x, y in ((cs2, cs), (ns2, ns), (ms2, ms), (c_last, last[0]), (n_last, last[1])):
        close(x, y, tolerance)

    dq, dk, dv, _, _, dc0, _, _ = case.gradients(with_last=True)
    dcs, dc_first = in_both(
        *("_mlstm_chunkwise__recurrent_bw_dC", q, log_f, ms, m, d, case.dh, case.dc_last),
        store_initial_state=True,
        **sizes,
    )
    assert dcs.shape == (B, H, NT * K, V)
    close(dc_first, dc0, tolerance)
    close(dcs.reshape(B, H, NT, K, V)[:, :, -1], case.dc_last, 2.0**-8 if dcs.dtype == torch.bfloat16 else 1e-7)
    assert in_both("_mlstm_chunkwise__recurrent_bw_dC", q, log_f, ms, m, d, case.dh, **sizes)[1] is None

    gradients = in_both(
        "_mlstm_chunkwise__parallel_bw_dQKV", q, k, v, i_chunks, log_f, m, ms, cs, case.dh, d, dcs, **sizes
    )
    for x, y in zip(gradients, (dq, dk, dv), strict=True):
        close(x, y, tolerance)


@pytest.mark.parametrize("given", [True, False], ids=["states-given", "states-recomputed"])
@pytest.mark.parametrize("with_last", [True, False], ids=["dC_last", "no-dC_last"])
def test_whole_backward(call, given, with_last):
    case, tolerance = call
    saved = {}
    if given:
        _, d, m, _, (cs, _, ms) = frontend_torch.stages._mlstm_chunkwise_fw(
            *case.arrays, return_all_states=True, chunk_size=L
        )
        saved = {"matC_states": cs, "scaM_states": ms, "vecN_out": d, "vecM_out": m}
    last = case.dc_last if with_last else None
    gradients = in_both(
        "_mlstm_chunkwise_bw", *case.arrays, matDeltaH=case.dh, matDeltaC_last=last, chunk_size=L, **saved
    )
    assert len(gradients) == 8
    expected = case.gradients(with_last)
    for x, y in zip(gradients[:6], expected[:6], strict=True):
        close(x, y, tolerance)
    assert not gradients[6].any()
    assert not gradients[7].any()


def test_no_initial_state():
    case = Call(torch.float32)
    gradients = in_both("_mlstm_chunkwise_bw", *case.arrays[:5], matDeltaH=case.dh, chunk_size=L)
    assert gradients[5:] == (None, None, None)
    assert all(x.isfinite().all() for x in gradients[:5])


SEED_SIGNATURES = {
    "_mlstm_chunkwise__recurrent_bw_dC": "matQ, vecF, scaM_inter, vecM, vecN_out, matDeltaH, matDeltaC_last=None, "
    "qk_scale=None, chunk_size=64, num_chunks=1, store_initial_state=False",
    "_mlstm_chunkwise__parallel_bw_dQKV": "matQ, matK, matV, vecI, vecF, vecM_combine, scaM_inter, matC_states, "
    "matDeltaH, vecN_out, matDeltaC_states, qk_scale=None, chunk_size=64, num_chunks=1",
    "_mlstm_chunkwise_bw": "matQ, matK, matV, vecI, vecF, matC_initial=None, vecN_initial=None, scaM_initial=None, "
    "qk_scale=None, matC_states=None, scaM_states=None, vecN_out=None, vecM_out=None, matDeltaH=None, "
    "matDeltaC_last=None, chunk_size=64",
}


@pytest.mark.parametrize("module", [frontend_torch.stages, frontend_jax.stages], ids=["torch", "jax"])
@pytest.mark.parametrize("name", SEED_SIGNATURES)
def test_documented_signatures(module, name):
    parameters = inspect.signature(getattr(module, name)).parameters.values()
    shown = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
    assert shown == SEED_SIGNATURES[name]


@pytest.mark.parametrize("module", [frontend_torch.stages, frontend_jax.stages], ids=["torch", "jax"])
def test_bad_stage_input(module):
    case = Call(torch.float32)
    convert = to_jax if module is frontend_jax.stages else lambda x: x
    q, k, v, i, f = map(convert, case.arrays[:5])
    dh = convert(case.dh)
    with pytest.raises(TypeError, match=r"matDeltaH: expected an array, got None"):
        module._mlstm_chunkwise_bw(q, k, v, i, f)
    with pytest.raises(ValueError, match=r"num_chunks: expected ceil\(T / chunk_size\) = 3, got 1"):
        module._mlstm_chunkwise__recurrent_fw_C(k, v, i, f, chunk_size=L)
    with pytest.raises(ValueError, match=r"vecN_out: expected shape \(B, H, T\) = \(1, 2, 70\), got \(1, 2, 70, 40\)"):
        module._mlstm_chunkwise_bw(q, k, v, i, f, matDeltaH=dh, vecN_out=dh, chunk_size=L)
    with pytest.raises(ValueError, match=r"chunk_size: expected a power of two from 16 to 512, got 48"):
        module._mlstm_chunkwise_bw(q, k, v, i, f, matDeltaH=dh, chunk_size=48)


# Each stage's arguments that are arrays: what a stage takes.
STAGE_ARRAYS = {
    "_mlstm_chunkwise_fw": "matQ matK matV vecI vecF matC_initial vecN_initial scaM_initial",
    "_mlstm_chunkwise__recurrent_fw_C": "matK matV vecI vecF matC_initial vecN_initial scaM_initial",
    "_mlstm_chunkwise__recurrent_bw_dC": "matQ vecF scaM_inter vecM vecN_out matDeltaH matDeltaC_last",
    "_mlstm_chunkwise__parallel_bw_dQKV": (
        "matQ matK matV vecI vecF vecM_combine scaM_inter matC_states matDeltaH vecN_out matDeltaC_states"
    ),
    "_mlstm_chunkwise_bw": (
        "matQ matK matV vecI vecF matC_initial vecN_initial scaM_initial matC_states scaM_states vecN_out vecM_out "
        "matDeltaH matDeltaC_last"
    ),
}
SIZES = {"B": B, "H": H, "T": T, "K": K, "V": V, "NT": NT, "BT": L, "NT + 1": NT + 1, "NT * K": NT * K}


def stage_call(module, name):
    """A stage function, and good arguments for it."""
    make = torch.zeros if module is frontend_torch.stages else jnp.zeros
    chunks = "recurrent" in name or "parallel" in name
    shapes = stages.SHAPES | (dict.fromkeys(stages.GATES, stages.CHUNKED) if chunks else {})
    names = STAGE_ARRAYS[name].split()
    arrays = {x: make(tuple(SIZES[y] for y in shapes[x].split(", "))) for x in names}
    return getattr(module, name), arrays | {"chunk_size": L} | ({"num_chunks": NT} if chunks else {})


@pytest.mark.parametrize("name", STAGE_ARRAYS)
@pytest.mark.parametrize("module", [frontend_torch.stages, frontend_jax.stages], ids=["torch", "jax"])
def test_every_argument_of_a_stage_is_checked(module, name, monkeypatch):
    """Its kind, rank, shape, dtype and device, by its name, before anything runs."""

    def launched(*_, **__):
        raise AssertionError("something was executed")

    monkeypatch.setattr(module, "run", launched)
    function, good = stage_call(module, name)
    with pytest.raises(AssertionError, match="something was executed"):
        function(**good)
    for argument in STAGE_ARRAYS[name].split():
        x = good[argument]
        integers = x.to(torch.int32) if module is frontend_torch.stages else x.astype(jnp.int32)
        bad = [("x", TypeError), (integers, TypeError), (x[0], ValueError), (x[..., :-1], ValueError)]
        if module is frontend_torch.stages:
            bad += [(x.to("meta"), ValueError), (x.to_sparse(), TypeError)]
        if argument not in ("matQ", "matK", "matV", "vecI", "vecF"):
            bad += [] if "matC_initial" not in good or "initial" not in argument else [(None, ValueError)]
        elif argument != "matK" or "matQ" in good:
            bad.append((None, TypeError))
        for y, kind in bad:
            with pytest.raises(kind) as error:
                function(**good | {argument: y})
            # The others are not like the first: then one of them is named.
            named = [argument] if argument not in ("matQ", "matK", "matV", "matDeltaH") else list(good)
            assert any(f"{z}: expected" in str(error.value) for z in named), (argument, error.value)


@pytest.mark.parametrize("module", [frontend_torch.stages, frontend_jax.stages], ids=["torch", "jax"])
@pytest.mark.parametrize(
    "name, option, value, kind",
    [
        ("_mlstm_chunkwise_fw", "qk_scale", "x", TypeError),
        ("_mlstm_chunkwise_fw", "eps", -1.0, ValueError),
        ("_mlstm_chunkwise_fw", "return_last_states", 1, TypeError),
        ("_mlstm_chunkwise_fw", "return_all_states", "yes", TypeError),
        ("_mlstm_chunkwise__recurrent_fw_C", "num_chunks", float(NT), TypeError),
        ("_mlstm_chunkwise__recurrent_bw_dC", "store_initial_state", 1, TypeError),
        ("_mlstm_chunkwise__recurrent_bw_dC", "qk_scale", float("nan"), ValueError),
        ("_mlstm_chunkwise__parallel_bw_dQKV", "num_chunks", True, TypeError),
        ("_mlstm_chunkwise_bw", "chunk_size", None, TypeError),
    ],
)
def test_every_option_of_a_stage_is_checked(module, name, option, value, kind):
    function, good = stage_call(module, name)
    with pytest.raises(kind, match=f"^{option}: expected"):
        function(**good | {option: value})


def test_a_cotangent_without_memory_or_with_flipped_signs():
    case = Call(torch.float32)
    backward = frontend_torch.stages._mlstm_chunkwise_bw
    expected = backward(*case.arrays[:5], matDeltaH=-case.dh, chunk_size=L)
    got = backward(*case.arrays[:5], matDeltaH=torch._neg_view(case.dh), chunk_size=L)
    assert all(map(torch.equal, got[:5], expected[:5]))
    nothing = backward(*case.arrays[:5], matDeltaH=torch._efficientzerotensor(case.dh.shape), chunk_size=L)
    assert not any(x.any() for x in nothing[:5])
