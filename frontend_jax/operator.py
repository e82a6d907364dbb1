"""The operator for JAX: argument checks, custom_vjp, and the choice of backend. No numerics of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Float32, Int

from kernels_triton import packing, reference
from kernels_triton.backend import choose_backend
from kernels_triton.options import check_flag
from kernels_triton.packing import ChunkTable
from kernels_triton.problem import Problem
from kernels_triton.validation import FORWARD_MODE, check_call

from .arrays import architecture_of, describe, platform_of
from .executor import varying
from .explicit import as_q_is_split, explicit_mesh
from .packing import check_known_offsets, packed_arguments
from .sharding import run_batched

States = tuple[Float32[Array, "B H K V"], Float32[Array, "B H K"], Float32[Array, "B H"]]
NAMES = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial")
PACKED = ("cu_seqlens", "chunks")  # for packed sequences: their offsets, their chunk table
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Static:
    """What is fixed at trace time."""

    problem: Problem
    backend: str
    return_last_states: bool
    integers: tuple[tuple[str, tuple[int, ...]], ...] = ()  # arrays without gradients: names and shapes


def _outputs(static: Static, results: Arrays) -> Any:
    from kernels_triton import plan

    last = tuple(results[name] for name in plan.LAST)
    return (results["h"], last) if static.return_last_states else results["h"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernels_call(static: Static, arrays: Arrays) -> Any:
    """The kernels' forward pass; differentiated, their two passes."""
    from kernels_triton import plan

    make = functools.partial(plan.forward_pass, save=False)
    return _outputs(static, run_batched(make, static.problem, arrays, static.backend))


def _forward(static: Static, primals: dict[str, Any]) -> tuple[Any, Arrays]:
    """primals: each with its value and whether it is differentiated, as symbolic zeros have it."""
    from kernels_triton import plan

    arrays = {name: x.value for name, x in primals.items()}
    results = run_batched(plan.forward_pass, static.problem, arrays, static.backend)
    kept = plan.saved(static.problem, static.return_last_states)
    return _outputs(static, results), {name: x for name, x in (arrays | results).items() if name in kept}


def _materialised(x: Array | SymbolicZero) -> Array:
    """A cotangent as an array, zeros where nothing depends on its output."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x


def _backward(static: Static, saved: Arrays, cotangents: Any) -> tuple[Arrays]:
    from kernels_triton import plan

    dh, dlast = cotangents if static.return_last_states else (cotangents, ())
    # As in PyTorch, the pass is one without cotangents of last states where the loss does not depend on these.
    has_dlast = not all(isinstance(x, SymbolicZero) for x in dlast)
    given = {"dh": dh} | (dict(zip(map("d{}".format, plan.LAST), dlast, strict=True)) if has_dlast else {})
    env = varying(saved | {name: _materialised(x) for name, x in given.items()})
    make = functools.partial(plan.backward_pass, has_dlast=has_dlast)
    results = run_batched(make, static.problem, env, static.backend)
    gradients: dict[str, Any] = {name.removeprefix("d"): x for name, x in results.items()}
    return (gradients | {name: np.zeros(shape, jax.dtypes.float0) for name, shape in static.integers},)


kernels_call.defvjp(_forward, _backward, symbolic_zeros=True)


def _here(static: Static, arrays: Arrays) -> Any:
    return (reference_call if static.backend == "reference" else kernels_call)(static, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _over_mesh(static: Static, mesh: Any, arrays: Arrays) -> Any:
    """On arrays whose types say how they are split. Compiled, as only then arrays of no mesh may be among them."""

    def part(problem: Problem, arrays: Arrays) -> Any:
        return _here(dataclasses.replace(static, problem=problem), arrays)

    return as_q_is_split(part, mesh, static.problem, arrays, static.return_last_states)


def call(static: Static, arrays: Arrays) -> Any:
    """h, and the last states where they are asked for, by the backend that is settled."""
    mesh = explicit_mesh(arrays)
    try:
        return _here(static, arrays) if mesh is None else _over_mesh(static, mesh, arrays)
    except TypeError as error:
        if static.backend == "reference" or "forward-mode" not in str(error):
            raise
        raise TypeError(FORWARD_MODE) from error


@functools.partial(jax.jit, static_argnums=(0,))
def reference_call(static: Static, arrays: Arrays) -> Any:
    """The readable reference in float32."""
    problem = static.problem
    q, k, v, i, f = (arrays[name] for name in NAMES[:5])
    if problem.layout == "bthd":
        q, k, v, i, f = (x.swapaxes(1, 2) for x in (q, k, v, i, f))
    head = problem.state_heads
    shapes = {"c_initial": (*head, problem.K, problem.V), "n_initial": (*head, problem.K), "m_initial": head}
    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
    given = {name: arrays[name].astype(jnp.float32) for name in zeros if name in arrays}
    states = varying(zeros | given, q).values()
    cell: Any = reference.recurrent
    if problem.form == "chunkwise":
        cell = functools.partial(reference.chunkwise, chunk_size=problem.chunk_size or 64, scan=jax.lax.scan)
    cell = functools.partial(
        cell,
        scale=problem.scale,
        eps=problem.eps,
        normalizer_grad=problem.normalizer_grad,
        input_gate=problem.input_gate,
        normalize=problem.normalize,
        stop_gradient=jax.lax.stop_gradient,
    )
    tokens = [x.astype(jnp.float32) for x in (q, k, v, i, f)]
    with jax.default_matmul_precision("float32"):
        if problem.sequences:
            h, last = packing.reference(cell, arrays["cu_seqlens"], tokens, tuple(states))
        else:
            h, last = cell(*tokens, *states)
    h = h.astype(v.dtype)
    h = h.swapaxes(1, 2) if problem.layout == "bthd" else h
    last = (last[0].astype(problem.c_dtype), *last[1:])
    return (h, last) if static.return_last_states else h


def apply(
    given: tuple[Array | None, ...], return_last_states: bool, options: dict[str, Any], form: str = "chunkwise"
) -> Any:
    """h, with the last states if they are asked for.

    given: by NAMES, perhaps cu_seqlens and chunk_table after them; options: of `check_call`.
    """
    check_flag("return_last_states", return_last_states)
    infos = {name: describe(name, x) for name, x in zip((*NAMES, "cu_seqlens", "chunk_table"), given, strict=False)}
    problem = check_call(infos, **options, form=form)
    if problem.sequences:
        check_known_offsets(given[len(NAMES)], problem.T)
    q = given[0]
    problem = dataclasses.replace(problem, arch=architecture_of(q))
    names = (*NAMES, *PACKED)
    arrays = varying({name: jnp.asarray(x) for name, x in zip(names, given, strict=False) if x is not None})
    if "m_initial" in arrays:
        arrays["m_initial"] = arrays["m_initial"].reshape(problem.state_heads)
    integers = tuple((name, arrays[name].shape) for name in PACKED if name in arrays)
    static = Static(problem, choose_backend(options["backend"], platform_of(q)), return_last_states, integers)
    return call(static, arrays)


def mlstm_chunkwise(
    q: Float[Array, "B _ _ K"],
    k: Float[Array, "B _ _ K"],
    v: Float[Array, "B _ _ V"],
    i: Float[Array, "B _ _"],
    f: Float[Array, "B _ _"],
    c_initial: Float32[Array, "B H K V"] | None = None,
    n_initial: Float32[Array, "B H K"] | None = None,
    m_initial: Float32[Array, "B H"] | Float32[Array, "B H 1"] | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    *,
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    save_states: bool = True,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    cu_seqlens: Int[Array, " offsets"] | None = None,
    chunk_table: ChunkTable | None = None,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Array, "B _ _ V"] | tuple[Float[Array, "B _ _ V"], States]:
    """The mLSTM over a whole sequence, chunk by chunk, differentiable in all eight arrays.

    h_t = C_t^T (s q_t) / (max(|n_t . s q_t|, exp(-m_t)) + eps), with C_t = f' C_{t-1} + i' k_t v_t^T, n_t alike, and
    exponential input gate and sigmoid forget gate stabilised by m_t (Beck et al. 2024, arXiv:2405.04517; chunkwise
    form: Beck et al. 2025, arXiv:2503.14376). Equations and gradients: docs/architecture.md.

    Args:
        q, k: queries and keys, (B, H, T, K) or with layout="bthd" (B, T, H, K); float32, bfloat16 or float16.
        v: values, (B, H, T, V) or (B, T, H, V), in the dtype of q. 1 <= K, V <= 512, T >= 1.
            A NaN in v reaches earlier tokens too: those of its own chunk and head.
        i, f: input and forget gate pre-activations (natural-log units), (B, H, T) or (B, T, H); any float dtype,
            computed in float32 or better.
        c_initial, n_initial, m_initial: state before the first token, (B, H, K, V), (B, H, K), (B, H) or (B, H, 1),
            float32; all three or none (then zeros).
        return_last_states: also return the state after the last token.
        eps: added to the normaliser.
        chunk_size: tokens per chunk, a power of two from 16 to 512; None: the best for the shape. The result is the
            same to rounding. So is, in float32, h of the first tokens alone: to rounding, not to the bit.
        qk_scale: s above; None: K ** -0.5.
        normalizer_grad: "exact", or "detached": the normaliser is a constant in the backward pass, as in mlstm-kernels
            (right only if a scale-invariant norm follows h).
            "exact" is the derivative of h with m held constant where eps is added: the gates' gradients are off by
            about eps / d (1e-6 at the default eps, 30 % at eps = 0.5). An exact tie in a maximum sends the whole
            cotangent one way, where autodiff halves it.
        layout: axis order of q, k, v, i, f and h. Both are read in place.
        precision: of products of float32 inputs: "ieee", "tf32x3" or "tf32".
        save_states: keep the chunks' states for the backward pass; False: compute them again there, which takes less
            memory and more time. Same gradients.
        input_gate: "exponential", or "sigmoid": i' = sigmoid(i), and m is 0 throughout (but for m_initial, which scales
            the initial state as ever).
        normalize: False, with the sigmoid gate only: h_t = C_t^T (s q_t). Then n is neither read nor computed: n_last
            is 0.
        cu_seqlens: packed sequences, for B = 1 and layout "bthd": N + 1 offsets, int32 or int64; sequence s has tokens
            cu_seqlens[s] to cu_seqlens[s + 1] - 1, perhaps none. States are (N, H, ...) then, one per sequence. Checked
            where they are a NumPy array; elsewhere offsets that do not go from 0 to T, or go down, give wrong
            results.
        chunk_table: `make_chunk_table(cu_seqlens, T, chunk_size)`, to share between calls; without it each makes its
            own. cu_seqlens may then be None. One made for another T, chunk_size or number of sequences is refused, as
            are cu_seqlens on the host that are not the table's; where they differ on a device or are traced, h
            and the gradients of q, k, v, i and f are NaN.
        backend: "triton" (CUDA or ROCm device), "interpret" (the same kernels on a CPU under TRITON_INTERPRET=1, slow),
            "reference" (native operations, any device), "auto" (triton on a GPU, else reference).

    All arguments but the arrays are static: Python values, fixed when a function is traced.

    Returns:
        h like v; with return_last_states (h, (c_last, n_last, m_last)), states float32 as the initial ones, m (B, H).

    Raises:
        TypeError, ValueError: the argument, what was expected and what came; before anything is launched.
    """
    options = {
        "eps": eps,
        "chunk_size": chunk_size,
        "qk_scale": qk_scale,
        "normalizer_grad": normalizer_grad,
        "layout": layout,
        "precision": precision,
        "save_states": save_states,
        "input_gate": input_gate,
        "normalize": normalize,
        "backend": backend,
    }
    offsets, table, i = packed_arguments(cu_seqlens, chunk_table, q, i, chunk_size, layout)
    arrays = (q, k, v, i, f, c_initial, n_initial, m_initial, offsets, table)
    return apply(arrays, return_last_states, options)
