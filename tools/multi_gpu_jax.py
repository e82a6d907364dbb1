"""The part of tools.multi_gpu_check that one process does in JAX, on all devices."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import frontend_jax
from kernels_triton import context

from . import compare
from .cases import Arrays, Case, make_inputs
from .multi_gpu_worker import (
    BATCH,
    CONTEXT,
    EQUAL,
    LENGTHS,
    SHARDED,
    Place,
    equality,
    options_of,
    scaling,
    timed,
)

ARRAY = re.compile(r"f32\[([\d,]+)\]")


def gathered_bytes(text: str, devices: int) -> list[int]:
    """What one device hands to each all-gather of a compiled program, in order."""
    found = []
    for line in re.findall(r"= (.*?) all-gather(?:-start)?\(", text):
        # Of an asynchronous one the operand stands beside the result.
        sizes = [np.prod([int(x) for x in dims.split(",")], dtype=np.int64) for dims in ARRAY.findall(line)]
        found.append(4 * int(max(sizes)) // devices)
    return found


def _mesh(place: Place) -> Any:
    devices = jax.devices()[: place.devices]
    return jax.make_mesh((place.devices,), ("seq",), axis_types=(AxisType.Auto,), devices=devices)


def _both(function: Callable[..., Any], inputs: Any, cotangents: Any) -> tuple[Any, Any]:
    outputs, pull = jax.vjp(function, *inputs)
    return outputs, pull(cotangents)


def _by_tokens(place: Place, **options: Any) -> Callable[..., Any]:
    return functools.partial(frontend_jax.mlstm_context_parallel, mesh=_mesh(place), axis="seq", **options)


def _split(place: Place, case: Case, arrays: Arrays) -> Arrays:
    """Results of a case with last states, split over tokens."""
    inputs = [arrays[name] for name in case.inputs]
    h, *last = (arrays[f"d_{name}"] for name in case.outputs)
    function = _by_tokens(place, **options_of(case, place))
    (out, states), gradients = jax.jit(functools.partial(_both, function))(inputs, (h, tuple(last)))
    names = (*case.outputs, *(f"d{name}" for name in case.inputs))
    return {name: np.asarray(x) for name, x in zip(names, (out, *states, *gradients), strict=True)}


def _equal(place: Place) -> None:
    for case in EQUAL[place.device]:
        arrays = make_inputs(case)
        one = compare.run_jax(frontend_jax.mlstm_chunkwise, options_of(case, place), case, arrays, place.device)
        place.add("equality", equality(case, arrays, one, _split(place, case, arrays), place.device))


def _bits(place: Place) -> None:
    """XLA's partitioner over batch and over heads: the bits of one device."""
    case = SHARDED[place.device]
    arrays = make_inputs(case)
    inputs, dh = [arrays[name] for name in case.inputs], arrays["d_h"]
    function = functools.partial(frontend_jax.mlstm_chunkwise, **options_of(case, place))
    call = jax.jit(functools.partial(_both, function))
    one = call(*jax.device_put((inputs, dh), jax.devices()[0]))
    for name, spec in (("batch", PartitionSpec("seq")), ("heads", PartitionSpec(None, "seq"))):
        many = call(*jax.device_put((inputs, dh), NamedSharding(_mesh(place), spec)))
        pairs = zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (one, many)), strict=True)
        same = all(compare.identical(x, y) for x, y in pairs)
        place.add("bits", {"split": name, "case": case.name, "same": same})


def _draw(place: Place, shape: Sequence[int], sharding: Any) -> tuple[list[jax.Array], jax.Array]:
    """q, k, v, i, f and dh."""
    B, H, T, K, V = shape
    dtype = jnp.bfloat16 if place.device == "cuda" else jnp.float32
    shapes = [((B, H, T, D), dtype) for D in (K, K, V, V)] + [((B, H, T), jnp.float32)] * 2

    @functools.partial(jax.jit, out_shardings=sharding)
    def make(key: Any) -> list[jax.Array]:
        keys = jax.random.split(key, len(shapes))
        return [jax.random.normal(x, s, d) for x, (s, d) in zip(keys, shapes, strict=True)]

    q, k, v, dh, i, f = make(jax.random.key(0))
    return [q, k, v, i, f + 4], dh


def _times(place: Place, function: Callable[..., Any], shape: Sequence[int], sharding: Any) -> dict[str, float]:
    inputs, dh = _draw(place, shape, sharding)
    forward, both = jax.jit(function), jax.jit(functools.partial(_both, function))
    calls: dict[str, Callable[[], Any]] = {"fw": lambda: forward(*inputs), "fw+bw": lambda: both(inputs, dh)}
    return {name: timed(call, jax.block_until_ready, place.device) for name, call in calls.items()}


def _scale(place: Place) -> None:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    one_device = functools.partial(frontend_jax.mlstm_chunkwise, backend=place.timed_backend)
    by_tokens = _by_tokens(place, backend=place.timed_backend)
    for name, shape, spec, function in (
        (
            "tokens",
            CONTEXT[place.device],
            PartitionSpec(None, None, "seq"),
            by_tokens,
        ),
        ("batch", BATCH[place.device], PartitionSpec("seq"), one_device),
    ):
        one = _times(place, one_device, shape, first)
        many = _times(place, function, shape, NamedSharding(_mesh(place), spec))
        place.add("scaling", *scaling(name, shape, {x: (one[x], many[x]) for x in one}))


def _count(place: Place) -> None:
    """Bytes of the all-gathers of the compiled program."""
    B, H, _, K, V = CONTEXT[place.device]
    function = _by_tokens(place, backend=place.backend)
    sharding = NamedSharding(_mesh(place), PartitionSpec(None, None, "seq"))
    for T in LENGTHS[place.device]:
        inputs, dh = _draw(place, (B, H, T * place.devices, K, V), sharding)
        text = jax.jit(functools.partial(_both, function)).lower(inputs, dh).compile().as_text() or ""
        formula = context.exchanged_bytes(B, H, K, V)
        # Smaller first: the forward pass's.
        for pass_, bytes_, expected in zip(
            ("forward", "backward"), sorted(gathered_bytes(text, place.devices)), formula, strict=True
        ):
            place.add("bytes", {"pass": pass_, "tokens": T, "formula": expected, "measured": bytes_})


def run(place: Place) -> None:
    """All parts."""
    if len(jax.devices()) < place.devices:
        raise RuntimeError(f"JAX: expected {place.devices} devices, got {jax.devices()}")
    for part in (_equal, _bits, _count, _scale):
        part(place)
