"""The stored vectors on the kernels, in both frontends, which give the same bits."""

import pytest

from tests.support import run, same_bits, vectors
from tests.test_vectors import MODES, test_operator

__all__ = ["test_operator"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", vectors())
def test_torch_and_jax_to_the_bit(name, mode, backend):
    case = vectors()[name][0].but(normalizer_grad=mode)
    same_bits(run("torch", case, backend), run("jax", case, backend))
