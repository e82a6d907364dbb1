"""The interpreter's executor: faster than Triton's own to the same bits, and the language is left as it was found."""

import contextlib

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter as implementation

from kernels_triton import faster_interpreter, interpreter
from tests.support import make_case, run, same_bits


def language():
    parts = tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.block_type, implementation, implementation.TritonSemantic
    return [{x: getattr(part, x) for x in dir(part) if x != "__warningregistry__"} for part in parts]


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_as_without(monkeypatch, dtype):
    case = make_case(B=1, H=1, T=20, K=2, V=3, chunk_size=16, dtype=dtype)
    faster = run("torch", case, "interpret")
    monkeypatch.setattr(faster_interpreter, "faster_interpreter", contextlib.nullcontext)
    same_bits(faster, run("torch", case, "interpret"))


@triton.jit
def arithmetic(x, y, sums, differences, products):
    a, b = tl.load(x + tl.arange(0, 2)), tl.load(y)
    tl.store(sums + tl.arange(0, 2), a + b)
    tl.store(differences + tl.arange(0, 2), a - b)
    tl.store(products + tl.arange(0, 2), a * b)


def host(values, dtype):
    x = np.array(values, dtype)
    return interpreter.HostArray(x.ctypes.data, dtype, x)


LIMIT = 2**31 - 1


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "value, other, fails", [(LIMIT, 1, "add"), (-LIMIT, 2, "sub"), (2**16, 2**15, "mul"), (7, 5, "")]
)
def test_an_integer_that_does_not_fit_is_an_error(dtype, value, other, fails):
    arrays = [host([0, value], dtype), host([other], dtype), *(host([0, 0], dtype) for _ in range(3))]
    with faster_interpreter.faster_interpreter():
        if fails and dtype == "int32":
            with pytest.raises(Exception, match=f"expected results of {fails} that fit int32"):
                arithmetic[(1,)](*arrays)
        else:
            arithmetic[(1,)](*arrays)
            a, b, *found = (x.owner for x in arrays)
            assert all(np.array_equal(x, y) for x, y in zip(found, (a + b, a - b, a * b), strict=True))
