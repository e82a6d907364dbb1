"""The tests of every backend, here on the kernels."""

from tests.test_operator import *  # noqa: F403
from tests.test_operator import pytestmark as pytestmark
