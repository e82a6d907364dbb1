"""The third executor: a pass under Triton's interpreter, on NumPy memory. Needs neither torch nor jax."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from .launch import WIDTHS, Pass


class HostArray:
    """Memory with an element type: the few members of a torch tensor that Triton's interpreter asks for.

    bfloat16 needs no NumPy dtype here: the interpreter reads raw addresses and the dtype's name.
    """

    def __init__(self, address: int, dtype: str, owner: Any):
        self._address, self.dtype, self.owner = address, dtype, owner

    def data_ptr(self) -> int:
        return self._address

    # The interpreter copies device storages to the host and back; this memory is on the host already.
    def untyped_storage(self) -> HostArray:
        return self

    def cpu(self) -> HostArray:
        return self

    def copy_(self, other: HostArray) -> None:
        pass

    def new_empty(self, *_: Any, **__: Any) -> HostArray:
        return HostArray(self._address, self.dtype, self.owner)

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    stride = size

    def set_(self, storage: HostArray, *_: Any) -> None:
        self._address, self.owner = storage._address, storage.owner


def empty(shape: tuple[int, ...], dtype: str) -> tuple[HostArray, np.ndarray]:
    """A new host array and its bytes (shape, with the element size as last axis), poisoned so that a gap shows."""
    raw = np.full((*shape, WIDTHS[dtype]), 0xFF, np.uint8)
    return HostArray(raw.ctypes.data, dtype, raw), raw


_one_at_a_time = threading.Lock()  # the interpreter swaps parts of triton.language while it runs


def run(program: Pass, buffers: Mapping[str, HostArray]) -> dict[str, np.ndarray]:
    """Run a pass; returns the raw bytes of its results by name (shape, with the element size as last axis)."""
    from .faster_interpreter import faster_interpreter  # imports triton

    env: dict[str, HostArray] = {name: buffers[name] for name in program.inputs}
    # Overflow to inf, nan arithmetic and a maximum of nans are defined results on a GPU, without warnings. The
    # deprecation is how the interpreter turns run-time loop bounds into Python integers.
    with _one_at_a_time, faster_interpreter(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
        for launch in program.launches:
            arguments: dict[str, Any] = {n: env[x] if isinstance(x, str) else x for n, x in launch.operands.items()}
            kept = launch.buffers  # an output of the same name as an input adds to it
            for name, (buffer, spec) in launch.outputs.items():
                if buffer not in kept:
                    env[buffer], _ = empty(spec.shape, spec.dtype)
                arguments[name] = env[buffer]
            launch.kernel[(launch.grid,)](**arguments, **launch.constexprs)
    return {name: env[name].owner for name in program.results}
