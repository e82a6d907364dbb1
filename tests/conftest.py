"""What all tests share: the processor as JAX's device, and the backend that this process can run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from kernels_triton.backend import interpreting

# LLVM's optimisations, not XLA's own: a quarter of these tests' time. Where the frontends' bits are compared, in the
# interpreter's process, all is compiled as users have it.
if not interpreting():
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

pytest.register_assert_rewrite("tests.support")


@pytest.fixture
def backend():
    """The kernels where Triton's interpreter is on, native operations elsewhere: test files serve both processes."""
    return "interpret" if interpreting() else "reference"
