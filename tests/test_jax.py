"""The operator inside JAX's transformations, options static: the numbers of the plain call."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frontend_jax import mlstm_chunkwise, mlstm_step
from kernels_triton.backend import interpreting
from tests.support import LAST, make_case

CASE = make_case(B=2, H=1, T=17, K=4, V=4, states=False, cotangents=("h",), chunk_size=16)
ARRAYS = {name: jnp.asarray(x) for name, x in CASE.arrays.items()}
DH = jnp.asarray(CASE.cotangents["h"])


@pytest.fixture
def loss(backend):
    def loss(arrays):
        return jnp.sum(mlstm_chunkwise(**arrays, **CASE.options, backend=backend) * DH)

    return loss


def agree(got, expected):
    """To rounding: XLA may fuse what surrounds the kernels anew."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


@pytest.fixture
def plain(loss):
    value, pullback = jax.vjp(loss, ARRAYS)
    return value, pullback(jnp.ones(()))[0]


def test_jit_and_value_and_grad(loss, plain):
    agree(jax.jit(loss)(ARRAYS), plain[0])
    agree(jax.grad(loss)(ARRAYS), plain[1])
    agree(jax.value_and_grad(loss)(ARRAYS), plain)
    agree(jax.jit(jax.value_and_grad(loss))(ARRAYS), plain)


def test_checkpoint(loss, plain):
    agree(jax.jit(jax.value_and_grad(jax.checkpoint(loss)))(ARRAYS), plain)


def test_scan_over_layers(backend):
    """Three layers, each with its own scale of the queries, against a Python loop."""
    f = functools.partial(mlstm_chunkwise, **CASE.options, backend=backend)

    def layer(v, scale):
        return v + f(**{**ARRAYS, "q": ARRAYS["q"] * scale, "v": v}), None

    def scanned(v, scales):
        return jnp.sum(jax.lax.scan(layer, v, scales)[0] * DH)

    def looped(v, scales):
        for scale in scales:
            v, _ = layer(v, scale)
        return jnp.sum(v * DH)

    arguments = (ARRAYS["v"], jnp.asarray([0.5, 1.0, 2.0]))
    both = [jax.value_and_grad(g, argnums=(0, 1))(*arguments) for g in (jax.jit(scanned), looped)]
    agree(*both)


def test_options_are_static(backend):
    def f(arrays, eps, chunk_size):
        return mlstm_chunkwise(**arrays, eps=eps, chunk_size=chunk_size, backend=backend)

    static = jax.jit(f, static_argnames=("eps", "chunk_size"))
    agree(static(ARRAYS, eps=1e-2, chunk_size=16), f(ARRAYS, 1e-2, 16))
    with pytest.raises(TypeError, match="eps: expected a Python number, got .*Tracer"):
        jax.jit(f, static_argnames="chunk_size")(ARRAYS, eps=1e-2, chunk_size=16)


def test_numpy_arrays_are_taken(backend):
    f = functools.partial(mlstm_chunkwise, **CASE.options, backend=backend)
    np.testing.assert_array_equal(f(**CASE.arrays), f(**ARRAYS))


@pytest.mark.parametrize("wide", [False, True])
def test_numpy_gates_of_64_bits(backend, loss, plain, wide):
    """JAX makes float32 of them, traced (as arguments of grad) or not; with jax_enable_x64 they stay as they are."""
    gates = {name: CASE.arrays[name].astype(np.float64) for name in "if"}
    arrays = {**CASE.arrays, **gates}
    with jax.enable_x64(wide):
        value, gradients = jax.value_and_grad(loss)(arrays)
        assert {str(gradients[name].dtype) for name in "if"} == {"float64" if wide else "float32"}
        agree((value, gradients), plain)
        value, gradient = jax.value_and_grad(lambda q: loss({**arrays, "q": q}))(ARRAYS["q"])
        agree((value, gradient), (plain[0], plain[1]["q"]))
        agree(loss(arrays), plain[0])


SHARDED = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from frontend_jax import mlstm_chunkwise
from tests.support import make_case

assert len(jax.devices()) == 8
case = make_case(B=4, H=2, T=5, K=4, V=4, chunk_size=16, backend=sys.argv[1])
f = functools.partial(mlstm_chunkwise, **case.options)
arrays, shared = dict(case.arrays), {}
if sys.argv[2] == "one-gate":  # one input is the same on all devices: its gradient is summed over them
    arrays["i"] = arrays["i"][:1, :1] + np.zeros_like(arrays["i"])
    shared = {"i": arrays.pop("i")[:1, :1]}
cotangents = (case.cotangents["h"], tuple(case.cotangents[n] for n in ("c_last", "n_last", "m_last")))

def both(arrays, shared, cotangents):
    def call(arrays, shared):
        wide = {n: jnp.broadcast_to(x, arrays["f"].shape) for n, x in shared.items()}
        return f(**arrays, **wide)
    outputs, pullback = jax.vjp(call, arrays, shared)
    return outputs, pullback(cotangents)

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("batch", "heads"))
spec = P("batch", "heads")
sharded = jax.jit(jax.shard_map(
    both, mesh=mesh, in_specs=(spec, P(), spec), out_specs=(spec, (spec, P()))
))
got, expected = sharded(arrays, shared, cotangents), both(arrays, shared, cotangents)
jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, expected)
print("agree", len(jax.tree.leaves(got)))
"""


@pytest.mark.parametrize("inputs", ["all-sharded", "one-gate"])
def test_shard_map(backend, inputs):
    """Over batch and heads on eight host devices, with shard_map's own checks."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, backend, inputs],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "TRITON_INTERPRET": "1" if interpreting() else "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agree 12\n"


def test_donated_states(backend):
    """The option changes where the state is, not what it is; differentiable too."""
    case = make_case(T=1)
    step = functools.partial(mlstm_step, backend=backend)
    arrays = [jnp.asarray(x[:, :, 0] if n < 5 else x) for n, x in enumerate(case.arrays.values())]
    h, want = jax.jit(step)(*arrays)
    gradient = jax.grad(lambda c: step(*arrays[:5], c, *arrays[6:], donate_states=True)[0].sum())(arrays[5])
    assert np.array_equal(gradient, jax.grad(lambda c: step(*arrays[:5], c, *arrays[6:])[0].sum())(arrays[5]))
    donated = jax.jit(functools.partial(step, donate_states=True), donate_argnums=(5, 6, 7))
    h_donated, got = donated(*arrays)
    assert np.array_equal(h, h_donated)
    for x, y, name in zip(got, want, LAST, strict=True):
        assert np.array_equal(x, y), name


# Of a batch in front, in the middle, and of two; some arguments shared.
@pytest.mark.parametrize("in_axes", [0, 2, (0, 1)], ids=str)
def test_vmap(backend, in_axes):
    """Values and gradients of a loop; on the kernels the bits of one larger batch."""
    axes = in_axes if isinstance(in_axes, tuple) else (in_axes,)
    rng = np.random.default_rng(3)
    many = {"q": ARRAYS["q"], "k": ARRAYS["k"]}
    for axis in axes:
        many = {n: jnp.stack([x, x * rng.standard_normal(x.shape, np.float32)], axis) for n, x in many.items()}
    shared = {n: x for n, x in ARRAYS.items() if n not in many}

    def call(mapped):
        def loss(x):
            h = mlstm_chunkwise(**x, **shared, **CASE.options, backend=backend)
            return (h * DH).sum(), h

        gradients, h = jax.grad(loss, has_aux=True)(mapped)
        return {"h": h, **gradients}

    mapped = call
    for axis in axes:
        mapped = jax.vmap(mapped, in_axes=({"q": axis, "k": axis},))
    got = mapped(many)
    for place in np.ndindex(got["h"].shape[: len(axes)]):
        one = many
        for axis, n in zip(reversed(axes), place, strict=True):
            one = {name: jnp.take(x, n, axis) for name, x in one.items()}
        for name, x in call(one).items():
            if backend == "reference":
                np.testing.assert_allclose(got[name][place], x, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(got[name][place], x)


def test_vmap_of_packed_sequences(backend):
    arrays = {n: jnp.asarray(np.moveaxis(x[:1], 1, 2)) for n, x in CASE.arrays.items()}
    many = jnp.stack([arrays["q"], 2 * arrays["q"]])
    offsets = jnp.array([[0, 9, 19], [0, 0, 19]])

    def h(q, cu_seqlens):
        return mlstm_chunkwise(
            **{**arrays, "q": q}, layout="bthd", chunk_size=16, cu_seqlens=cu_seqlens, backend=backend
        )

    got = jax.vmap(h)(many, offsets)
    for n in range(2):
        np.testing.assert_allclose(got[n], h(many[n], offsets[n]), rtol=1e-5, atol=1e-6)
