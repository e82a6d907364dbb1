"""Arrays whose types carry their sharding, `jax.make_mesh`'s default, on eight devices: run by test_jax_sharding.py."""

import functools
import re
from pathlib import Path

from tests.interpret.jax_sharding_worker import COLLECTIVES, both, draw, equal, kernels  # sets the environment first

import jax  # isort: skip
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import frontend_jax
from frontend_jax import make_chunk_table, mlstm_chunkwise, mlstm_recurrent, mlstm_step

MESH = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
TIGHT = {"reference": 1e-4, "interpret": 0.0, "triton": 0.0}


def split(function, arrays, tokens, states, backend, h=None, last=True, communicates=False):
    """Outputs and gradients, their shardings, and that devices exchange nothing. h: its spec, if not that of tokens."""
    function = functools.partial(function, backend=backend, **({"return_last_states": True} if last else {}))
    specs = [tokens if n < 5 else states for n in range(len(arrays))]
    wanted = (tokens if h is None else h, (states,) * 3)
    shapes = jax.eval_shape(function, *arrays)
    rng = np.random.default_rng(1)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)

    def place(x, s):
        return jax.device_put(x, NamedSharding(MESH, s))

    placed = [place(x, s) for x, s in zip(arrays, specs, strict=True)], jax.tree.map(place, cotangents, wanted)
    program = jax.jit(functools.partial(both, function))
    compiled = program.lower(*placed).compile()
    found = set(re.findall(COLLECTIVES, compiled.as_text()))
    assert bool(found) == communicates, found
    got = compiled(*placed)
    for x, s in zip(jax.tree.leaves(got), jax.tree.leaves((wanted, tuple(specs))), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(MESH, s), x.ndim), (x.sharding, s)
    for x, typed in zip(jax.tree.leaves(got), jax.tree.leaves(jax.eval_shape(program, *placed)), strict=True):
        assert typed.sharding.spec == x.sharding.spec, (typed, x.sharding)  # also what tracing says of it
    equal((got, program(arrays, cotangents)), TIGHT[backend])


def one(arrays):
    return [np.ascontiguousarray(x[:, :, 0]) if n < 5 else x for n, x in enumerate(arrays)]


def every_form(backend):
    both_axes = P("batch", "heads")
    chunkwise = functools.partial(mlstm_chunkwise, chunk_size=16)
    bthd = functools.partial(chunkwise, layout="bthd")
    split(chunkwise, draw(4, states=False), both_axes, both_axes, backend)
    split(bthd, draw(4, bthd=True), P("batch", None, "heads"), both_axes, backend)
    split(chunkwise, draw(4), P("batch"), P("batch"), backend)
    split(mlstm_recurrent, draw(4, T=3), P(None, "heads"), P(None, "heads"), backend)
    split(mlstm_step, one(draw(4)), both_axes, both_axes, backend, last=False)


def packed(backend):
    function = functools.partial(mlstm_chunkwise, layout="bthd", chunk_size=16, cu_seqlens=np.array([0, 7, 19]))
    split(function, draw(1, bthd=True)[:5] + draw(2)[5:], P(None, None, "heads"), P(None, "heads"), backend)


def chunk_table(backend):
    """Of offsets on the mesh; each device has all of it."""
    tokens = draw(1, bthd=True)[:5]
    placed = [jax.device_put(x, NamedSharding(MESH, P(None, None, "heads"))) for x in tokens]
    offsets = np.array([0, 7, 19], np.int32)
    everywhere = jax.device_put(offsets, NamedSharding(MESH, P()))
    function = functools.partial(mlstm_chunkwise, layout="bthd", chunk_size=16, backend=backend)
    for make in (make_chunk_table, jax.jit(make_chunk_table, static_argnums=(1, 2), static_argnames="backend")):
        table = make(everywhere, 19, 16, backend=backend)
        for given in ({"cu_seqlens": everywhere}, {}):
            h = function(*placed, **given, chunk_table=table)
            assert h.sharding.is_equivalent_to(placed[0].sharding, 4), h.sharding
            equal((h, function(*tokens, cu_seqlens=offsets)), TIGHT[backend])


def gathered(backend):
    """Split over tokens: gathered, and the gradients are split as the arguments are."""
    heads = P(None, "heads")
    options = {"h": heads, "communicates": True}
    split(
        functools.partial(mlstm_chunkwise, chunk_size=16),
        draw(4, T=8),
        P(None, "heads", "batch"),
        heads,
        backend,
        **options,
    )


def eager(backend):
    """Without jit; q split and all others not; nothing on the mesh but in its context."""
    function = functools.partial(mlstm_chunkwise, chunk_size=16, backend=backend)
    arrays = draw(4)
    q = jax.device_put(arrays[0], NamedSharding(MESH, P("batch", "heads")))
    expected = function(*arrays)
    for h in (function(q, *arrays[1:]), jax.jit(lambda q: function(q, *arrays[1:]))(q)):
        assert h.sharding.is_equivalent_to(q.sharding, 4), h.sharding
        equal((h, expected), TIGHT[backend])
    with jax.set_mesh(MESH):
        equal((function(*arrays), expected), TIGHT[backend])


def reference():
    for check in (every_form, packed, chunk_table, gathered, eager):
        check("reference")
    # Some axes of the mesh explicit, some left to the partitioner.
    mixed = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto, AxisType.Explicit))
    arrays = draw(4)
    placed = [jax.device_put(x, NamedSharding(mixed, P("batch", "heads"))) for x in arrays]
    loss = jax.jit(jax.grad(lambda *x: mlstm_chunkwise(*x, chunk_size=16, backend="reference").sum()))
    got = loss(*placed)
    assert got.sharding.is_equivalent_to(placed[0].sharding, 4), got.sharding
    equal((got, loss(*arrays)), TIGHT["reference"])


def interpreted():
    for check in (every_form, packed, chunk_table, gathered, eager):
        check("interpret")
    arrays = [jax.device_put(x, NamedSharding(MESH, P("batch", "heads"))) for x in draw(4)]
    try:
        jax.jvp(lambda q: mlstm_chunkwise(q, *arrays[1:], backend="interpret"), arrays[:1], arrays[:1])
    except TypeError as error:
        assert "mlstm_chunkwise: expected reverse mode" in str(error), error
    else:
        raise AssertionError("no error")


def compiled():
    """As on a GPU, but for the kernels themselves."""
    kernels(False)
    split(
        functools.partial(mlstm_chunkwise, chunk_size=16), draw(4), P("batch", "heads"), P("batch", "heads"), "triton"
    )


def readme():
    """Its lines on sharding, as written; h is split as q is."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.S) if "NamedSharding(" in x)
    tokens = dict(zip("qkvif", draw(4, states=False), strict=True))
    names = {**tokens, "jax": jax, "NamedSharding": NamedSharding, "PartitionSpec": P}
    names |= {"mlstm_chunkwise": frontend_jax.mlstm_chunkwise}
    exec(code, names)
    assert names["h"].sharding.is_equivalent_to(names["sharding"], 4), names["h"].sharding
    equal((names["h"], mlstm_chunkwise(**tokens)), 1e-4)


if __name__ == "__main__":
    for check in (readme, reference, interpreted, compiled):  # kernels() lasts: those last
        check()
        print(check.__name__, "ok", flush=True)
