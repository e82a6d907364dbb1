"""The interpreter's executor leaves Triton's language as it found it."""

import pytest
import triton.language as tl
from triton.runtime import interpreter as implementation

from kernels_triton import interpreter
from tests.support import make_case, run


def language():
    parts = tl, tl.core, tl.math, tl.tensor, tl.dtype
    return implementation._patch_lang, [{name: getattr(part, name) for name in dir(part)} for part in parts]


@pytest.fixture
def swaps(monkeypatch):
    """What was swapped for, and at the end the language has to be what it was."""
    found = []
    swap = implementation._patch_lang
    monkeypatch.setattr(implementation, "_patch_lang", lambda fn: found.append(fn) or swap(fn))
    before = language()
    yield found
    assert language() == before


def test_once_for_a_pass(swaps):
    run("torch", make_case(B=1, H=1, T=20, K=2, V=3, chunk_size=16), "interpret")
    assert len(swaps) == 2  # forward and backward


def test_put_back_after_an_error(swaps, monkeypatch):
    def empty(*_):
        assert tl.load is not load
        raise MemoryError

    load = tl.load
    monkeypatch.setattr(interpreter, "empty", empty)
    with pytest.raises(MemoryError):
        run("torch", make_case(B=1, H=1, T=20, K=2, V=3, chunk_size=16), "interpret")
    assert len(swaps) == 1
