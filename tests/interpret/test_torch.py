"""What PyTorch's users rely on, on the kernels; and what only kernels refuse."""

import pytest
import torch

from tests.test_torch import *  # noqa: F403
from tests.test_torch import call


def test_a_second_derivative_is_refused(backend):
    arrays, outputs = call(backend)
    (dq,) = torch.autograd.grad(outputs["h"].sum(), arrays["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
