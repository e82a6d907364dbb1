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


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_a_second_derivative_is_refused(loss, transform):
    with pytest.raises(
        TypeError, match="mlstm_chunkwise: expected a first derivative, got a call to differentiate twice"
    ):
        jax.grad(lambda x: transform(jax.grad(loss))(x)["q"].sum())(ARRAYS)


def test_forward_mode_is_refused(backend):
    f = functools.partial(mlstm_chunkwise, **CASE.options, backend=backend)
    with pytest.raises(
        TypeError, match="mlstm_chunkwise: expected reverse mode, got forward-mode .*backend='reference'"
    ):
        jax.jvp(lambda q: f(**{**ARRAYS, "q": q}), (ARRAYS["q"],), (ARRAYS["q"],))
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's own words, once it is traced
        jax.jacfwd(jax.jit(lambda q: f(**{**ARRAYS, "q": q})))(ARRAYS["q"])


def test_repeated_calls_compile_nothing(backend, caplog):
    """A pass has one callback: JAX compiles an eager call once for each callback, and keeps it."""
    gradients = jax.grad(lambda x: mlstm_chunkwise(**x, **CASE.options, backend=backend)[0].sum())

    def compiled_by(calls):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
            for _ in range(calls):
                mlstm_chunkwise(**ARRAYS, **CASE.options, backend=backend)
                gradients(ARRAYS)
        return [x.getMessage() for x in caplog.records if "Finished XLA compilation" in x.getMessage()]

    compiled_by(1)
    assert compiled_by(20) == []
