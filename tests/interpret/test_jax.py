"""JAX's transformations, on the kernels, which no compiler changes."""

import functools

import jax
import numpy as np
import pytest

from frontend_jax import mlstm_chunkwise
from tests.test_jax import *  # noqa: F403
from tests.test_jax import ARRAYS, CASE


def test_jit_changes_no_bit(backend):
    f = functools.partial(mlstm_chunkwise, **CASE.options, backend=backend)
    np.testing.assert_array_equal(jax.jit(lambda x: f(**x))(ARRAYS), f(**ARRAYS))


def test_a_second_derivative_is_refused(loss):
    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(lambda x: jax.grad(loss)(x)["q"].sum())(ARRAYS)
