"""The token-by-token forms for JAX: a short sequence, and one token of inference."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from kernels_triton.backend import choose_backend
from kernels_triton.options import check_flag
from kernels_triton.validation import check_step

from .arrays import architecture_of, describe, platform_of
from .executor import varying
from .operator import NAMES, States, Static, apply, call

STEP = ("q", "k", "v", "i", "f", "c", "n", "m")


def mlstm_recurrent(
    q: Float[Array, "B _ _ K"],
    k: Float[Array, "B _ _ K"],
    v: Float[Array, "B _ _ V"],
    i: Float[Array, "B _ _"],
    f: Float[Array, "B _ _"],
    c_initial: Float[Array, "B H K V"] | None = None,
    n_initial: Float32[Array, "B H K"] | None = None,
    m_initial: Float32[Array, "B H"] | Float32[Array, "B H 1"] | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    *,
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Array, "B _ _ V"] | tuple[Float[Array, "B _ _ V"], States]:
    """The mLSTM token by token in one kernel: for short sequences, and as a check of `mlstm_chunkwise`.

    Arguments, results and errors as of `mlstm_chunkwise`, which takes this form by itself for up to 16 tokens without
    gradients. c_initial may be bfloat16, and c_last is then. The backward pass is that of the chunkwise form
    (precision: of its products).
    """
    options = {
        "eps": eps,
        "chunk_size": None,
        "qk_scale": qk_scale,
        "normalizer_grad": normalizer_grad,
        "layout": layout,
        "precision": precision,
        "save_states": True,
        "input_gate": input_gate,
        "normalize": normalize,
        "backend": backend,
    }
    return apply((q, k, v, i, f, c_initial, n_initial, m_initial), return_last_states, options, "recurrent")


def mlstm_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    i: Float[Array, "B H"],
    f: Float[Array, "B H"],
    c: Float[Array, "B H K V"],
    n: Float32[Array, "B H K"],
    m: Float32[Array, "B H"] | Float32[Array, "B H 1"],
    *,
    eps: float = 1e-6,
    qk_scale: float | None = None,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    donate_states: bool = False,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> tuple[Float[Array, "B H V"], States]:
    """One token: h and the next state, in one kernel that reads the state once and writes it once.

    Args:
        q, k: (B, H, K); v: (B, H, V); i, f: pre-activations (B, H). Dtypes and other options as of `mlstm_chunkwise`.
        c, n, m: the state, (B, H, K, V) float32 or bfloat16, (B, H, K) float32, (B, H) or (B, H, 1) float32; zeros
            before the first token. A bfloat16 c is computed in float32 and rounded once per step.
        donate_states: the next c takes the memory of c. For a c that nothing else needs: donated
            (`jax.jit(..., donate_argnums=...)`) or carried by a loop; of any other XLA makes a copy first. Same values.

    Returns:
        h (B, H, V) in the dtype of v, and the next (c, n, m), m of (B, H).

    Differentiable; the backward pass is that of the chunkwise form. All arguments but the arrays are static.
    """
    given: dict[str, Any] = dict(zip(STEP, (q, k, v, i, f, c, n, m), strict=True))
    check_flag("donate_states", donate_states)
    problem = check_step(
        {name: describe(name, x) for name, x in given.items()},
        eps=eps,
        qk_scale=qk_scale,
        input_gate=input_gate,
        normalize=normalize,
        backend=backend,
    )
    problem = dataclasses.replace(problem, arch=architecture_of(q), donate=donate_states)
    static = Static(problem, choose_backend(backend, platform_of(q)), return_last_states=True)
    arrays = varying({name: jnp.asarray(x) for name, x in zip(NAMES, given.values(), strict=True)})
    arrays = {name: x[:, :, None] if name in NAMES[:5] else x for name, x in arrays.items()}
    arrays["m_initial"] = arrays["m_initial"].reshape(problem.B, problem.H)
    h, last = call(static, arrays)
    return h[:, :, 0], last
