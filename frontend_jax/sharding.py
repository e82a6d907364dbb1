"""What transformations make of a pass: `vmap` widens its batch, XLA's partitioner splits it over batch and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from kernels_triton.config import configure
from kernels_triton.launch import Pass
from kernels_triton.problem import Problem, contiguous_strides
from kernels_triton.validation import TWICE

from .executor import Arrays, run

# Arrays with an axis of tokens; all others are (B, H, ...).
TOKENS = frozenset(["q", "k", "v", "i", "f", "h", "dq", "dk", "dv", "di", "df", "dh"])
OFFSETS = ("cu_seqlens", "chunks")


def _axes(name: str, problem: Problem) -> tuple[int | None, int | None]:
    """The axes of batch and heads of an array; None where it has none that can be split."""
    if problem.sequences and name in OFFSETS:
        return None, None
    heads = 2 if name in TOKENS and problem.layout == "bthd" else 1
    return None if problem.sequences else 0, heads


def _rule(problem: Problem, operands: Sequence[tuple[str, int]], results: Sequence[tuple[str, int]]) -> Any:
    """Shardy's rule for arrays of these names and ranks: b and h may be split, all other factors must be whole."""
    whole: list[str] = []

    def factors(name: str, rank: int) -> str:
        batch, heads = _axes(name, problem)
        found = []
        for axis in range(rank):
            if axis in (batch, heads):
                found.append("b" if axis == batch else "h")
            else:
                found.append(f"x{len(whole)}")
                whole.append(found[-1])
        return " ".join(found)

    rule = " -> ".join(", ".join(factors(*x) for x in group) for group in (operands, results))
    return rule, {"need_replication_factors": tuple(whole)}


def spec_as_q(name: str, rank: int, problem: Problem, spec: Sequence[Any]) -> PartitionSpec:
    """How an array is split where all is as q is, over batch and heads alone. spec: q's."""
    spec, own = [*spec, *[None] * 4], [None] * rank
    for axis, of_q in zip(_axes(name, problem), _axes("q", problem), strict=True):
        if axis is not None and of_q is not None:
            own[axis] = spec[of_q]
    return PartitionSpec(*own)


def local_problem(problem: Problem, q_shape: Sequence[int]) -> Problem:
    """The problem of one device, in the chunks of the whole one: what passes hand on is cut along B and H alone.

    q_shape: of the device's part of q.
    """
    B, H = q_shape[0], q_shape[2 if problem.layout == "bthd" else 1]
    dims = {"q": problem.K, "k": problem.K, "v": problem.V, "i": 1, "f": 1}
    strides = tuple((name, contiguous_strides(H, problem.T, D, problem.layout)) for name, D in dims.items())
    local = dataclasses.replace(problem, B=B, H=H, strides=strides)
    L = configure(problem).L
    return local if configure(local).L == L else dataclasses.replace(local, chunk_size=L)


def run_sharded(make: Callable[[Problem], Pass], problem: Problem, arrays: Arrays, backend: str) -> Arrays:
    """Execute a problem's pass; on several devices each its part. Axes but batch and heads are gathered first."""
    program = make(problem)
    if backend == "interpret":  # a callback, which JAX can run in one place only: it drops those of a partitioned call
        return run(program, arrays, backend)
    names = program.inputs
    operands = [(name, arrays[name].ndim) for name in names]
    results = [(name, len(program.spec(name).shape)) for name in program.results]

    def pass_of(problem: Problem) -> Callable[..., tuple[jax.Array, ...]]:
        def call(*values: jax.Array) -> tuple[jax.Array, ...]:
            found = run(make(problem), dict(zip(names, values, strict=True)), backend)
            return tuple(found[name] for name in program.results)

        return call

    def shardings(mesh: Any, given: Sequence[Any], of: Sequence[tuple[str, int]]) -> tuple[NamedSharding, ...]:
        spec = given[names.index("q")].sharding.spec
        return tuple(NamedSharding(mesh, spec_as_q(name, rank, problem, spec)) for name, rank in of)

    def partition(mesh: Any, given: Sequence[Any], made: Any) -> Any:
        takes, gives = shardings(mesh, given, operands), shardings(mesh, given, results)
        at = names.index("q")
        local = local_problem(problem, takes[at].shard_shape(given[at].shape))
        return mesh, pass_of(local), gives, takes

    execute = custom_partitioning(pass_of(problem))
    execute.def_partition(
        partition,
        infer_sharding_from_operands=lambda mesh, given, made: shardings(mesh, given, results),
        sharding_rule=lambda mesh, given, made: _rule(problem, operands, results),
    )
    return dict(zip(program.results, execute(*(arrays[name] for name in names)), strict=True))


def run_batched(make: Callable[[Problem], Pass], problem: Problem, arrays: Arrays, backend: str) -> Arrays:
    """Execute a problem's pass. Under `jax.vmap` the mapped axis becomes part of the batch: one pass, not a loop.

    Packed sequences have no batch: they do run one after the other.
    """

    @jax.custom_batching.custom_vmap
    def execute(arrays: Arrays) -> Arrays:
        return run_sharded(make, problem, arrays, backend)

    @jax.custom_jvp
    def once(arrays: Arrays) -> Arrays:
        found: Arrays = execute(arrays)
        return found

    @once.defjvp
    def _(*_: Any) -> Any:
        raise TypeError(TWICE)

    @execute.def_vmap
    def _(size: int, is_mapped: list[dict[str, bool]], arrays: Arrays) -> tuple[Arrays, dict[str, bool]]:
        mapped = {name: x for name, x in arrays.items() if is_mapped[0][name]}
        if problem.sequences:
            results: Arrays = jax.lax.map(lambda x: run_batched(make, problem, arrays | x, backend), mapped)
        else:
            shared = {name: jnp.broadcast_to(x, (size, *x.shape)) for name, x in arrays.items() if name not in mapped}
            wide = {name: x.reshape(-1, *x.shape[2:]) for name, x in (mapped | shared).items()}
            many = run_batched(make, dataclasses.replace(problem, B=size * problem.B), wide, backend)
            results = {name: x.reshape(size, -1, *x.shape[1:]) for name, x in many.items()}
        return results, dict.fromkeys(results, True)

    found: Arrays = once(arrays)
    return found
