"""The demo's language model and its optimiser, written once against the array API: torch and JAX run the same lines.

Bytes -> embedding -> pre-norm blocks of one mLSTM layer and one gated MLP -> logits of the next byte, arranged as in
xLSTM 7B (Beck et al. 2025, arXiv:2503.13427), only small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

Array = Any
Params = dict[str, Array]
Mlstm = Callable[[Array, Array, Array, Array, Array], Array]  # q, k, v, i, f in layout "bthd" -> h

BYTES = 256
GATE_CAP = 15.0  # gate pre-activations are bounded softly, as in xLSTM 7B
NORM_EPS = 1e-6
# In the norm of h, so large that some of its length stays: behind a norm that ignores it, the gradients through the
# operator's normaliser cancel, and to compare them would be to compare roundings.
HEAD_NORM_EPS = 1.0
BETAS, ADAM_EPS = (0.9, 0.99), 1e-8
CLIP = 1.0  # largest norm of all gradients together


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training."""

    width: int = 128
    heads: int = 4
    blocks: int = 2
    mlp: int = 256
    batch: int = 8  # sequences per step
    length: int = 256  # bytes per sequence
    steps: int = 150
    learning_rate: float = 4e-3
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def initial_weights(config: Config) -> dict[str, np.ndarray]:
    """Every weight, float32, from NumPy's generator: both frameworks start from these."""
    rng = np.random.default_rng(config.seed)
    D, M, H = config.width, config.mlp, config.heads

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, gain * rows**-0.5, (rows, columns))

    weights = {"embedding": rng.normal(0.0, 1.0, (BYTES, D)), "norm": np.ones(D), "logits": normal(BYTES, D, 0.1)}
    for n in range(config.blocks):
        # As in xLSTM: forget gates near 1, over a range of memory lengths; input gates from half open to nearly closed.
        gate_bias = np.concatenate([np.linspace(-4.0, 0.0, H), np.linspace(3.0, 6.0, H)])
        layer = {
            "mix_norm": np.ones(D),
            "qkvo": normal(D, 4 * D),
            "gates": normal(D, 2 * H, 0.1),
            "gate_bias": gate_bias,
            "head_norm": np.ones(D),
            "out": normal(D, D),
            "mlp_norm": np.ones(D),
            "up": normal(D, 2 * M),
            "down": normal(M, D),
        }
        weights |= {f"{n}.{name}": x for name, x in layer.items()}
    return {name: x.astype(np.float32) for name, x in weights.items()}


def _rms_norm(xp: Any, x: Array, eps: float = NORM_EPS) -> Array:
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def _sigmoid(xp: Any, x: Array) -> Array:
    return 0.5 + 0.5 * xp.tanh(0.5 * x)  # no overflow on either side


def mean_loss(params: Params, tokens: Array, config: Config, mlstm: Mlstm) -> Array:
    """Cross-entropy of each byte given those before it, in nats per byte. tokens (B, T + 1), integers."""
    xp = array_api_compat.array_namespace(tokens)
    B, T = tokens.shape[0], tokens.shape[1] - 1
    D, H = config.width, config.heads
    inputs, targets = xp.reshape(tokens[:, :-1], (B * T,)), xp.reshape(tokens[:, 1:], (B * T,))

    x = xp.reshape(xp.take(params["embedding"], inputs, axis=0), (B, T, D))
    for n in range(config.blocks):
        p = {name.removeprefix(f"{n}."): w for name, w in params.items()}
        y = _rms_norm(xp, x) * p["mix_norm"]
        qkvo = y @ p["qkvo"]
        q, k, v = (xp.reshape(qkvo[:, :, j * D : (j + 1) * D], (B, T, H, D // H)) for j in range(3))
        gates = GATE_CAP * xp.tanh((y @ p["gates"] + p["gate_bias"]) / GATE_CAP)
        h = mlstm(q, k, v, gates[:, :, :H], gates[:, :, H:])
        h = xp.reshape(_rms_norm(xp, h, HEAD_NORM_EPS), (B, T, D)) * p["head_norm"]
        x = x + (_sigmoid(xp, qkvo[:, :, 3 * D :]) * h) @ p["out"]

        up = (_rms_norm(xp, x) * p["mlp_norm"]) @ p["up"]
        gate = up[:, :, : config.mlp]
        x = x + (gate * _sigmoid(xp, gate) * up[:, :, config.mlp :]) @ p["down"]

    x = xp.reshape(_rms_norm(xp, x) * params["norm"], (B * T, D))
    logits = x @ params["logits"].T
    top = xp.max(logits, axis=-1, keepdims=True)
    log_total = xp.log(xp.sum(xp.exp(logits - top), axis=-1)) + top[:, 0]
    return xp.mean(log_total - xp.sum(x * xp.take(params["logits"], targets, axis=0), axis=-1))


def learning_rates(config: Config) -> np.ndarray:
    """The rate of every step: warm-up over a tenth, then a cosine to a tenth; Adam's bias corrections included."""
    t = np.arange(1, config.steps + 1)
    warm_up = np.minimum(1.0, t / max(1.0, 0.1 * config.steps))
    cosine = 0.55 + 0.45 * np.cos(np.pi * t / config.steps)
    return config.learning_rate * warm_up * cosine * np.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t)


def adam(params: Params, grads: Params, mean: Params, square: Params, rate: Any) -> tuple[Params, Params, Params]:
    """One step of Adam (Kingma and Ba 2015, the form at the end of section 2) on clipped gradients.

    Returns the new params, mean and square.
    """
    xp = array_api_compat.array_namespace(*grads.values())
    b1, b2 = BETAS
    norm = sum(xp.sum(g * g) for g in grads.values()) ** 0.5
    grads = {name: g / xp.clip(norm, min=CLIP) for name, g in grads.items()}
    mean = {name: b1 * mean[name] + (1 - b1) * g for name, g in grads.items()}
    square = {name: b2 * square[name] + (1 - b2) * g * g for name, g in grads.items()}
    params = {name: p - rate * mean[name] / (square[name] ** 0.5 + ADAM_EPS) for name, p in params.items()}
    return params, mean, square
