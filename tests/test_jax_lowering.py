"""The calls users make, lowered for CUDA on a machine without a GPU: each becomes its plan's kernels and no callback."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from frontend_jax import context, executor, mlstm_chunkwise, mlstm_context_parallel, mlstm_step, operator, recurrent
from tests.support import make_case

ARRAYS = [jnp.asarray(x) for x in make_case(H=2, T=40, K=16, V=16).arrays.values()]
CALL = functools.partial(mlstm_chunkwise, backend="triton", chunk_size=32)
FORWARD, BACKWARD = 3, 4  # launches
LAST = 1  # and one more in a backward pass with cotangents of last states
MESH = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(AxisType.Explicit,) * 2)
TWO = jax.sharding.AbstractMesh((2,), ("tokens",), axis_types=(AxisType.Auto,))
MANUAL = jax.make_mesh((1, 1), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Calls see a CUDA device; kernels are compiled for sm_90."""
    monkeypatch.setattr(executor, "launch_all", functools.partial(executor.launch_all, compute_capability=90))
    for module in (context, operator, recurrent):
        monkeypatch.setattr(module, "platform_of", lambda *_: "cuda")


def loss(*arrays, call=CALL):
    h, (c, n, m) = call(*arrays, return_last_states=True)
    return h.sum() + (c**2).sum() + n.sum() + m.sum()


def kernels(function, *arrays):
    """How many kernels the lowered program calls, everywhere in its text; a loop's body counts once."""
    text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    others = set(re.findall(r"custom_call @(\w+)", text)) - {"triton_kernel_call"}
    assert not {name for name in others if "callback" in name}, others
    return text.count("@triton_kernel_call")


def gradient(call=CALL):
    return jax.grad(functools.partial(loss, call=call), range(8))


def test_forward_and_backward():
    assert kernels(CALL, *ARRAYS[:5]) == FORWARD
    assert kernels(gradient(), *ARRAYS) == FORWARD + BACKWARD + LAST


def test_last_states_that_the_loss_does_not_depend_on_have_no_cotangent():
    """As in PyTorch, for the same bits: not zeros, which another pass takes."""

    def of_h(*arrays):
        return CALL(*arrays, return_last_states=True)[0].sum()

    assert kernels(jax.grad(of_h, range(8)), *ARRAYS) == FORWARD + BACKWARD


def test_vmap_folds_into_the_batch():
    arrays = [jnp.stack([x] * 3, 1) for x in ARRAYS]
    assert kernels(jax.vmap(gradient(), 1), *arrays) == FORWARD + BACKWARD + LAST


def test_checkpoint_computes_the_forward_pass_again():
    again = jax.checkpoint(functools.partial(CALL, return_last_states=True))
    assert kernels(gradient(lambda *arrays, **_: again(*arrays)), *ARRAYS) == 2 * FORWARD + BACKWARD + LAST


@pytest.mark.parametrize("spec", [P("batch", "heads"), P(None, "heads"), P()])
def test_explicit_axes(spec):
    placed = [jax.device_put(x, NamedSharding(MESH, spec)) for x in ARRAYS]
    assert kernels(gradient(), *placed) == FORWARD + BACKWARD + LAST


def test_shard_map():
    spec = P("batch", "heads")

    def inside(*arrays):
        return jax.lax.psum(loss(*arrays), ("batch", "heads"))

    mapped = jax.shard_map(inside, mesh=MANUAL, in_specs=(spec,) * 8, out_specs=P())
    assert kernels(jax.grad(mapped, range(8)), *ARRAYS) == FORWARD + BACKWARD + LAST


def test_packed():
    tokens = [jnp.moveaxis(x, 1, 2) for x in ARRAYS[:5]]
    offsets = np.array([0, 7, 40])
    function = functools.partial(CALL, cu_seqlens=offsets, layout="bthd")
    assert kernels(function, *tokens) == 1 + FORWARD  # the chunk table before them


def test_step():
    step = [x[:, :, 0] if n < 5 else x for n, x in enumerate(ARRAYS)]
    assert kernels(functools.partial(mlstm_step, backend="triton"), *step) == 1


def test_sequence_split_over_devices():
    tokens, states = P(None, None, "tokens"), P()
    operator_ = functools.partial(mlstm_context_parallel, axis="tokens", backend="triton", chunk_size=32)
    mapped = jax.shard_map(
        gradient(operator_), mesh=TWO, in_specs=(tokens,) * 5 + (states,) * 3, out_specs=(tokens,) * 5 + (states,) * 3
    )
    # Before each pass what a segment adds to the state, and to its cotangent; that launch takes the normaliser along.
    assert kernels(mapped, *ARRAYS) == 3 + FORWARD + 2 + BACKWARD - 1


def test_export_and_back():
    """Both passes, as bytes. Whoever reads them names the platform, as the kernels are compiled for one."""
    import jax.export

    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")]
    exported = jax.export.export(jax.jit(CALL), platforms=["cuda"], disabled_checks=checks)(*ARRAYS[:5])
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert again.mlir_module().count("@triton_kernel_call") == FORWARD and again.platforms == ("cuda",)
    assert again.vjp().mlir_module().count("@triton_kernel_call") == FORWARD + BACKWARD
    assert [x.shape for x in again.vjp().out_avals] == [x.shape for x in ARRAYS[:5]]
