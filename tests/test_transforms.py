"""PyTorch's transforms on native operations: also those that the kernels refuse, forward mode and second derivatives."""

import functools

import pytest
import torch

from frontend_torch import mlstm_chunkwise
from tests.support import make_case, to_torch

REFERENCE = functools.partial(mlstm_chunkwise, backend="reference", chunk_size=16)


@pytest.fixture
def arrays():
    return [to_torch(x) for x in make_case(H=1, T=19, K=3, V=4).arrays.values()]


def loss(*arrays):
    h, (c, n, m) = REFERENCE(*arrays, return_last_states=True)
    return h.sin().sum() + c.square().sum() + n.sum() + m.sin().sum()


def test_vmap(arrays):
    many = [torch.stack([x, x.flip(-1)]) for x in arrays]
    got = torch.func.vmap(REFERENCE)(*many)
    for n in range(2):
        torch.testing.assert_close(got[n], REFERENCE(*(x[n] for x in many)))


# torch's own
deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@deprecated
def test_forward_mode_is_reverse_mode(arrays):
    direction = [torch.randn_like(x) for x in arrays]
    value, slope = torch.func.jvp(loss, tuple(arrays), tuple(direction))
    gradients = torch.func.grad(loss, argnums=tuple(range(8)))(*arrays)
    torch.testing.assert_close(value, loss(*arrays))
    expected = sum((x * y).sum() for x, y in zip(gradients, direction, strict=True))
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-4)


@deprecated
def test_second_derivatives(arrays):
    """The Hessian times a direction: by reverse over reverse, and by forward over reverse."""
    q, rest = arrays[0].requires_grad_(), arrays[1:]
    direction = torch.randn_like(q)
    (dq,) = torch.autograd.grad(loss(q, *rest), q, create_graph=True)
    (twice,) = torch.autograd.grad((dq * direction).sum(), q)
    gradient = torch.func.grad(lambda x: loss(x, *rest))
    _, forward = torch.func.jvp(gradient, (q.detach(),), (direction,))
    assert twice.abs().max() > 0.1
    torch.testing.assert_close(twice, forward, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"
)  # array_api_compat's
def test_compile(arrays):
    torch._dynamo.reset()
    compiled = torch.compile(REFERENCE, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in arrays]
    got, expected = compiled(*leaves), REFERENCE(*leaves)
    torch.testing.assert_close(got, expected)
    for x, y in zip(*(torch.autograd.grad(h.sum(), leaves) for h in (got, expected)), strict=True):
        torch.testing.assert_close(x, y)


def test_autocast(arrays):
    with torch.autocast("cpu", torch.bfloat16):
        h = REFERENCE(*arrays)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, REFERENCE(*(x.bfloat16() if n < 3 else x for n, x in enumerate(arrays))))
