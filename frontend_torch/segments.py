"""One segment of a split sequence as a registered operator: what processes exchange is inside, unseen by compilers.

`torch.ops.mlstm_dual.segment` and `segment_backward`; the group of processes goes by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup, distributed_c10d

from kernels_triton import context
from kernels_triton.problem import Problem
from kernels_triton.validation import check_call

from .adapter import readable_cotangent
from .calls import NAMES, RESULTS, Call, Tensors, is_transposed, settle
from .executor import run
from .registry import COTANGENTS, GRADIENTS, SAVED, empty, library, like, register, schema, twice
from .registry import OPTIONS as SHARED_OPTIONS
from .tensors import describe, dtype_of, head_strides

OWN = ("c_own", "n_own", "m_own")  # the segment's last states, where the results are the whole sequence's
BEFORE = ("c_before", "n_before", "m_before")  # the states before the segment
KEPT = (*OWN, *BEFORE, "decays", *SAVED)  # for the backward pass, with h; empty where there is no need
OPTIONS = SHARED_OPTIONS | {"group": "str"}

# What PyTorch's own functional collectives take.
_group_named: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
# Its name from PyTorch 2.13 on, where the other one warns.
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


@dataclasses.dataclass(frozen=True)
class Segments:
    """Which segment of how many this process has."""

    group: ProcessGroup
    index: int
    count: int

    @staticmethod
    def of(group: ProcessGroup) -> Segments:
        return Segments(group, distributed.get_rank(group), distributed.get_world_size(group))

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def gather(self, x: Tensor) -> Tensor:
        """Every segment's x, (P, ...)."""
        found = x.new_empty((self.count * x.shape[0], *x.shape[1:]))
        _all_gather(found, x.contiguous(), group=self.group)
        return found.unflatten(0, (self.count, -1))

    def from_last(self, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """The last segment's states, for all."""
        packed = context.pack(c, n, m)
        distributed.broadcast(packed, group_src=self.count - 1, group=self.group)
        c, n, (m,) = context.unpack(packed, *c.shape[2:])
        return _apart(c, n, m)

    def to_last(self, dc: Tensor, dn: Tensor, dm: Tensor) -> tuple[Tensor, ...]:
        """The sums of all processes' cotangents of `from_last`, for the last segment; zeros for the others."""
        packed = context.pack(dc, dn, dm)
        distributed.all_reduce(packed, group=self.group)
        if not self.is_last:
            packed.zero_()
        dc, dn, (dm,) = context.unpack(packed, *dc.shape[2:])
        return _apart(dc, dn, dm)


def _apart(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous tensors in memory of their own, as an operator's results must be."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _segments(name: str) -> Segments:
    return Segments.of(_group_named(name))


def _named(arguments: Sequence[Any]) -> tuple[Tensors, dict[str, Any], str]:
    """The tensors by NAMES, the options of `check_call`, and the group's name."""
    options = dict(zip(OPTIONS, arguments[len(NAMES) :], strict=False))
    return tuple(arguments[: len(NAMES)]), options, options.pop("group")


def _handed_on(results: Mapping[str, Tensor], q: Tensor, layout: str) -> tuple[Tensor, ...]:
    return tuple(results[x] if x in results else empty(q, layout) for x in (*RESULTS, *KEPT))


def compute(call: Call, tensors: Tensors, segments: Segments, save: bool, last: bool) -> dict[str, Tensor]:
    """h, what is saved, and with `last` the whole sequence's last states, by name. call, tensors: as `settle` gives."""
    from kernels_triton import plan

    problem = call.problem
    env = {name: x for name, x in zip(NAMES, tensors, strict=True) if x is not None}
    nothing = torch.full_like(env["m_initial"], context.NO_STABILISER)
    own = run(plan.segment_state(problem), env | {"m_initial": nothing}, call.backend)
    gathered = segments.gather(context.summary(own))
    first = env["c_initial"], env["n_initial"], env["m_initial"]
    before, decays = context.state_before(problem, gathered, first, segments.index)
    before = tuple(x.contiguous() for x in before)
    env |= dict(zip(NAMES[5:], before, strict=True))
    results = run(plan.forward_pass(problem, save, None, True), env, call.backend)
    if call.transposed:
        results["h"] = results["h"].transpose(1, 2)
    own_last = tuple(results.pop(name) for name in RESULTS[1:])
    if save:
        results |= dict(zip((*OWN, *BEFORE, "decays"), (*own_last, *before, decays.contiguous()), strict=True))
    if last:
        results |= dict(zip(RESULTS[1:], segments.from_last(*own_last), strict=True))
    return results


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    given, options, group = _named(arguments)
    save, last = arguments[-2:]
    call, tensors = settle(given, options)
    segments = _segments(group)
    results = compute(call, tensors, segments, save, last)
    if save and not segments.index:  # the state before segment 0 is an argument: results have their own memory
        results |= dict(zip(BEFORE, _apart(*(results[name] for name in BEFORE)), strict=True))
    q = given[0]
    assert q is not None
    return _handed_on(results, q, options["layout"])


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    from kernels_triton import plan

    tensors, options, group = _named(arguments)
    save, last = arguments[-2:]
    problem = check_call({name: describe(name, x) for name, x in zip(NAMES, tensors, strict=True)}, **options)
    q, v, c, n, m = (tensors[x] for x in (0, 2, 5, 6, 7))
    assert q is not None and v is not None and c is not None and n is not None and m is not None
    specs = plan.forward_results(problem, save)
    made = {name: q.new_empty(spec.shape, dtype=dtype_of(spec.dtype)) for name, spec in specs.items()}
    made["h"] = like(v, is_transposed(v, options["layout"]))
    states = [made.pop(name) for name in RESULTS[1:]]
    if save:
        decays = m.new_empty((_segments(group).count, *problem.state_heads))
        made |= dict(zip((*OWN, *BEFORE, "decays"), (*states, *map(torch.empty_like, states), decays), strict=True))
    if last:
        made |= dict(zip(RESULTS[1:], map(torch.empty_like, states), strict=True))
    return _handed_on(made, q, options["layout"])


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Those of the state before segment 0 are zero but in that segment."""
    from kernels_triton import plan

    (dh, *dlast), rest = arguments[: len(COTANGENTS)], arguments[len(COTANGENTS) :]
    given, options, group = _named((*rest[: len(NAMES)], *rest[-len(OPTIONS) - 1 :]))
    h, *kept = rest[len(NAMES) : -len(OPTIONS) - 1]
    last = arguments[-1]
    call, tensors = settle(given, options)
    segments, problem = _segments(group), call.problem
    env = {name: x for name, x in zip(NAMES[:5], tensors, strict=False) if x is not None}
    made = {name: x.contiguous() for name, x in zip(KEPT, kept, strict=True)}  # whatever a compiler made of them
    env |= dict(zip((*RESULTS[1:], *NAMES[5:]), (made.pop(name) for name in OWN + BEFORE), strict=True))
    decays = made.pop("decays")
    env |= {name: x for name, x in made.items() if x.numel()}
    if call.transposed:
        h, dh = (None if x is None else x.transpose(1, 2) for x in (h, dh))
    env |= {"dh": readable_cotangent(problem, dh, env["v"])} | ({} if h is None else {"h": h.contiguous()})
    results = _gradients(problem, call.backend, segments, env, decays, dlast if last else None)
    if segments.index:
        results |= {name: torch.zeros_like(results[name]) for name in plan.GRADIENTS_INITIAL}
    if call.transposed:
        results |= {name: results[name].transpose(1, 2) for name in plan.GRADIENTS}
    assert given[7] is not None
    results["dm_initial"] = results["dm_initial"].reshape(given[7].shape)
    return tuple(results[name] for name in GRADIENTS)


def _gradients(
    problem: Problem,
    backend: str,
    segments: Segments,
    env: dict[str, Tensor],
    decays: Tensor,
    dlast: Sequence[Tensor | None] | None,
) -> dict[str, Tensor]:
    """The gradients by name. dlast: this process's cotangents of the whole sequence's last states, if it has these."""
    from kernels_triton import plan

    strides = head_strides(env["dh"], problem.layout)
    own, rho, has_last = None, None, dlast is not None
    if dlast is not None:
        last = env["c_last"], env["n_last"], env["m_last"]
        dc, dn, dm = segments.to_last(
            *(torch.zeros_like(y) if x is None else x for x, y in zip(dlast, last, strict=True))
        )
        env |= {"dc_last": dc, "dn_last": dn}
        rho = context.remainder((dc, dn, dm), last)
        own = dc, dn, rho
    shares = run(plan.segment_cotangent(problem, strides, has_last), env, backend)
    told = segments.gather(context.share(shares, env["m_initial"], rho, env.get("picked")))
    dc, dn, rho = context.cotangent_after(problem, told, decays, env["m_last"], own, segments.index)
    env |= shares | {"dc_last": dc, "dn_last": dn} | ({} if rho is None else {"dm_last": rho})
    return run(plan.segment_backward(problem, strides, has_last), env, backend)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    q, *others = arguments[len(COTANGENTS) : len(COTANGENTS) + len(NAMES)]
    layout = arguments[len(arguments) - len(OPTIONS) - 1 + list(OPTIONS).index("layout")]
    transposed = is_transposed(others[1], layout)
    tokens = (like(x, transposed) for x in (q, *others[:4]))
    return (*tokens, *(x.new_empty(x.shape) for x in others[4:]))


def _save(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    *options, _, last = inputs[len(NAMES) :]
    given = dict(zip(OPTIONS, options, strict=True))
    exact = given["normalizer_grad"] == "exact" and given["normalize"]
    ctx.save_for_backward(*inputs[: len(NAMES)], output[0] if exact else None, *output[len(RESULTS) :])
    ctx.options = (*options, last)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = segment_backward(*cotangents[: len(RESULTS)], *ctx.saved_tensors, *ctx.options)
    return (*gradients, *(None,) * (len(OPTIONS) + 2))


segment = register(
    "segment",
    schema(("Tensor", NAMES), options=OPTIONS | {"save": "bool", "last": "bool"}, returns=len(RESULTS + KEPT)),
    _forward,
    _forward_fake,
)
segment_backward = register(
    "segment_backward",
    schema(
        ("Tensor?", COTANGENTS),
        ("Tensor", NAMES),
        ("Tensor?", ("h",)),
        ("Tensor", KEPT),
        options=OPTIONS | {"last": "bool"},
        returns=len(GRADIENTS),
    ),
    _backward,
    _backward_fake,
)
torch.library.register_autograd(segment, _differentiate, setup_context=_save, lib=library)
torch.library.register_autograd(segment_backward, twice, lib=library)
