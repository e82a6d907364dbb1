"""What PyTorch's users rely on, on the kernels; and what only kernels refuse."""

import concurrent.futures

import pytest
import torch

from tests.test_torch import *  # noqa: F403
from tests.test_torch import SMALL, call


# The second loss has constant cotangents of h: only the inputs make its gradient a function.
@pytest.mark.parametrize("loss", [lambda h: h.pow(2).sum(), torch.sum], ids=["square", "sum"])
def test_a_second_derivative_is_refused(backend, loss):
    arrays, outputs = call(backend)
    (dq,) = torch.autograd.grad(loss(outputs["h"]), arrays["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dq.pow(2).sum() + loss(outputs["h"])).backward()


def test_an_input_changed_before_backward_is_noticed(backend):
    arrays, outputs = call(backend)
    with torch.no_grad():
        arrays["k"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs["h"].sum().backward()


def test_batched_cotangents_are_refused(backend):
    arrays, outputs = call(backend)
    h = outputs["h"]
    with pytest.raises(RuntimeError, match="expected plain cotangents, got a batch of them"):
        torch.autograd.grad(h, arrays["q"], torch.ones(3, *h.shape), is_grads_batched=True)


def test_the_derivative_by_a_cotangent_is_refused(backend):
    """As `torch.autograd.functional.jvp` takes it: it must not look like 0."""
    arrays, outputs = call(backend)
    dh = torch.ones_like(outputs["h"]).requires_grad_()
    (dq,) = torch.autograd.grad(outputs["h"], arrays["q"], dh, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(dq, dh, torch.ones_like(dq))


def test_results_may_be_written_into(backend):
    """As on a GPU, where no result is a view."""
    arrays, outputs = call(backend, case=SMALL.but(normalizer_grad="detached"))
    outputs["h"].mul_(2).sum().backward()
    assert arrays["v"].grad is not None


def test_threads(backend):
    """Triton's interpreter takes one kernel at a time."""
    expected = call(backend)[1]["h"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: call(backend)[1]["h"], range(8)):
            assert torch.equal(found, expected)
