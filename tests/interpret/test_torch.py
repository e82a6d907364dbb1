"""What PyTorch's users rely on, on the kernels; and what only kernels refuse."""

import pytest
import torch

from tests.test_torch import *  # noqa: F403
from tests.test_torch import call


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
