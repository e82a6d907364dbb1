"""JAX's transformations, on the kernels."""

from tests.test_jax import *  # noqa: F403
