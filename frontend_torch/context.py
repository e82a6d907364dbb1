"""The operator on a sequence that is split over processes: each has a segment, what they exchange is a state each."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from kernels_triton import context
from kernels_triton.backend import choose_backend
from kernels_triton.options import check_flag
from kernels_triton.problem import Problem
from kernels_triton.reference import log_sigmoid
from kernels_triton.validation import check_call, no_packed_segments

from . import library
from .adapter import refuse_forward_mode
from .calls import NAMES, RESULTS, Tensors, settle
from .operator import States, apply
from .reference import run_reference
from .registry import is_transformed
from .segments import OPTIONS, Segments, compute, segment
from .tensors import describe, platform_of


def _processes(group: Any) -> ProcessGroup:
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("group: expected torch.distributed to be initialised (init_process_group), got none")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: expected a DeviceMesh of one dimension, got {group.ndim}; take mesh['name']")
        group = group.get_group()
    if group is not None and not isinstance(group, ProcessGroup):
        kind = getattr(group, "__name__", type(group).__name__)  # GroupMember.NON_GROUP_MEMBER where this is no member
        raise TypeError(f"group: expected a ProcessGroup that this process is in, a DeviceMesh or None, got {kind}")
    group = group or distributed.group.WORLD
    assert group is not None
    return group


class _Gather(torch.autograd.Function):
    """Every segment's x; the gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, segments: Segments, x: Tensor) -> Tensor:
        ctx.segments = segments
        return segments.gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient, group=ctx.segments.group)
        return None, gradient[ctx.segments.index]


class _After(torch.autograd.Function):
    """The states before this segment, as they are, after the gathering: the first segment's do not depend on it.

    So each process comes to the exchange backward, and none waits for one that does not.
    """

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = gathered.shape
        return tuple(x.view_as(x) for x in before)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return cotangents[0].new_zeros(ctx.shape), *cotangents


class _Last(torch.autograd.Function):
    """h, and the last segment's last states for all. Their cotangents are the sum of all processes' cotangents.

    h goes through it so that each process comes to the exchange backward, whatever it made of the states.
    """

    @staticmethod
    def forward(ctx: Any, segments: Segments, h: Tensor, *last: Tensor) -> tuple[Tensor, ...]:
        ctx.segments = segments
        return h.view_as(h), *segments.from_last(*last)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *dlast: Tensor) -> Any:
        return None, dh, *ctx.segments.to_last(*dlast)


def _by_reference(problem: Problem, segments: Segments, tensors: Tensors, last: bool) -> tuple[Tensor, Any]:
    """The reference twice, differentiated as it stands."""
    q, k, v, i, f, *first = tensors
    assert f is not None
    c, n, m = (x for x in first if x is not None)
    m = m.reshape(m.shape[:2])
    nothing = (torch.zeros_like(c), torch.zeros_like(n), torch.full_like(m, context.NO_STABILISER))
    _, own = run_reference(problem, (q, k, v, i, f, *nothing))
    tokens = 1 if problem.layout == "bthd" else 2
    decay = log_sigmoid(torch, f.to(torch.float32)).sum(tokens)
    gathered = _Gather.apply(segments, context.pack(*own, decay))
    before, _ = context.state_before(problem, gathered, (c, n, m), segments.index)
    h, states = run_reference(problem, (q, k, v, i, f, *_After.apply(gathered, *before)))
    if last:
        h, *states = _Last.apply(segments, h, *states)
    return h, tuple(states)


def _by_kernels(options: dict[str, Any], group: ProcessGroup, tensors: Tensors, last: bool) -> tuple[Tensor, Any]:
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not save and library.is_plain(tensors):  # nothing to record, and nobody to see it: the registry takes longer
        results = compute(*settle(tensors, options), Segments.of(group), save=False, last=last)
        return results["h"], tuple(results[name] for name in RESULTS[1:]) if last else ()
    given = options | {"group": group.group_name}
    h, *saved = segment(*tensors, *(given[name] for name in OPTIONS), save, last)
    return h, tuple(saved[:3])


def _before_the_first(problem: Problem, q: Tensor) -> tuple[Tensor, ...]:
    """The states where none are given."""
    head = problem.state_heads
    shapes = ((*head, problem.K, problem.V), (*head, problem.K), head)
    return tuple(q.new_zeros(shape, dtype=torch.float32) for shape in shapes)


def mlstm_context_parallel(
    q: Float[Tensor, "B _ _ K"],
    k: Float[Tensor, "B _ _ K"],
    v: Float[Tensor, "B _ _ V"],
    i: Float[Tensor, "B _ _"],
    f: Float[Tensor, "B _ _"],
    c_initial: Float32[Tensor, "B H K V"] | None = None,
    n_initial: Float32[Tensor, "B H K"] | None = None,
    m_initial: Float32[Tensor, "B H"] | Float32[Tensor, "B H 1"] | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int | None = None,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    save_states: bool = True,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    cu_seqlens: None = None,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Tensor, "B _ _ V"] | tuple[Float[Tensor, "B _ _ V"], States]:
    """`mlstm_chunkwise` on a sequence whose tokens are split over processes, in the order of their ranks.

    Every process calls it with its own tokens (q, k, v, i, f and h: its segment, of any length from 1, which need not
    be the same for all) and otherwise equal arguments. Segments compute side by side; what each hands to the others is
    one state and two or three numbers per head, forward and backward, whatever the number of tokens:
    `kernels_triton.context.exchanged_bytes`. Nothing waits on the host.

    Gradients are those of the sum of all processes' losses, as through differentiable collectives: every process has to
    come to the backward pass, each gets the gradients of its own tokens, and that of a replicated tensor is the sum of
    what the processes get. `torch.compile` sees one operator (the reference has to be called eagerly); transforms of
    torch.func are refused.

    Args:
        q, k, v, i, f: this process's tokens, as of `mlstm_chunkwise`.
        c_initial, n_initial, m_initial: state before the first token of the whole sequence, the same on all processes;
            all three or none. The first process gets the whole of their gradients by the kernels, the others zeros;
            by the reference each gets a part.
        return_last_states: also return the state after the last token of the whole sequence, the same on all processes;
            its cotangent is the sum of those of all processes.
        eps, chunk_size, qk_scale, normalizer_grad, layout, precision, save_states, input_gate, normalize, backend: as
            of `mlstm_chunkwise`, the same on all processes.
        group: the processes, as a ProcessGroup or a DeviceMesh of one dimension; None: the default group.
        cu_seqlens: None: packed sequences cannot be split.

    Returns:
        h of this process's tokens; with return_last_states (h, (c_last, n_last, m_last)).

    Raises:
        TypeError, ValueError: the argument, what was expected and what came; before anything is launched or sent.
    """
    no_packed_segments(cu_seqlens)
    check_flag("return_last_states", return_last_states)
    processes = _processes(group)
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
    tensors: Tensors = (q, k, v, i, f, c_initial, n_initial, m_initial)
    if distributed.get_world_size(processes) == 1:
        h, last = apply(tensors, return_last_states, options)
    else:
        _check_plain(tensors)
        tensors = (*library.autocast(tensors[:3]), *tensors[3:])
        problem, used = _checked(tensors, options)
        if c_initial is None:
            tensors = (*tensors[:5], *_before_the_first(problem, q))
        if used == "reference":
            _check_eager()
            h, last = _by_reference(problem, Segments.of(processes), tensors, return_last_states)
        else:
            refuse_forward_mode(tensors)
            h, last = _by_kernels(options | {"backend": used}, processes, tensors, return_last_states)
    return (h, last) if return_last_states else h


def _checked(tensors: Tensors, options: dict[str, Any]) -> tuple[Problem, str]:
    """The problem and the backend; where nobody compiles, kept for calls alike."""
    if not torch.compiler.is_compiling():
        call, _ = settle(tensors, options)
        return call.problem, call.backend
    q = tensors[0]
    assert q is not None
    problem = check_call({name: describe(name, x) for name, x in zip(NAMES, tensors, strict=True)}, **options)
    return problem, choose_backend(options["backend"], platform_of(q))


def _check_plain(tensors: Tensors) -> None:
    """Other kinds of tensor have collectives of their own, and transforms see none."""
    if is_transformed():
        raise RuntimeError("mlstm_context_parallel: expected a call outside of torch.func's transforms, got one inside")
    for name, x in zip(NAMES, tensors, strict=True):
        if isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{name}: expected this process's part as a torch.Tensor, got {type(x).__name__}")


def _check_eager() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "backend: 'reference' expected an eager call of mlstm_context_parallel, got one under torch.compile"
        )
