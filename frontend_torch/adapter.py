"""The two passes in PyTorch's autograd, called directly: for eager mode, where the dispatcher would take longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_triton.launch import Pass
from kernels_triton.problem import Problem
from kernels_triton.validation import BATCHED, FORWARD_MODE, TWICE

from .calls import NAMES, PACKED, RESULTS, Call, Tensors
from .executor import ALIGNMENT, SAVED, run
from .registry import is_batched, is_transformed
from .tensors import STRIDED, dtype_of, head_strides, materialised, places, readable, suits


def no_forward_mode(ctx: Any, *_: Any) -> Any:
    """The forward mode of a function that has none."""
    raise NotImplementedError(FORWARD_MODE)


class _FirstOnly(torch.autograd.Function):
    """Gradients as they are, whose own derivatives are refused; `anchors`, n of them, are what they depend on."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[n:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(TWICE)


def readable_cotangent(problem: Problem, dh: Tensor | None, v: Tensor) -> Tensor:
    """h's cotangent in memory that the kernels can read; zeros like v where there is none."""
    dh = torch.zeros_like(v) if dh is None else readable(dh, problem.layout)
    return dh.clone(memory_format=torch.contiguous_format) if problem.descriptors and not suits(dh) else dh


def restored(problem: Problem, env: dict[str, Tensor], before: tuple[Any, ...]) -> Problem:
    """The problem for saved tensors, which hooks (offloading, say) may bring back in other memory than `before`.

    In `env` what is not read by its own strides becomes again what it was, contiguous and aligned.
    """
    if places(env) == before:
        return problem
    for name, x in env.items():
        if name not in STRIDED and not (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0):
            env[name] = x.clone(memory_format=torch.contiguous_format)
    strides = {n: head_strides(env[n], problem.layout) if n in env else s for n, s in problem.strides}
    suit = problem.descriptors and all(suits(env[name]) for name in ("q", "k", "v"))
    return dataclasses.replace(problem, strides=tuple(strides.items()), descriptors=suit)


def first_only(read: Iterable[Tensor | None], results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, whose derivatives by what they were computed from, cotangents too, are refused."""
    if not torch.is_grad_enabled():
        return results
    anchors = [x for x in read if x is not None and x.requires_grad]
    return dict(zip(results, _FirstOnly.apply(len(anchors), *anchors, *results.values()), strict=True))


def differentiate(
    problem: Problem,
    backend: str,
    saved: dict[str, Tensor],
    cotangents: Sequence[Tensor | None],
    earlier: Pass | None = None,
) -> dict[str, Tensor]:
    """The gradients by name, in the axes' order of the problem's layout.

    saved: what the forward pass read and made, by name; cotangents: of h and the last states; earlier: the forward
    pass, where some of `saved` are in its shared memory.
    """
    from kernels_triton import plan

    env = dict(saved)
    dh, *dlast = cotangents
    env["dh"] = readable_cotangent(problem, dh, env["v"])
    has_dlast = any(x is not None for x in dlast)
    if has_dlast:
        head = problem.state_heads
        shapes = ((*head, problem.K, problem.V), (*head, problem.K), head)
        dtypes = (dtype_of(problem.c_dtype), torch.float32, torch.float32)
        for name, shape, dtype, x in zip(plan.LAST, shapes, dtypes, dlast, strict=True):
            env[f"d{name}"] = env["q"].new_zeros(shape, dtype=dtype) if x is None else materialised(x).contiguous()
    program = plan.backward_pass(problem, head_strides(env["dh"], problem.layout), has_dlast)
    return run(program, env, backend, earlier=earlier)


def _forward_pass(problem: Problem, save: bool, last: bool) -> Pass:
    from kernels_triton import plan

    return plan.forward_pass(problem, save, None, False, last)


class _Chunkwise(torch.autograd.Function):
    """The kernels' two passes. Tensors are (B, H, T, ...) or (B, T, H, ...) as the problem's layout says.

    Results are h and, if asked for, the last states.
    """

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: str, last: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        from kernels_triton import plan

        env = _named(tensors)
        results = run(_forward_pass(problem, True, last), env, backend)
        kept = plan.saved(problem, last)
        saved = {name: x for name, x in (env | results).items() if name in kept or name == SAVED}
        ctx.arguments = len(tensors)
        ctx.problem, ctx.backend, ctx.last = problem, backend, last
        ctx.names, ctx.places = tuple(saved), places(saved)
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)
        return tuple([results[name] for name in _results(last)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if is_transformed() or any(x is not None and is_batched(x) for x in cotangents):
            raise RuntimeError(BATCHED)
        env = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        problem = restored(ctx.problem, env, ctx.places)
        with torch.no_grad():
            earlier = _forward_pass(problem, True, ctx.last)
            results = differentiate(problem, ctx.backend, env, cotangents, earlier)
        results = first_only((*env.values(), *cotangents), results)
        packed = (None,) * (ctx.arguments - len(NAMES))
        return (None, None, None, *(results.get(f"d{name}") for name in NAMES), *packed)


def _results(last: bool) -> tuple[str, ...]:
    return RESULTS if last else RESULTS[:1]


def refuse_forward_mode(tensors: Iterable[Tensor | None]) -> None:
    """Raises NotImplementedError if a tensor carries a tangent, which the kernels would drop."""
    if getattr(torch.autograd.forward_ad, "_current_level", 0) < 0:  # none can
        return
    unpack = torch.autograd.forward_ad.unpack_dual
    if any(x is not None and unpack(x).tangent is not None for x in tensors):
        raise NotImplementedError(FORWARD_MODE)


def _named(tensors: Tensors) -> dict[str, Tensor]:
    return {name: x for name, x in zip((*NAMES, *PACKED), tensors, strict=False) if x is not None}


def _recorded(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])


def run_kernels(call: Call, tensors: Tensors, last: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """h and, if asked for, the last states, which may get cotangents. tensors: as `settle` gives them."""
    refuse_forward_mode(tensors)
    if _recorded(tensors):
        h, *states = _Chunkwise.apply(call.problem, call.backend, last, *tensors)
    else:  # nothing for autograd to see, whose wrapping takes as long as a launch
        results = run(_forward_pass(call.alone, False, last), _named(tensors), call.backend)
        h, *states = (results[name] for name in _results(last))
    return (h.transpose(1, 2) if call.transposed else h), tuple(states)
