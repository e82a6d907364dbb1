"""Triton's interpreter, three times as fast while a pass runs, to the same bits.

It swaps parts of triton.language in and out around each call of a device function, builds shapes and tables anew for
each value, and computes whether integers overflow by operations of its own, without looking at the result: here that
is an error. The functions below stand for those of Triton 3.6 to 3.9, and are put back after the pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

_numpy_dtype, _init_block = triton_interpreter._get_np_dtype, tl.block_type.__init__
_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@functools.cache
def _block(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    """Shape, number of elements and name of a block's shape."""
    block = object.__new__(tl.block_type)
    _init_block(block, tl.int1, list(sizes))
    return block.shape, block.numel, str(block.shape)


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Shape and number of elements of a tensor."""
    return tl.tuple([tl.constexpr(x) for x in sizes]), tl.constexpr(int(np.prod(sizes, dtype=np.int64)))


@functools.cache
def _dtype_named(name: str) -> np.dtype[Any]:
    return _numpy_dtype(next(x for x in vars(tl.core).values() if isinstance(x, tl.dtype) and x.name == name))


def _get_np_dtype(dtype: Any) -> np.dtype[Any]:
    """triton.runtime.interpreter._get_np_dtype."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _dtype_named(scalar.name)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """triton.language.block_type.__init__."""
    sizes = tuple(x.value if isinstance(x, tl.constexpr) else x for x in shape)
    self.element_ty = element_ty
    self.shape, self.numel, name = _block(sizes)
    self.name = f"<{name}, {element_ty}>"


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """triton.language.tensor.__init__."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape.values) if type.is_block() else ())


def _check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """TritonSemantic.binary_op_sanitize_overflow_impl; raises OverflowError where an integer's bits are too few."""
    if 1 < lhs.dtype.int_bitwidth < 64:
        wide = _OPERATIONS[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if wide.min() < lhs.dtype.get_int_min_value() or wide.max() > lhs.dtype.get_int_max_value():
            raise OverflowError(f"expected results of {binary_op.__name__} that fit {lhs.dtype}, got {wide}")


@contextlib.contextmanager
def faster_interpreter() -> Iterator[None]:
    """While it lasts, Triton's interpreter is faster. One thread at a time."""
    swap = triton_interpreter._patch_lang
    scope = swap(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # as kernels and tl's own functions know it
    changes = (
        (triton_interpreter, "_patch_lang", lambda _: SimpleNamespace(restore=lambda: None)),
        (triton_interpreter, "_get_np_dtype", _get_np_dtype),
        (tl.block_type, "__init__", _init_block_type),
        (tl.tensor, "__init__", _init_tensor),
        (triton_interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow),
    )
    before = [getattr(owner, name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changes, before, strict=True):
            setattr(owner, name, value)
        scope.restore()
