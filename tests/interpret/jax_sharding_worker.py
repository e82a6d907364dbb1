"""Sharding on eight devices of a CPU, which must be asked for before JAX starts: run by test_jax_sharding.py."""

import functools
import os
import re

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # LLVM's, a third of this process's time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ |= {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frontend_jax.operator
import frontend_jax.recurrent
import frontend_jax.sharding
from frontend_jax import mlstm_chunkwise, mlstm_recurrent

COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
MESH = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
TOKENS = ["q", "k", "v", "i", "f", "h", "dq", "dk", "dv", "di", "df", "dh"]


def axes(name, bthd, packed):
    """Where batch and heads are, written down a second time."""
    if name in ("cu_seqlens", "chunks"):
        return ()
    heads = 2 if bthd and name in TOKENS else 1
    return (heads,) if packed else (0, heads)


def stand_in(bthd, packed):
    """For the execution of a pass: integers of all inputs that keep batch and heads apart, in plain JAX.

    Triton needs a GPU, and the interpreter is a callback, which JAX does not partition.
    """

    def run(program, arrays, backend):
        total = 0
        for n, name in enumerate(program.inputs):
            x, kept = arrays[name], axes(name, bthd, packed)
            if kept:
                others = tuple(axis for axis in range(x.ndim) if axis not in kept)
                total += (n + 1) * jnp.round(8 * x).astype(jnp.int32).sum(others) % 97
        results = {}
        for n, name in enumerate(program.results):
            spec = program.spec(name)
            kept = axes(name, bthd, packed)
            shape = [size if axis in kept else 1 for axis, size in enumerate(spec.shape)]
            values = total.reshape(shape) if kept else jnp.zeros(shape, jnp.int32)
            for axis, size in enumerate(spec.shape):
                if axis not in kept:
                    values += jnp.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
            results[name] = (values + n).astype(spec.dtype)
        return results

    return run


def draw(B, bthd=False, states=True, T=19):
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((B, 2, T, *dims)).astype(np.float32) for dims in ((4,), (4,), (5,), (), ())]
    tokens = [np.ascontiguousarray(x.swapaxes(1, 2)) if bthd else x for x in tokens]
    shapes = ((4, 5), (4,), ()) if states else ()
    return tokens + [rng.standard_normal((B, 2, *dims)).astype(np.float32) for dims in shapes]


def spec(n, bthd):
    return P("batch", None, "heads") if bthd and n < 5 else P("batch", "heads")


def both(function, arrays, cotangents):
    """Outputs and gradients."""
    outputs, pull = jax.vjp(function, *arrays)
    return outputs, pull(cotangents)


def split(function, arrays, specs, communicates=False):
    """Outputs and gradients on all devices and on one; checks that the devices exchange nothing."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(function, *arrays)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)
    placed = [jax.device_put(x, NamedSharding(MESH, s)) for x, s in zip(arrays, specs, strict=True)]
    by_output = (specs[0], (P("batch", "heads"),) * 3)
    if cotangents[0].shape[0] == 1:
        by_output = (specs[0], (P(None, "heads"),) * 3)
    placed_cotangents = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(MESH, s)), cotangents, by_output)
    compiled = jax.jit(functools.partial(both, function)).lower(placed, placed_cotangents).compile()
    found = set(re.findall(COLLECTIVES, compiled.as_text()))
    assert bool(found) == communicates, found
    got = compiled(placed, placed_cotangents)
    if not communicates:
        wanted = jax.tree.leaves((by_output, tuple(specs)), is_leaf=lambda s: isinstance(s, P))
        for x, s in zip(jax.tree.leaves(got), wanted, strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(MESH, s), x.ndim), (x.sharding, s)
    return got, jax.jit(functools.partial(both, function))(arrays, cotangents)


def equal(pair, tolerance=0):
    for x, y in zip(*map(jax.tree.leaves, pair), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)


def kernels(bthd, packed=False):
    """From here on the kernels' passes are executed by the stand-in."""
    frontend_jax.sharding.run = stand_in(bthd, packed)
    for module in (frontend_jax.operator, frontend_jax.recurrent):
        module.choose_backend = lambda *_: "triton"


def partitioned():
    for bthd in (False, True):
        layout = "bthd" if bthd else "bhtd"
        kernels(bthd)
        for states in (True,) if bthd else (False, True):
            function = functools.partial(mlstm_chunkwise, layout=layout, chunk_size=16, return_last_states=True)
            arrays = draw(4, bthd, states)
            equal(split(function, arrays, [spec(n, bthd) for n in range(len(arrays))]))
        function = functools.partial(mlstm_recurrent, layout=layout, return_last_states=True)
        equal(split(function, draw(4, bthd, T=1), [spec(n, bthd) for n in range(8)]))
        # Over time nothing can be split: gathered first.
        function = functools.partial(mlstm_chunkwise, layout=layout, chunk_size=16, return_last_states=True)
        time = [P(None, "batch") if bthd else P(None, None, "batch")] * 5 + [P(None, "heads")] * 3
        equal(split(function, draw(4, bthd, T=20), time, communicates=True))


def mapped():
    """A mapped axis joins the batch, split or not."""
    kernels(False)

    def function(*arrays):
        return jax.vmap(functools.partial(mlstm_chunkwise, chunk_size=16))(*arrays)

    arrays = [np.stack([x, 2 * x, 3 * x, 4 * x]) for x in draw(1, states=False)]
    placed = [jax.device_put(x, NamedSharding(MESH, P("batch", None, "heads"))) for x in arrays]
    compiled = jax.jit(function).lower(*placed).compile()
    assert not re.findall(COLLECTIVES, compiled.as_text())
    equal((compiled(*placed), jax.jit(function)(*arrays)))


def packed():
    kernels(True, packed=True)
    offsets = jnp.array([0, 7, 19], jnp.int32)

    def function(*arrays):
        return mlstm_chunkwise(*arrays, layout="bthd", chunk_size=16, cu_seqlens=offsets, return_last_states=True)

    tokens, states = draw(1, True)[:5], draw(2)[5:]
    equal(split(function, tokens + states, [P(None, None, "heads")] * 5 + [P(None, "heads")] * 3))


def reference():
    function = functools.partial(
        mlstm_chunkwise, layout="bthd", chunk_size=16, backend="reference", return_last_states=True
    )
    equal(split(function, draw(4, True), [spec(n, True) for n in range(8)]), 1e-4)


def interpreted():
    """Without shard_map the interpreter runs in one place; what it gives is right."""
    function = functools.partial(mlstm_chunkwise, chunk_size=16, backend="interpret", return_last_states=True)
    equal(split(function, draw(4), [spec(n, False) for n in range(8)], communicates=True))


if __name__ == "__main__":
    for check in (reference, interpreted, partitioned, mapped, packed):  # kernels() lasts: those last
        check()
        print(check.__name__, "ok", flush=True)
