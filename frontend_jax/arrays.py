"""What a plan needs to know of an array: its facts for the shared checks, its platform and architecture."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from kernels_triton.problem import architecture
from kernels_triton.validation import ArrayInfo


def describe(name: str, x: Any) -> ArrayInfo | None:
    """An array's facts for the shared checks. JAX itself refuses arrays of different devices."""
    if x is None:
        return None
    if isinstance(x, Array):
        return ArrayInfo(tuple(x.shape), str(x.dtype), "")
    if not isinstance(x, np.ndarray) and not hasattr(x, "__jax_array__"):
        raise TypeError(f"{name}: expected a jax.Array, got {type(x).__name__}")
    # What JAX will make of it: without jax_enable_x64 nothing has 64 bits.
    return ArrayInfo(tuple(x.shape), str(jax.dtypes.canonicalize_dtype(x.dtype)), "")


def device_of(x: Any) -> Any:
    """Where x is computed: its device, or under a transformation the default device (or its platform's name)."""
    devices = None if isinstance(x, jax.core.Tracer) or not isinstance(x, Array) else x.devices()
    default = getattr(jax.config, "jax_default_device", None)
    return next(iter(devices)) if devices else default or jax.devices()[0]


def architecture_of(x: Any) -> str:
    """The architecture of x's device, as the tables of tile sizes know it."""
    return architecture(str(getattr(device_of(x), "compute_capability", "")))


def platform_of(x: Any) -> str:
    """The platform of x's device."""
    device = device_of(x)
    if isinstance(device, str):
        return device
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
