"""The operator on a sequence that is split over processes: each has a segment, what they exchange is a state each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from kernels_triton import context
from kernels_triton.problem import Problem
from kernels_triton.reference import log_sigmoid
from kernels_triton.validation import no_packed_segments

from . import library
from .adapter import first_only, no_forward_mode, readable_cotangent, restored
from .calls import NAMES, Call, Tensors, settle
from .executor import run
from .operator import States, apply
from .reference import run_reference
from .tensors import head_strides, places

# Its name from PyTorch 2.13 on, where the other one warns.
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


@dataclasses.dataclass(frozen=True)
class Segments:
    """Which segment of how many this process has."""

    group: ProcessGroup
    index: int
    count: int

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def gather(self, x: Tensor) -> Tensor:
        """Every segment's x, (P, ...)."""
        found = x.new_empty((self.count * x.shape[0], *x.shape[1:]))
        _all_gather(found, x.contiguous(), group=self.group)
        return found.unflatten(0, (self.count, -1))


def _segments(group: Any) -> Segments:
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
    return Segments(group, distributed.get_rank(group), distributed.get_world_size(group))


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


class _Last(torch.autograd.Function):
    """h, and the last segment's last states for all. Their cotangents are the sum of all processes' cotangents.

    h goes through it so that each process comes to the exchange backward, whatever it made of the states.
    """

    @staticmethod
    def forward(ctx: Any, segments: Segments, h: Tensor, *last: Tensor) -> tuple[Tensor, ...]:
        c, n, m = last
        ctx.segments, (K, V) = segments, c.shape[2:]
        packed = context.pack(c, n, m)
        distributed.broadcast(packed, group_src=segments.count - 1, group=segments.group)
        c, n, (m,) = context.unpack(packed, K, V)
        return h.view_as(h), c.contiguous(), n.contiguous(), m.contiguous()

    @staticmethod
    def backward(ctx: Any, dh: Tensor, *dlast: Tensor) -> Any:
        packed = context.pack(*dlast)
        distributed.all_reduce(packed, group=ctx.segments.group)
        if not ctx.segments.is_last:
            packed.zero_()
        dc, dn, (dm,) = context.unpack(packed, *dlast[0].shape[2:])
        return None, dh, dc, dn, dm


class _Segment(torch.autograd.Function):
    """One segment by the kernels: h and its own last states. Tensors by NAMES, the states those before segment 0."""

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(ctx: Any, call: Call, segments: Segments, save: bool, last: bool, *tensors: Tensor) -> Any:
        from kernels_triton import plan

        problem: Problem = call.problem
        env = dict(zip(NAMES, tensors, strict=True))
        nothing = torch.full_like(env["m_initial"], context.NO_STABILISER)
        own = run(plan.segment_state(problem), env | {"m_initial": nothing}, call.backend)
        gathered = segments.gather(context.summary(own))
        first = env["c_initial"], env["n_initial"], env["m_initial"]
        before, decays = context.state_before(problem, gathered, first, segments.index)
        env |= dict(zip(NAMES[5:], (x.contiguous() for x in before), strict=True))
        results = run(plan.forward_pass(problem, save, None, True), env, call.backend)
        if save:
            kept = plan.segment_saved(problem, last)
            saved = {name: x for name, x in (env | results).items() if name in kept}
            ctx.problem, ctx.backend, ctx.segments, ctx.last = problem, call.backend, segments, last
            ctx.names, ctx.places = tuple(saved), places(saved)
            ctx.save_for_backward(*saved.values(), decays)
            ctx.set_materialize_grads(False)
        return tuple(results[name] for name in ("h", *plan.LAST))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        *kept, decays = ctx.saved_tensors
        env = dict(zip(ctx.names, kept, strict=True))
        with torch.no_grad():
            results = _differentiate(ctx, restored(ctx.problem, env, ctx.places), env, decays, cotangents)
        results = first_only(env, results)
        return (None, None, None, None, *(results[f"d{name}"] for name in NAMES))


def _differentiate(
    ctx: Any, problem: Problem, env: dict[str, Tensor], decays: Tensor, cotangents: tuple[Tensor | None, ...]
) -> dict[str, Tensor]:
    """The gradients by name; those of the state before segment 0 are zero but in that segment."""
    from kernels_triton import plan

    segments: Segments = ctx.segments
    dh, *dlast = cotangents
    env = env | {"dh": readable_cotangent(problem, dh, env["v"])}
    strides = head_strides(env["dh"], problem.layout)
    own, rho = None, None
    if ctx.last:
        last = env["c_last"], env["n_last"], env["m_last"]
        dc, dn, dm = (torch.zeros_like(y) if x is None else x.contiguous() for x, y in zip(dlast, last, strict=True))
        env |= {"dc_last": dc, "dn_last": dn}
        rho = context.remainder((dc, dn, dm), last)
        own = dc, dn, rho
    shares = run(plan.segment_cotangent(problem, strides, ctx.last), env, ctx.backend)
    told = segments.gather(context.share(shares, env["m_initial"], rho, env.get("picked")))
    dc, dn, rho = context.cotangent_after(problem, told, decays, env["m_last"], own, segments.index)
    env |= shares | {"dc_last": dc, "dn_last": dn} | ({} if rho is None else {"dm_last": rho})
    results = run(plan.segment_backward(problem, strides, ctx.last), env, ctx.backend)
    if segments.index:
        results |= {name: torch.zeros_like(results[name]) for name in plan.GRADIENTS_INITIAL}
    return results


def _by_kernels(call: Call, segments: Segments, tensors: Tensors, last: bool) -> tuple[Tensor, States]:
    """tensors: as `settle` gives them, states included."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)
    h, c, n, m = _Segment.apply(call, segments, save, last, *tensors[: len(NAMES)])
    return (h.transpose(1, 2) if call.transposed else h), (c, n, m)


def _by_reference(call: Call, segments: Segments, tensors: Tensors, last: bool) -> tuple[Tensor, States]:
    """The reference twice, differentiated as it stands."""
    problem, (q, k, v, i, f, *first) = call.problem, tensors[: len(NAMES)]
    assert f is not None
    c, n, m = (x for x in first if x is not None)
    nothing = (torch.zeros_like(c), torch.zeros_like(n), torch.full_like(m, context.NO_STABILISER))
    _, own = run_reference(problem, (q, k, v, i, f, *nothing))
    tokens = 1 if problem.layout == "bthd" else 2
    decay = log_sigmoid(torch, f.to(torch.float32)).sum(tokens)
    gathered = _Gather.apply(segments, context.pack(*own, decay))
    before, _ = context.state_before(problem, gathered, (c, n, m), segments.index)
    return run_reference(problem, (q, k, v, i, f, *before))


def _states(call: Call, q: Tensor) -> tuple[Tensor, ...]:
    """Those before the first token where none are given."""
    p = call.problem
    shapes = ((*p.state_heads, p.K, p.V), (*p.state_heads, p.K), p.state_heads)
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
    what the processes get. PyTorch's compiler and torch.func do not see through it: `torch.compiler.disable` it there.

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
    segments = _segments(group)
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
    tensors: Tensors = (q, k, v, i, f, c_initial, n_initial, m_initial)
    if segments.count == 1:
        h, last = apply(tensors, return_last_states, options)
        return (h, last) if return_last_states else h
    _check_plain(tensors)
    tensors = (*library.autocast(tensors[:3]), *tensors[3:])
    call, settled = settle(tensors, options)
    if settled[5] is None:
        call, settled = settle((*tensors[:5], *_states(call, q)), options)
    by: Callable[..., Any] = _by_reference if call.backend == "reference" else _by_kernels
    h, last = by(call, segments, settled, return_last_states)
    if not return_last_states:
        return h
    h, *last = _Last.apply(segments, h, *last)
    return h, tuple(last)


def _check_plain(tensors: Tensors) -> None:
    """Collectives are hidden from compilers and transforms here, and other kinds of tensor have their own."""
    if torch.compiler.is_compiling() or library._is_transformed():
        raise RuntimeError("mlstm_context_parallel: expected an eager call, got one under torch.compile or torch.func")
    for name, x in zip(NAMES, tensors, strict=True):
        if isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter):
            raise TypeError(f"{name}: expected this process's part as a torch.Tensor, got {type(x).__name__}")
