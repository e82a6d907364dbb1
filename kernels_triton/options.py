"""The checks of options: numbers, flags, names. Each names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

from .problem import MAX_CHUNK, MIN_CHUNK

MAX_FLOAT = 10**308


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: Any, minimum: float = -math.inf) -> float:
    """The value as a float. Raises TypeError unless it is a number, ValueError unless it is finite and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a Python number, got {type(value).__name__}")
    if isinstance(value, int) and abs(value) > MAX_FLOAT:
        raise ValueError(f"{name}: expected a finite number, got an integer beyond all floats")
    if not -math.inf < value < math.inf or value < minimum:  # which a compiler can trace, unlike isfinite
        at_least = "" if minimum == -math.inf else f" >= {minimum}"
        raise ValueError(f"{name}: expected a finite number{at_least}, got {value}")
    return float(value)


def check_chunk_size(chunk_size: Any, name: str = "chunk_size") -> None:
    """None, or a power of two from 16 to 512."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"{name}: expected an int or None, got {type(chunk_size).__name__}")
    if not MIN_CHUNK <= chunk_size <= MAX_CHUNK or chunk_size & (chunk_size - 1):
        raise ValueError(f"{name}: expected a power of two from {MIN_CHUNK} to {MAX_CHUNK}, got {chunk_size}")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
