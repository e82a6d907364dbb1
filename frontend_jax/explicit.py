"""A call on arrays whose types carry their sharding (mesh axes of `AxisType.Explicit`): a `shard_map` as q is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kernels_triton.problem import Problem

from .executor import Arrays
from .sharding import local_problem, spec_as_q


def explicit_mesh(arrays: Arrays) -> Any:
    """The mesh of the first array, q before all, whose type has explicit axes; None where none has."""
    for x in arrays.values():
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def on_every_device(function: Callable[[Arrays], Arrays], mesh: Any, arrays: Arrays) -> Arrays:
    """function of whole arrays, which each device computes for itself."""
    whole = PartitionSpec()
    here: Any = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole))
    found: Arrays = here({name: jax.reshard(x, NamedSharding(mesh, whole)) for name, x in arrays.items()})
    return found


def as_q_is_split(
    function: Callable[[Problem, Arrays], Any], mesh: Any, problem: Problem, arrays: Arrays, with_last: bool
) -> Any:
    """function of each device's part of batch and heads; h, and with_last the states, carry q's sharding over them.

    What is split otherwise (tokens, a head's dims, other arrays not as q) is brought into that form first.
    """
    spec = jax.typeof(arrays["q"]).sharding.spec

    def split(name: str, rank: int) -> PartitionSpec:
        return spec_as_q(name, rank, problem, spec)

    def inside(parts: Arrays) -> Any:
        return function(local_problem(problem, parts["q"].shape), parts)

    takes = {name: split(name, x.ndim) for name, x in arrays.items()}
    last = split("c_last", 4), split("n_last", 3), split("m_last", 2)
    gives = (split("h", 4), last) if with_last else split("h", 4)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    own = {name for name, kind in kinds.items() if kind == AxisType.Explicit}
    # None of them named where they are all: shard_map then leaves out what an enclosing vmap has taken.
    here: Any = jax.shard_map(
        inside, mesh=mesh, in_specs=(takes,), out_specs=gives, axis_names=set() if len(own) == len(kinds) else own
    )
    return here({name: jax.reshard(x, NamedSharding(mesh, takes[name])) for name, x in arrays.items()})
