"""The operator in PyTorch's registry, for what needs to see it: compilers, transforms, modes, autocast, DTensor.

`torch.ops.mlstm_dual.chunkwise` and `chunkwise_backward` take the operator's tensors and options in order. The kernels
and the bits are those of the direct call (adapter.py), which eager mode takes because it is sooner under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_triton.backend import choose_backend
from kernels_triton.validation import check_call

from .adapter import differentiate, no_forward_mode, refuse_forward_mode
from .calls import ARGUMENTS, NAMES, PACKED, RESULTS, Tensors, is_transposed, settle
from .executor import run
from .reference import run_reference
from .registry import COTANGENTS, GRADIENTS, SAVED, empty, is_transformed, library, like, register, schema, twice
from .registry import OPTIONS as SHARED_OPTIONS
from .tensors import describe, dtype_of, is_autocast, platform_of

States = tuple[Tensor, Tensor, Tensor]
OPTIONS = SHARED_OPTIONS | {"form": "str"}
READ_BACKWARD = (*COTANGENTS, *ARGUMENTS, *RESULTS[:3], *SAVED)


def _named(arguments: Sequence[Any]) -> tuple[Tensors, dict[str, Any], str]:
    """The tensors by ARGUMENTS, the options of `check_call`, and the form."""
    options = dict(zip(OPTIONS, arguments[len(ARGUMENTS) :], strict=False))
    return tuple(arguments[: len(ARGUMENTS)]), options, options.pop("form")


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    from kernels_triton import plan

    given, options, form = _named(arguments)
    call, tensors = settle(given, options, form)
    env = {name: x for name, x in zip((*NAMES, *PACKED), tensors, strict=True) if x is not None}
    save = arguments[-1]
    results = run(plan.forward_pass(call.problem if save else call.alone, save, None, True), env, call.backend)
    if call.transposed:
        results["h"] = results["h"].transpose(1, 2)
    q = given[0]
    assert q is not None
    return tuple(results[x] if x in results else empty(q, options["layout"]) for x in RESULTS + SAVED)


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    from kernels_triton import plan

    tensors, options, form = _named(arguments)
    infos = {name: describe(name, x) for name, x in zip(ARGUMENTS, tensors, strict=True)}
    problem = check_call(infos, **options, form=form)
    q, v = tensors[0], tensors[2]
    assert q is not None and v is not None
    specs = plan.forward_results(problem, arguments[-1])
    made = {name: q.new_empty(spec.shape, dtype=dtype_of(spec.dtype)) for name, spec in specs.items()}
    made["h"] = like(v, is_transposed(v, options["layout"]))
    return tuple(made[x] if x in made else empty(q, options["layout"]) for x in RESULTS + SAVED)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    cotangents, rest = arguments[: len(COTANGENTS)], arguments[len(COTANGENTS) :]
    made = rest[len(ARGUMENTS) : -len(OPTIONS)]
    given, options, form = _named((*rest[: len(ARGUMENTS)], *rest[-len(OPTIONS) :]))
    call, tensors = settle(given, options, form)
    saved = {name: x for name, x in zip((*NAMES, *PACKED), tensors, strict=True) if x is not None}
    saved |= {name: x.contiguous() for name, x in zip((*RESULTS[1:3], *SAVED), made[1:], strict=True) if x.numel()}
    dh, *dlast = cotangents
    saved["h"] = (made[0].transpose(1, 2) if call.transposed else made[0]).contiguous()
    if call.transposed:
        dh = None if dh is None else dh.transpose(1, 2)
    results = differentiate(call.problem, call.backend, saved, (dh, *dlast))
    if call.transposed:
        results |= {name: results[name].transpose(1, 2) for name in GRADIENTS[:5]}
    q, m = given[0], given[7]
    assert q is not None
    if m is not None:
        results["dm_initial"] = results["dm_initial"].reshape(m.shape)
    return tuple(results[x] if x in results else empty(q, options["layout"]) for x in GRADIENTS)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    rest = arguments[len(COTANGENTS) :]
    tensors, layout = rest[: len(ARGUMENTS)], rest[len(rest) - len(OPTIONS) + list(OPTIONS).index("layout")]
    transposed = is_transposed(tensors[2], layout)
    tokens = (like(x, transposed) for x in tensors[:5])
    return (*tokens, *(empty(tensors[0], layout) if x is None else x.new_empty(x.shape) for x in tensors[5:8]))


def _save(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Keeps for the backward pass the arguments and the results that it reads; options are `inputs` too."""
    ctx.save_for_backward(*inputs[: len(ARGUMENTS)], *output[:3], *output[len(RESULTS) :])
    ctx.options = inputs[len(ARGUMENTS) : -1]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: selective checkpointing hands them out once
    backward = ChunkwiseBackward.apply if is_transformed() else chunkwise_backward
    gradients = backward(*cotangents[: len(RESULTS)], *saved, *ctx.options)
    rest = (None,) * (len(PACKED) + len(OPTIONS) + 1)
    return (*(None if x is None else dx for x, dx in zip(saved, gradients, strict=False)), *rest)


def _nothing(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """Nothing to keep."""


def _over_batches(operator: Any, names: Sequence[str]) -> Callable[..., Any]:
    """The rule of `torch.vmap` for an operator whose first arguments are tensors of these names: the axis joins B.

    Packed sequences have no batch: they run one after the other.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        N, tensors, options = info.batch_size, arguments[: len(names)], arguments[len(names) :]
        wide = [
            x if x is None else x.expand(N, *x.shape) if axis is None else x.movedim(axis, 0)
            for x, axis in zip(tensors, in_dims, strict=False)
        ]
        if arguments[names.index("cu_seqlens")] is not None:
            each = [operator(*(x if x is None else x[n] for x in wide), *options) for n in range(N)]
            results = tuple(map(torch.stack, zip(*each, strict=True)))
        else:
            joint = operator(*(x if x is None else x.flatten(0, 1) for x in wide), *options)
            results = tuple(x.unflatten(0, (N, x.shape[0] // N)) for x in joint)
        return results, (0,) * len(results)

    return rule


def autocast(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """q, k, v in autocast's dtype, where it is on; gates and states stay as they are."""
    if not all(isinstance(x, Tensor) for x in tensors):  # the checks will say so
        return tuple(tensors)
    kind = tensors[0].device.type
    if not is_autocast(kind):
        return tuple(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _casting(operator: Any, key: Any) -> Callable[..., Any]:
    def rule(*arguments: Any) -> Any:
        tensors = autocast(arguments[:3])  # before the guard, under which autocast looks off
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*tensors, *arguments[3:])

    return rule


chunkwise = register(
    "chunkwise",
    schema(
        ("Tensor", NAMES[:5]),
        ("Tensor?", ARGUMENTS[5:]),
        options=OPTIONS | {"save": "bool"},
        returns=len(RESULTS + SAVED),
    ),
    _forward,
    _forward_fake,
)
chunkwise_backward = register(
    "chunkwise_backward",
    schema(
        ("Tensor?", COTANGENTS),
        ("Tensor", NAMES[:5]),
        ("Tensor?", ARGUMENTS[5:]),
        ("Tensor", (*RESULTS[:3], *SAVED)),
        options=OPTIONS,
        returns=len(GRADIENTS),
    ),
    _backward,
    _backward_fake,
)
for _operator, _names in ((chunkwise, ARGUMENTS), (chunkwise_backward, READ_BACKWARD)):
    torch.library.register_vmap(_operator, _over_batches(_operator, _names), lib=library)
torch.library.register_autograd(chunkwise, _differentiate, setup_context=_save, lib=library)
torch.library.register_autograd(chunkwise_backward, twice, lib=library)
for _key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):
    library.impl("chunkwise", _casting(chunkwise, _key), _key.name)


class _Transformable(torch.autograd.Function):
    """An operator for the transforms of torch.func, which differentiate no registered operator."""

    jvp = staticmethod(no_forward_mode)


class Chunkwise(_Transformable):
    """`chunkwise` for them."""

    forward = staticmethod(chunkwise)
    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        return _over_batches(Chunkwise.apply, ARGUMENTS)(info, in_dims, *arguments)


class ChunkwiseBackward(_Transformable):
    """`chunkwise_backward` for them."""

    forward = staticmethod(chunkwise_backward)
    setup_context = staticmethod(_nothing)
    backward = staticmethod(twice)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        return _over_batches(ChunkwiseBackward.apply, READ_BACKWARD)(info, in_dims, *arguments)


def is_plain(tensors: Tensors) -> bool:
    """Whether nothing but autograd needs to see the call: no compiler, transform, mode or kind of tensor."""
    if torch.compiler.is_compiling() or is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)


def apply(tensors: Tensors, options: Mapping[str, Any], form: str) -> tuple[Tensor, States]:
    """h and the last states, through the registry; arguments as of `operator.apply`."""
    tensors = (*tensors, *[None] * (len(ARGUMENTS) - len(tensors)))
    infos = {name: describe(name, x) for name, x in zip(ARGUMENTS, tensors, strict=True)}
    problem = check_call(infos, **options, form=form)
    q, m = tensors[0], tensors[7]
    assert q is not None
    backend = choose_backend(options["backend"], platform_of(q))
    if backend == "reference":
        m = None if m is None else m.reshape(m.shape[:2])
        return run_reference(problem, (*tensors[:7], m, *tensors[8:]))
    refuse_forward_mode(tensors)
    if any("DTensor" in [kind.__name__ for kind in type(x).__mro__] for x in tensors):
        from . import sharding as _  # its rules; DTensor takes long to import for those who have none

    save = torch.is_grad_enabled() and (is_transformed() or any(x is not None and x.requires_grad for x in tensors))
    given = {**options, "backend": backend, "form": form}
    run = Chunkwise.apply if is_transformed() else chunkwise
    h, c, n, m, *_ = run(*tensors, *(given[name] for name in OPTIONS), save)
    return h, (c, n, m)
