"""What a plan needs to know of a tensor, and tensors in memory that the kernels can read."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels_triton.backend import choose_backend
from kernels_triton.problem import MAX_TOKEN_STRIDE, Strides, architecture, suits_descriptors
from kernels_triton.validation import ArrayInfo

STRIDED = ("q", "k", "v", "i", "f")  # what is read by its own strides; all else is contiguous


def dtype_name(dtype: torch.dtype) -> str:
    """The shared name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def dtype_of(name: str) -> torch.dtype:
    """The dtype of a shared name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe(name: str, x: Any) -> ArrayInfo | None:
    """A tensor's facts for the shared checks."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    if x.is_nested or x.is_quantized:
        kind = "nested" if x.is_nested else "quantised"
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
    return ArrayInfo(tuple(x.shape), dtype_name(x.dtype), str(x.device))


def platform_of(x: Tensor) -> str:
    """The name of a tensor's device platform, as the shared checks know it."""
    return "rocm" if x.device.type == "cuda" and torch.version.hip else x.device.type


def backend_for(backend: str, x: Tensor) -> str:
    """`choose_backend` for a tensor. Raises ValueError where it has no memory that the interpreter can read."""
    used = choose_backend(backend, platform_of(x))
    if used == "interpret" and x.device.type != "cpu":
        raise ValueError(f"backend: 'interpret' expected tensors on a CPU, got {x.device}")
    return used


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The architecture of a device, as the tables of tile sizes know it."""
    if device.type != "cuda":
        return architecture("")
    if torch.version.hip:
        return architecture(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return architecture(f"{major}.{minor}")


def materialised(x: Tensor) -> Tensor:
    """x itself if its memory holds its values: not zeros without memory, as autograd makes them, nor bits to flip.

    Others become so: torch._efficientzerotensor; views with the negative bit, as of a conjugate's imaginary part.
    """
    if torch.compiler.is_compiling():  # which cannot trace the question; the operator asks again when it runs
        return x
    if x._is_zerotensor():
        return x.clone()  # differentiable, and no longer such a tensor
    return x.resolve_neg() if x.is_neg() else x


def readable(x: Tensor, layout: str) -> Tensor:
    """x itself if its last axis is contiguous and its tokens are not too far apart, else a contiguous copy."""
    x = materialised(x)
    token = 1 if layout == "bthd" else 2
    near = x.shape[token] == 1 or x.stride(token) <= MAX_TOKEN_STRIDE
    return x if near and (x.shape[-1] == 1 or x.stride(-1) == 1) else x.contiguous()


def readable_argument(name: str, x: Tensor | None, layout: str) -> Tensor | None:
    """An argument in memory that the kernels can read: q, k, v as `readable`, any gates, contiguous states."""
    if x is None:
        return x
    if name in ("q", "k", "v"):
        return readable(x, layout)
    x = materialised(x)
    return x if name in ("i", "f") else x.contiguous()


def head_strides(x: Tensor, layout: str) -> Strides:
    """Strides of the batch, head and token axes. An axis of size 1 is never stepped along: its stride counts as 0."""
    (n0, n1, n2, *_), (b, s1, s2, *_) = x.shape, x.stride()
    b, s1, s2 = b if n0 > 1 else 0, s1 if n1 > 1 else 0, s2 if n2 > 1 else 0
    return (b, s2, s1) if layout == "bthd" else (b, s1, s2)


def places(env: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Where the strided inputs of the backward pass are, and the largest of what the forward pass made for it."""
    names = (*STRIDED, "h", "states")
    return tuple((env[name].data_ptr(), env[name].stride()) for name in names if name in env)


def suits(x: Tensor) -> bool:
    """Whether x can be read through a tensor descriptor."""
    return suits_descriptors(tuple(x.shape), x.stride(), x.element_size(), x.data_ptr())


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on there. Devices that have none are left out by name: asking PyTorch breaks a graph."""
    return device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)
