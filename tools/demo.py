"""Trains one small language model in PyTorch and in JAX, and compares the kernels on its activations.

    python -m tools.demo [--steps N] [--device auto|cpu|cuda] [--out DIR]

Both start from the same weights and read the same text, the source of Python's standard library, byte by byte. The
trained model's last mLSTM layer then gives real activations, gates, states and cotangents, on which the Triton kernels
of both frontends are held against each other, to the bit, and against float64: in Triton's interpreter on a CPU,
compiled on a GPU. Writes parity.json and parity.png. Exit code 1 if any bit differs between the frontends or an error
exceeds its tolerance; 2 for bad arguments; 130 if interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

# Nothing here may import torch, jax or triton before the environment is set: see choose_device.
from .demo_model import Config, initial_weights

SEGMENT = 128  # tokens of the comparison


def choose_device(wanted: str) -> str:
    """The device, "cpu" or "cuda", that both frameworks can use, with the environment set for it."""
    # Two thread pools share the cores: one that waits must not spin. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .parity import Settings, prepare, unavailable

    if wanted not in ("auto", "cpu", "cuda"):
        raise typer.BadParameter(f"expected auto, cpu or cuda, got {wanted}", param_hint="--device")
    if wanted != "cpu":
        prepare("cuda")
        reason = unavailable(Settings("cuda"))
        if reason is None:
            return "cuda"
        if wanted == "cuda":
            raise typer.BadParameter(reason, param_hint="--device")
    prepare("cpu")
    reason = unavailable(Settings("cpu"))
    if reason is not None:
        raise typer.BadParameter(reason, param_hint="--device")
    return "cpu"


def train_both(text: Any, config: Config, device: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The losses of both frameworks, and the weights that PyTorch arrived at."""
    import jax.numpy as jnp

    from . import demo_train
    from .compare import to_torch

    weights = initial_weights(config)
    data = demo_train.batches(text, config)
    torch_params = {name: to_torch(x, device) for name, x in weights.items()}
    jax_params = {name: jnp.asarray(x) for name, x in weights.items()}
    losses = {
        "PyTorch": demo_train.train("PyTorch", demo_train.torch_step(torch_params, config), data, config),
        "JAX": demo_train.train("JAX    ", demo_train.jax_step(jax_params, config), data, config),
    }
    return losses, torch_params
