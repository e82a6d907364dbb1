"""The demo's training: the same batches of Python's standard library through PyTorch and through JAX."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .cases import INITIAL, INPUTS, LAST, Arrays
from .demo_model import Config, Params, adam, learning_rates, mean_loss

Step = Callable[[np.ndarray, float], float]  # (tokens (B, T + 1), learning rate) -> loss in nats per byte

HELD_OUT = 0.05  # the last part of the text, which training does not see


def read_text() -> np.ndarray:
    """The modules at the top of Python's standard library, sorted by name, as bytes. Raises ValueError if too few."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    if text.size < 100_000:
        raise ValueError(f"text: expected the source of Python's standard library in {folder}, got {text.size} bytes")
    return text


def split(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out text."""
    cut = int(text.size * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def batches(text: np.ndarray, config: Config) -> np.ndarray:
    """(steps, batch, length + 1) int32: pieces of the text from random places."""
    rng = np.random.default_rng(config.seed)
    starts = rng.integers(0, text.size - config.length, (config.steps, config.batch))
    return text[starts[..., None] + np.arange(config.length + 1)].astype(np.int32)


def torch_step(params: Params, config: Config) -> Step:
    """A step of training in PyTorch, which replaces the tensors in `params`."""
    import torch

    from frontend_torch import mlstm_chunkwise

    device = params["embedding"].device
    mean, square = ({name: torch.zeros_like(x) for name, x in params.items()} for _ in range(2))

    def mlstm(*qkvif: Any) -> Any:
        return mlstm_chunkwise(*qkvif, layout="bthd")

    def step(tokens: np.ndarray, rate: float) -> float:
        nonlocal mean, square
        leaves = {name: x.requires_grad_() for name, x in params.items()}
        loss = mean_loss(leaves, torch.from_numpy(tokens).to(device), config, mlstm)
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        with torch.no_grad():
            new, mean, square = adam(params, grads, mean, square, rate)
        params.update(new)
        return loss.item()

    return step


def jax_step(params: Params, config: Config) -> Step:
    """A step of training in JAX, which replaces the arrays in `params`."""
    import jax
    import jax.numpy as jnp

    from frontend_jax import mlstm_chunkwise

    mean, square = ({name: jnp.zeros_like(x) for name, x in params.items()} for _ in range(2))

    def mlstm(*qkvif: Any) -> Any:
        return mlstm_chunkwise(*qkvif, layout="bthd")

    @jax.jit
    def update(params: Params, mean: Params, square: Params, tokens: Any, rate: Any) -> Any:
        loss, grads = jax.value_and_grad(mean_loss)(params, tokens, config, mlstm)
        return loss, *adam(params, grads, mean, square, rate)

    def step(tokens: np.ndarray, rate: float) -> float:
        nonlocal mean, square
        with jax.default_matmul_precision("float32"):  # on a GPU JAX would multiply in TF32, PyTorch would not
            loss, new, mean, square = update(params, mean, square, tokens, rate)
        params.update(new)
        return float(loss)

    return step


def train(name: str, step: Step, data: np.ndarray, config: Config) -> list[float]:
    """Every step, behind a progress bar. Returns the losses."""
    losses = []
    rates = learning_rates(config)
    with tqdm(total=data[..., 1:].size, desc=name, unit=" tokens", unit_scale=True) as bar:
        for tokens, rate in zip(data, rates, strict=True):
            losses.append(step(tokens, float(rate)))
            bar.set_postfix_str(f"loss {losses[-1]:.3f} nats/byte", refresh=False)
            bar.update(tokens[:, 1:].size)
    return losses


def activations(params: Params, text: np.ndarray, config: Config, tokens: int) -> Arrays:
    """What the last block's mLSTM meets in the middle one of three segments of a text, each of so many tokens.

    Its inputs q, k, v, i, f; the states that the first segment left; and the loss's gradients with respect to its h
    and to the states that it hands to the third: d_h, d_c_last, d_n_last, d_m_last. Tokens come after heads.
    """
    import torch

    from frontend_torch import mlstm_chunkwise

    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def mlstm(*qkvif: Any) -> Any:
        nonlocal inputs, outputs
        states: dict[str, Any] = {}
        hs = []
        for n in range(3):
            segment = (x[:, n * tokens : (n + 1) * tokens] for x in qkvif)
            given = dict(zip(INPUTS, segment, strict=True)) | states
            h, last = mlstm_chunkwise(**given, return_last_states=True, layout="bthd")
            if n == 1:  # of all blocks the last one's comes last, and stays
                inputs, outputs = given, dict(zip(("h", *LAST), (h, *last), strict=True))
            hs.append(h)
            states = dict(zip(INITIAL, last, strict=True))
        return torch.cat(hs, dim=1)

    piece = torch.from_numpy(text[None, : 3 * tokens + 1].astype(np.int32)).to(params["embedding"].device)
    loss = mean_loss({name: x.requires_grad_() for name, x in params.items()}, piece, config, mlstm)
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    found = inputs | {f"d_{name}": x for name, x in zip(outputs, gradients, strict=True)}
    per_token = {*INPUTS, "d_h"}  # (B, T, H, ...), where the states are (B, H, ...)
    found = {name: x.transpose(1, 2) if name in per_token else x for name, x in found.items()}
    return {name: x.detach().cpu().contiguous().numpy() for name, x in found.items()}
