"""Which backend serves a call, and a clear word where none can. Knows devices by name only."""

from __future__ import annotations

import importlib.util
import os

from .options import one_of
from .problem import BACKENDS

HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: compilers trace what follows


def interpreting() -> bool:
    """True where Triton's interpreter is switched on. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _kernels_interpreted() -> bool:
    from .kernels.common import INTERPRETED

    return bool(INTERPRETED.value)


def choose_backend(backend: str, platform: str) -> str:
    """The backend for arrays on a platform ("cuda", "rocm", "cpu", "tpu", ...): "triton", "interpret" or "reference".

    Raises ValueError if the one asked for cannot serve.
    """
    one_of("backend", backend, BACKENDS)
    gpu = platform in ("cuda", "rocm")
    if backend == "auto":
        backend = "triton" if gpu and not interpreting() else "reference"
    if backend == "reference":
        return backend
    if not HAS_TRITON:
        raise ValueError(f"backend: expected an installed package triton for {backend!r}, found none; use 'reference'")
    if backend == "triton":
        if not gpu:
            raise ValueError(
                f"backend: 'triton' expected arrays on a CUDA or ROCm device, got {platform}; on this device use "
                "'reference', or 'interpret' to run the same kernels slowly for validation"
            )
        if _kernels_interpreted():
            raise ValueError("backend: 'triton' expected compiled kernels, but TRITON_INTERPRET=1 was set at import")
    elif not _kernels_interpreted():
        raise ValueError(
            "backend: 'interpret' expected TRITON_INTERPRET=1 in the environment before Python starts, got none: "
            "Triton chooses when the kernels are imported"
        )
    elif gpu:
        raise ValueError(f"backend: 'interpret' expected arrays on a CPU, got {platform}")
    return backend
