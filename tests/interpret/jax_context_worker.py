"""A sequence split over the devices of a CPU, which must be asked for before JAX starts: run by test_context.py."""

import functools
import os
import re

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # LLVM's, a third of this process's time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ |= {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import frontend_jax.context
import frontend_jax.sharding
from frontend_jax import executor, mlstm_chunkwise, mlstm_context_parallel
from kernels_triton import context

LIMIT = 1e-5
NAMES = ("h", "c_last", "n_last", "m_last", "dq", "dk", "dv", "di", "df", "dc_initial", "dn_initial", "dm_initial")
B, H, K, V = 2, 2, 4, 5
AUTO = jax.sharding.AxisType.Auto


def mesh(shape, names, kind=AUTO):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)])


def draw(T, bthd=False, states=True, i_mean=0.0, f_mean=2.0, B=B):
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((B, H, T, *dims)).astype(np.float32) for dims in ((K,), (K,), (V,), (), ())]
    tokens[3] += np.float32(i_mean)
    tokens[4] += np.float32(f_mean)
    tokens = [np.ascontiguousarray(x.swapaxes(1, 2)) if bthd else x for x in tokens]
    shapes = ((K, V), (K,), ()) if states else ()
    return tokens + [rng.standard_normal((B, H, *dims)).astype(np.float32) for dims in shapes]


def both(function, arrays, cotangents):
    outputs, pull = jax.vjp(function, *arrays)
    return outputs, pull(cotangents)


def errors(got, expected):
    """Relative Frobenius errors, of outputs and gradients in order."""
    found = []
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        found.append(np.linalg.norm(x - y) / (np.linalg.norm(y) + np.finfo(np.float32).tiny))
    return found


def compare(name, arrays, split, whole=mlstm_chunkwise, last=True, **options):
    """split: the function of the operator's arrays that is to give the same."""
    options |= {"return_last_states": last}
    whole, split = functools.partial(whole, **options), functools.partial(split, **options)
    rng = np.random.default_rng(1)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), jax.eval_shape(whole, *arrays))
    found = errors(*(jax.jit(functools.partial(both, x))(arrays, cotangents) for x in (split, whole)))
    names = (NAMES if last else NAMES[:1] + NAMES[4:])[: len(found)]
    print(f"{name:24}", *(f"{n} {x:.1e}" for n, x in zip(names, found, strict=True)), flush=True)
    assert max(found) < LIMIT, (name, found)


def inside(mesh, **shard_map):
    """The operator in a shard_map of its caller's."""

    def function(*arrays, return_last_states, layout="bhtd", **options):
        tokens = P(None, "seq") if layout == "bthd" else P(None, None, "seq")
        call = functools.partial(
            mlstm_context_parallel, axis="seq", layout=layout, return_last_states=return_last_states, **options
        )
        takes = (tokens,) * 5 + (P(),) * (len(arrays) - 5)
        gives = (tokens, (P(),) * 3) if return_last_states else tokens
        return jax.shard_map(call, mesh=mesh, in_specs=takes, out_specs=gives, **shard_map)(*arrays)

    return function


def over(mesh, **axes):
    return functools.partial(mlstm_context_parallel, mesh=mesh, axis="seq", **axes)


def reference():
    eight = mesh((8,), ("seq",))
    options = {"backend": "reference", "chunk_size": 16}
    compare("reference, 8 devices", draw(8 * 18), over(eight), **options)
    compare("shard_map, bthd", draw(8 * 3, True), inside(eight), layout="bthd", **options)
    compare("check_vma=False", draw(8 * 3), inside(eight, check_vma=False), **options)
    explicit = mesh((2, 2, 2), ("data", "model", "seq"), jax.sharding.AxisType.Explicit)
    compare("batch, heads and tokens", draw(22), over(explicit, batch_axis="data", head_axis="model"), **options)
    compare("closed gates", draw(8 * 5, f_mean=-8.0), over(eight), **options)
    compare("long memory", draw(8 * 5, f_mean=12.0, i_mean=-4.0), over(eight), **options)
    arrays = draw(8 * 3)
    arrays[7] = np.full_like(arrays[7], -np.inf)
    compare("a first state of no weight", arrays, over(eight), input_gate="sigmoid", **options)
    compare("large stabilisers", draw(8 * 18, i_mean=1e4, states=False), over(eight), last=False, **options)


def kernels():
    """On four devices, each interpreted in turn."""
    four, options = mesh((4,), ("seq",)), {"backend": "interpret", "chunk_size": 16}
    draw_one = functools.partial(draw, B=1)
    compare("kernels, 4 devices", draw_one(4 * 17, f_mean=12.0, i_mean=-4.0), over(four), **options)
    compare("kernels, no states", draw_one(4 * 3, True, states=False), over(four), layout="bthd", last=False, **options)
    sigmoid = {"input_gate": "sigmoid", "save_states": False}
    compare("kernels, sigmoid", draw_one(4 * 5), over(four), **sigmoid, **options)


def partitioned():
    """As on a GPU, by way of the rules for XLA's partitioner: inside shard_map they must stand back."""
    frontend_jax.context.choose_backend = lambda *_: "triton"
    frontend_jax.sharding.run = lambda program, arrays, backend: executor.run(program, arrays, "interpret")
    arrays = draw(2 * 18, B=1)
    whole = functools.partial(mlstm_chunkwise, backend="interpret")

    def split(*arrays, backend="", **options):
        return over(mesh((2,), ("seq",)))(*arrays, **options)

    compare("kernels, partitioned", arrays, split, whole, chunk_size=16)


def exchanged(T, states=True):
    """Bytes that the collectives of the forward pass, and of both, give to one device, as compiled."""
    function = functools.partial(
        over(mesh((8,), ("seq",))), backend="interpret", return_last_states=states, chunk_size=16
    )
    arrays = draw(T, states=states)
    cotangents = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(function, *arrays))
    forward = jax.jit(function).lower(*arrays).compile().as_text()
    text = jax.jit(functools.partial(both, function)).lower(arrays, cotangents).compile().as_text()
    return collectives(forward), collectives(text)


def collectives(text):
    """By kind, the bytes of all results of collectives in a compiled program."""
    found = {}
    for shape, kind in re.findall(
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text
    ):
        sizes = [
            np.prod([int(x) for x in dims.split(",") if x], dtype=int) for dims in re.findall(r"f32\[([\d,]*)\]", shape)
        ]
        found[kind] = found.get(kind, 0) + 4 * int(sum(sizes))
    return found


def communication():
    """A state each, whatever the length."""
    forward, both = exchanged(8 * 4, states=False)
    sent = context.exchanged_bytes(B, H, K, V)
    assert forward == {"all-gather": 8 * sent[0]} and both == {"all-gather": 8 * sum(sent)}, (forward, both)
    forward, both = exchanged(8 * 4)
    assert (forward, both) == exchanged(8 * 64)
    states = 4 * B * H * (K * V + K + 1)  # the last ones, and the initial ones' gradients
    assert both == {"all-gather": 8 * sum(sent), "all-reduce": 2 * states}, both


if __name__ == "__main__":
    for check in (reference, communication, kernels, partitioned):  # which lasts
        check()
        print(check.__name__, "ok", flush=True)
