"""The operator on a sequence that is split over devices: each has a segment, what they exchange is a state each."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32

from kernels_triton import context
from kernels_triton.backend import choose_backend
from kernels_triton.options import check_flag
from kernels_triton.reference import log_sigmoid
from kernels_triton.validation import FORWARD_MODE, check_call, check_segments, no_packed_segments

from .arrays import architecture_of, describe, platform_of
from .executor import varying
from .operator import NAMES, Arrays, States, Static, apply, reference_call
from .sharding import run_batched

STATES = NAMES[5:]


@dataclasses.dataclass(frozen=True)
class Segments:
    """What is fixed at trace time: the call of one segment, and the mesh axis that the segments are on."""

    static: Static
    axis: str
    count: int

    def gather(self, x: Array) -> Array:
        """Every segment's x, (P, ...)."""
        return jax.lax.all_gather(x, self.axis)

    @property
    def index(self) -> Array:
        return jax.lax.axis_index(self.axis)


def _no_stabiliser(arrays: Arrays) -> Arrays:
    return arrays | {"m_initial": jnp.full_like(arrays["m_initial"], context.NO_STABILISER)}


def _run(segments: Segments, save: bool, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The results of a segment's forward pass, and its arrays with the state before it and all segments' decays."""
    from kernels_triton import plan

    static = segments.static
    problem = static.problem
    own = run_batched(plan.segment_state, problem, _no_stabiliser(arrays), static.backend)
    gathered = segments.gather(context.summary(own))
    c, n, m = (arrays[name] for name in STATES)
    before, decays = context.state_before(problem, gathered, (c, n, m), segments.index)
    arrays = arrays | dict(zip(STATES, before, strict=True))
    make = functools.partial(plan.forward_pass, save=save)
    return run_batched(make, problem, arrays, static.backend), arrays | {"decays": decays}


def _outputs(results: Arrays) -> tuple[Array, States]:
    from kernels_triton import plan

    c, n, m = (results[name] for name in plan.LAST)
    return results["h"], (c, n, m)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment(segments: Segments, arrays: Arrays) -> tuple[Array, States]:
    """h of a segment and its own last state, by the kernels. arrays: by NAMES, the states those before segment 0."""
    return _outputs(_run(segments, False, arrays)[0])


def _forward(segments: Segments, arrays: Arrays) -> tuple[tuple[Array, States], Arrays]:
    from kernels_triton import plan

    results, arrays = _run(segments, True, arrays)
    static = segments.static
    kept = plan.segment_saved(static.problem, static.return_last_states) | {"decays"}
    return _outputs(results), {name: x for name, x in (arrays | results).items() if name in kept}


def _backward(segments: Segments, saved: Arrays, cotangents: tuple[Array, States]) -> tuple[Arrays]:
    """The gradients; those of the state before segment 0 are zero but in that segment."""
    from kernels_triton import plan

    static, index = segments.static, segments.index
    problem, last = static.problem, static.return_last_states
    env = dict(saved)
    decays = env.pop("decays")
    env["dh"], (dc, dn, dm) = cotangents
    own, rho = None, None
    if last:
        env |= {"dc_last": dc, "dn_last": dn}
        rho = context.remainder((dc, dn, dm), (env["c_last"], env["n_last"], env["m_last"]))
        own = dc, dn, rho
    make = functools.partial(plan.segment_cotangent, has_dlast=last)
    shares = run_batched(make, problem, env, static.backend)
    told = segments.gather(context.share(shares, env["m_initial"], rho, env.get("picked")))
    dc, dn, rho = context.cotangent_after(problem, told, decays, env["m_last"], own, index)
    env |= shares | {"dc_last": dc, "dn_last": dn} | ({} if rho is None else {"dm_last": rho})
    make = functools.partial(plan.segment_backward, has_rho=last)
    results = run_batched(make, problem, env, static.backend)
    for name in plan.GRADIENTS_INITIAL:
        results[name] = jnp.where(index == 0, results[name], jnp.zeros_like(results[name]))
    return ({name.removeprefix("d"): x for name, x in results.items()},)


_segment.defvjp(_forward, _backward)


def _by_kernels(segments: Segments, arrays: Arrays) -> tuple[Array, States]:
    try:
        return _segment(segments, arrays)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(FORWARD_MODE) from error


def _by_reference(segments: Segments, arrays: Arrays) -> tuple[Array, States]:
    """The reference twice, differentiated as it stands."""
    static = dataclasses.replace(segments.static, return_last_states=True)
    c, n, m = (arrays[name] for name in STATES)
    nothing = {"c_initial": jnp.zeros_like(c), "n_initial": jnp.zeros_like(n)}
    _, own = reference_call(static, _no_stabiliser(arrays | nothing))
    tokens = 1 if static.problem.layout == "bthd" else 2
    decay = log_sigmoid(jnp, arrays["f"].astype(jnp.float32)).sum(tokens)
    gathered = segments.gather(context.pack(*own, decay))
    before, _ = context.state_before(static.problem, gathered, (c, n, m), segments.index)
    return reference_call(static, arrays | dict(zip(STATES, before, strict=True)))


def _inside(given: tuple[Array | None, ...], return_last_states: bool, axis: str, options: dict[str, Any]) -> Any:
    """The call of one device, inside `shard_map`."""
    try:
        count = jax.lax.axis_size(axis)
    except NameError as error:
        raise ValueError(f"axis: expected an axis of the mesh inside shard_map, or mesh=, got {axis!r}") from error
    if count == 1:
        h, last = apply(given, True, options)
    else:
        h, last = _one_of(count, axis, given, return_last_states, options)
    if not return_last_states:
        return h
    # The last segment's, for all: replicated also in the eyes of shard_map, and of its transposition.
    is_last = jax.lax.axis_index(axis) == count - 1
    c, n, m = (jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axis) for x in last)
    return h, (c, n, m)


def _one_of(
    count: int, axis: str, given: tuple[Array | None, ...], return_last_states: bool, options: dict[str, Any]
) -> tuple[Array, States]:
    """h of this device's segment and its own last state."""
    infos = {name: describe(name, x) for name, x in zip(NAMES, given, strict=True)}
    problem = check_call(infos, **options)
    problem = dataclasses.replace(problem, arch=architecture_of(given[0]), has_initial=True)
    head = problem.state_heads
    shapes = dict(zip(STATES, ((*head, problem.K, problem.V), (*head, problem.K), head), strict=True))
    arrays = {name: jnp.asarray(x) for name, x in zip(NAMES, given, strict=True) if x is not None}
    arrays = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()} | arrays
    arrays["m_initial"] = arrays["m_initial"].reshape(head)
    static = Static(problem, choose_backend(options["backend"], platform_of(given[0])), return_last_states)
    segments = Segments(static, axis, count)
    arrays = varying({name: arrays[name] for name in NAMES}, segments.index)
    return (_by_reference if static.backend == "reference" else _by_kernels)(segments, arrays)


def mlstm_context_parallel(
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
    axis: str,
    mesh: Mesh | AbstractMesh | None = None,
    batch_axis: str | None = None,
    head_axis: str | None = None,
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    save_states: bool = True,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    cu_seqlens: None = None,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Array, "B _ _ V"] | tuple[Float[Array, "B _ _ V"], States]:
    """`mlstm_chunkwise` on a sequence whose tokens are split over the devices of a mesh axis.

    Inside `jax.shard_map` each device calls it with its own tokens (q, k, v, i, f and h: its segment); given a mesh, it
    takes the whole arrays and is that `shard_map`. Segments compute side by side; what each hands to the others is one
    state and two or three numbers per head, forward and backward, whatever the number of tokens:
    `kernels_triton.context.exchanged_bytes`; the last states, if asked for, are one sum over the axis more.

    Args:
        q, k, v, i, f: tokens, as of `mlstm_chunkwise`: this device's, or with `mesh` all.
        c_initial, n_initial, m_initial: state before the first token of the whole sequence, the same on all devices of
            the axis; all three or none. Their gradients are those of the whole sequence (inside a shard_map with
            check_vma=False, as for every replicated argument, their sum over the devices is).
        return_last_states: also return the state after the last token of the whole sequence, replicated.
        eps, chunk_size, qk_scale, normalizer_grad, layout, precision, save_states, input_gate, normalize, backend: as
            of `mlstm_chunkwise`.
        axis: the mesh axis that the tokens are split over.
        mesh: the mesh, outside `shard_map`; its devices along `axis` must divide T.
        batch_axis, head_axis: with `mesh`, the mesh axes that batch and heads are split over; other axes compute the
            same.
        cu_seqlens: None: packed sequences cannot be split.

    Returns:
        h like v; with return_last_states (h, (c_last, n_last, m_last)).

    Raises:
        TypeError, ValueError: the argument, what was expected and what came; before anything is launched.
    """
    no_packed_segments(cu_seqlens)
    options: dict[str, Any] = {
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
    given = (q, k, v, i, f, c_initial, n_initial, m_initial)
    check_flag("return_last_states", return_last_states)
    if not isinstance(axis, str):
        raise TypeError(f"axis: expected the name of a mesh axis, got {type(axis).__name__}")
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    if mesh is None:
        for name, x in (("batch_axis", batch_axis), ("head_axis", head_axis)):
            if x is not None:
                raise ValueError(f"{name}: expected None without mesh, got {x!r}")
        return _inside(given, return_last_states, axis, options)

    problem = check_call({name: describe(name, x) for name, x in zip(NAMES, given, strict=True)}, **options)
    check_segments(problem, dict(mesh.shape), {"axis": axis, "batch_axis": batch_axis, "head_axis": head_axis})
    states = PartitionSpec(batch_axis, head_axis)
    tokens = PartitionSpec(batch_axis, *((axis, head_axis) if layout == "bthd" else (head_axis, axis)))
    call = functools.partial(_inside, return_last_states=return_last_states, axis=axis, options=options)
    names = [name for name, x in zip(NAMES, given, strict=True) if x is not None]

    def inside(*arrays: Array) -> Any:
        here = dict(zip(names, arrays, strict=True))
        return call(tuple(here.get(name) for name in NAMES))

    takes = tuple(states if name in STATES else tokens for name in names)
    gives = (tokens, (states,) * 3) if return_last_states else tokens
    run: Any = jax.shard_map(inside, mesh=mesh, in_specs=takes, out_specs=gives)
    arrays = [x for x in given if x is not None]
    if AxisType.Explicit in mesh.axis_types:  # where shard_map moves nothing by itself
        arrays = [jax.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, takes, strict=True)]
    return run(*arrays)
