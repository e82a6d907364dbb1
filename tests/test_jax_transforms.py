"""JAX's transforms that concern compiled programs, and those that only native operations have."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from frontend_jax import mlstm_chunkwise
from frontend_jax.executor import launch_all
from tests.support import make_case

CASE = make_case(H=1, T=19, K=3, V=4)
ARRAYS = [jnp.asarray(x) for x in CASE.arrays.values()]
REFERENCE = functools.partial(mlstm_chunkwise, backend="reference", chunk_size=16)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)


def loss(*arrays, function=REFERENCE):
    h, (c, n, m) = function(*arrays, return_last_states=True)
    return jnp.sin(h).sum() + (c**2).sum() + n.sum() + jnp.sin(m).sum()


gradient = jax.jit(jax.grad(loss, argnums=tuple(range(8))))


def test_forward_mode_is_reverse_mode():
    direction = [jnp.cos(3 * x) for x in ARRAYS]
    value, slope = jax.jvp(loss, ARRAYS, direction)
    close(value, loss(*ARRAYS))
    close(slope, sum((x * y).sum() for x, y in zip(gradient(*ARRAYS), direction, strict=True)))
    _, linear = jax.linearize(loss, *ARRAYS)
    close(linear(*direction), slope)


def test_second_derivatives():
    """The Hessian times a direction: by reverse over reverse, and by forward over reverse."""

    def dq(q):
        return jax.grad(loss)(q, *ARRAYS[1:])

    q, direction = ARRAYS[0], jnp.cos(3 * ARRAYS[0])
    _, forward = jax.jvp(dq, (q,), (direction,))
    reverse = jax.grad(lambda x: (dq(x) * direction).sum())(q)
    assert jnp.abs(reverse).max() > 0.1
    close(reverse, forward)


@pytest.mark.parametrize("policy", ["nothing_saveable", "h"])
def test_checkpoint_policies(policy):
    policies = jax.checkpoint_policies
    chosen = policies.save_only_these_names("h") if policy == "h" else getattr(policies, policy)

    def layer(*arrays):
        return checkpoint_name(REFERENCE(*arrays), "h")

    checkpointed = jax.checkpoint(layer, policy=chosen)
    got, expected = (
        jax.jit(jax.grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), argnums=tuple(range(8))))(*ARRAYS)
        for f in (checkpointed, layer)
    )
    jax.tree.map(close, got, expected)


def test_ahead_of_time():
    compiled = gradient.lower(*ARRAYS).compile()
    jax.tree.map(close, compiled(*ARRAYS), gradient(*ARRAYS))
    with pytest.raises(TypeError, match="Argument types differ"):
        compiled(*(x[:, :, :7] if n < 5 else x for n, x in enumerate(ARRAYS)))


def test_donated_arguments():
    """h may take the memory of v."""
    donating = jax.jit(REFERENCE, donate_argnums=2)
    assert "tf.aliasing_output" in donating.lower(*ARRAYS).as_text()
    expected = REFERENCE(*ARRAYS)
    v = jnp.array(ARRAYS[2])
    close(donating(*ARRAYS[:2], v, *ARRAYS[3:]), expected)
    assert v.is_deleted()


def test_export():
    exported = jax.export.export(jax.jit(REFERENCE))(*ARRAYS)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    close(again.call(*ARRAYS), REFERENCE(*ARRAYS))
    _, pull = jax.vjp(lambda *x: again.call(*x), *ARRAYS)
    _, expected = jax.vjp(REFERENCE, *ARRAYS)
    dh = jnp.ones_like(REFERENCE(*ARRAYS))
    jax.tree.map(close, pull(dh), expected(dh))


def test_lowering_for_a_gpu_without_one(monkeypatch):
    """Exported for CUDA: a Triton call per launch and nothing around them for one device; no callback."""
    monkeypatch.setattr("frontend_jax.operator.choose_backend", lambda *_: "triton")
    monkeypatch.setattr("frontend_jax.executor.launch_all", functools.partial(launch_all, compute_capability=90))
    case = make_case(H=2, T=300, K=64, V=64, dtype="bfloat16")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.arrays.values()]
    function = functools.partial(loss, function=mlstm_chunkwise)
    checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")]
    exported = jax.export.export(
        jax.jit(jax.grad(function, argnums=tuple(range(8)))), platforms=["cuda"], disabled_checks=checks
    )(*arrays)
    text = exported.mlir_module()
    assert text.count("@triton_kernel_call") == 8
    assert "CustomSPMDPartitioning" not in text and "callback" not in text
    assert jax.export.deserialize(exported.serialize()).platforms == ("cuda",)
