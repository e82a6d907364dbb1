"""The tests of every backend, here on the kernels."""

from tests.test_recurrent import *  # noqa: F403
from tests.test_recurrent import pytestmark as pytestmark
