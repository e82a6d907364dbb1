"""The operator for PyTorch: argument checks, autograd, and the choice of backend. No numerics of its own."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

from kernels_triton import packing, reference
from kernels_triton.backend import choose_backend
from kernels_triton.problem import MIN_DESCRIPTORS, Problem
from kernels_triton.validation import check_call

from .executor import ALIGNMENT, SAVED, dtype_of, run
from .tensors import architecture_of, describe, head_strides, places, platform_of, readable, readable_argument, suits

States = tuple[Float32[Tensor, "B H K V"], Float32[Tensor, "B H K"], Float32[Tensor, "B H"]]
NAMES = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial")
PACKED = ("cu_seqlens", "chunks")  # for packed sequences: their offsets, their chunk table
ARGUMENTS = (*NAMES, "cu_seqlens", "chunk_table")  # the tensors' names to their callers
# "0": never through tensor descriptors; "1": wherever they may be had; else where they pay. The same bits.
descriptors = os.environ.get("MLSTM_DESCRIPTORS", "")
MAX_CALLS = 4096


class _FirstOnly(torch.autograd.Function):
    """Gradients as they are, whose own derivatives are refused; `anchors`, n of them, are what they depend on."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[n:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(
            "mlstm_chunkwise: expected a first derivative, got a call to differentiate twice; use backend='reference'"
        )


class _Chunkwise(torch.autograd.Function):
    """The kernels' two passes. Tensors are (B, H, T, ...) or (B, T, H, ...) as the problem's layout says."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, backend: str, save: bool, last: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        from kernels_triton import plan

        env = {name: x for name, x in zip((*NAMES, *PACKED), tensors, strict=False) if x is not None}
        results = run(plan.forward_pass(problem, save), env, backend)
        if not save:
            return tuple(results[name] for name in ("h", *plan.LAST))
        kept = plan.saved(problem, last)
        saved = {name: x for name, x in (env | results).items() if name in kept or name == SAVED}
        ctx.arguments = len(tensors)
        ctx.problem, ctx.backend, ctx.names, ctx.places = problem, backend, tuple(saved), places(saved)
        ctx.save_for_backward(*saved.values())
        ctx.set_materialize_grads(False)
        return tuple(results[name] for name in ("h", *plan.LAST))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        from kernels_triton import plan

        problem: Problem = ctx.problem
        env = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if places(env) != ctx.places:  # hooks on saved tensors (offloading, say) may bring them back in other memory
            strides = {n: head_strides(env[n], problem.layout) if n in env else s for n, s in problem.strides}
            suit = problem.descriptors and all(suits(env[name]) for name in ("q", "k", "v"))
            problem = dataclasses.replace(problem, strides=tuple(strides.items()), descriptors=suit)
        dh, *dlast = cotangents
        env["dh"] = torch.zeros_like(env["v"]) if dh is None else readable(dh, problem.layout)
        if problem.descriptors and not suits(env["dh"]):
            env["dh"] = env["dh"].clone(memory_format=torch.contiguous_format)
        has_dlast = any(x is not None for x in dlast)
        if has_dlast:
            head = problem.state_heads
            shapes = ((*head, problem.K, problem.V), (*head, problem.K), head)
            for name, shape, x in zip(plan.LAST, shapes, dlast, strict=True):
                env[f"d{name}"] = env["q"].new_zeros(shape, dtype=torch.float32) if x is None else x.contiguous()
        program = plan.backward_pass(problem, head_strides(env["dh"], problem.layout), has_dlast)
        with torch.no_grad():
            results = run(program, env, ctx.backend, earlier=plan.forward_pass(problem, True))
        if torch.is_grad_enabled():  # create_graph: a constant cotangent must not make the gradients look constant
            anchors = [x for x in env.values() if x.requires_grad]
            results = dict(zip(results, _FirstOnly.apply(len(anchors), *anchors, *results.values()), strict=True))
        packed = (None,) * (ctx.arguments - len(NAMES))
        return (None, None, None, None, *(results.get(f"d{name}") for name in NAMES), *packed)


def _descriptors(problem: Problem, backend: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether this call reads its tensors through descriptors: on Hopper, where they were measured."""
    q, k, v = (x for x in tensors[:3] if x is not None)
    if backend != "triton" or problem.dtype != "bfloat16" or descriptors == "0" or platform_of(q) != "cuda":
        return False
    if descriptors != "1" and q.numel() + v.numel() < MIN_DESCRIPTORS:
        return False
    return architecture_of(q.device) == "sm_90" and all(suits(x) for x in (q, k, v))


def run_reference(problem: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, States]:
    """The readable reference in float32."""
    q, k, v, i, f, *states = tensors[:8]
    assert q is not None and k is not None and v is not None and i is not None and f is not None
    if problem.layout == "bthd":
        q, k, v, i, f = (x.transpose(1, 2) for x in (q, k, v, i, f))
    q, k, i, f = (x.to(torch.float32) for x in (q, k, i, f))
    head = problem.state_heads
    shapes = ((*head, problem.K, problem.V), (*head, problem.K), head)
    c, n, m = (
        q.new_zeros(shape) if x is None else x.to(torch.float32) for shape, x in zip(shapes, states, strict=True)
    )
    cell: Any = reference.recurrent
    if problem.form == "chunkwise":
        cell = functools.partial(reference.chunkwise, chunk_size=problem.chunk_size or 64)
    cell = functools.partial(
        cell,
        scale=problem.scale,
        eps=problem.eps,
        normalizer_grad=problem.normalizer_grad,
        stop_gradient=Tensor.detach,
        input_gate=problem.input_gate,
        normalize=problem.normalize,
    )
    tokens = (q, k, v.to(torch.float32), i, f)
    if problem.sequences:
        h, last = packing.reference(cell, tensors[8], tokens, (c, n, m))
    else:
        h, last = cell(*tokens, c, n, m)
    h = h.to(v.dtype)
    return (h.transpose(1, 2) if problem.layout == "bthd" else h), (last[0].to(dtype_of(problem.c_dtype)), *last[1:])


@dataclasses.dataclass(frozen=True)
class Call:
    """What is settled before the kernels run, for arguments of given shapes, strides and dtypes."""

    problem: Problem
    backend: str
    transposed: bool  # tokens before heads in memory, though not in the layout


def _settle(problem: Problem, backend: str, tensors: tuple[Tensor | None, ...]) -> Call:
    strides = {
        name: head_strides(x, problem.layout) for name, x in zip(NAMES[:5], tensors, strict=False) if x is not None
    }
    # A (B, H, T, D) view of (B, T, H, D) memory, as models make it: outputs and gradients get that memory order too.
    _, sh, st = strides["v"]
    transposed = problem.layout == "bhtd" and 0 < sh < st
    q = tensors[0]
    assert q is not None
    problem = dataclasses.replace(
        problem,
        strides=tuple(strides.items()),
        layout="bthd" if transposed else problem.layout,
        arch=architecture_of(q.device),
        descriptors=_descriptors(problem, backend, tensors),
    )
    return Call(problem, backend, transposed)


def run_kernels(call: Call, tensors: tuple[Tensor | None, ...], last: bool) -> tuple[Tensor, States]:
    """last: the states may get cotangents."""
    if call.transposed:
        tensors = tuple(x.transpose(1, 2) if x is not None and n < 5 else x for n, x in enumerate(tensors))
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)
    h, c, n, m = _Chunkwise.apply(call.problem, call.backend, save, last, *tensors)
    return (h.transpose(1, 2) if call.transposed else h), (c, n, m)


# Calls that are settled, by all that they depend on: checking one takes longer than launching its kernels.
_calls: dict[Any, Call] = {}


def _settled(key: Any, tensors: tuple[Tensor | None, ...]) -> Call | None:
    """The call like an earlier one, if there was one; its tensors must be as well aligned."""
    try:
        call = _calls.get(key)
    except TypeError:  # an option that is not hashable, and so not valid: the checks will say so
        return None
    if call is None or (call.problem.descriptors and not _aligned(tensors)):
        return None
    return call


def _aligned(tensors: tuple[Tensor | None, ...]) -> bool:
    return all(x is None or x.data_ptr() % ALIGNMENT == 0 for x in tensors[:3])


def call_key(tensors: tuple[Any, ...], *options: Any) -> Any:
    """All that a call depends on; None if an argument is no tensor. Options with their types, since 1 == True."""
    try:
        of = tuple(None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors)
    except AttributeError:
        return None
    return of, options, tuple(map(type, options)), descriptors


def _remember(key: Any, call: Call) -> None:
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = call


def host_checked(cu_seqlens: Tensor | None, q: Any, layout: str) -> Tensor | None:
    """Offsets on q's device; checked first where the host can read them without waiting for a GPU."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.device.type != "cpu" or not isinstance(q, Tensor):
        return cu_seqlens
    offsets = cu_seqlens.dim() == 1 and len(cu_seqlens) > 1 and not cu_seqlens.is_floating_point()
    if offsets and q.dim() == 4 and layout == "bthd":  # of other things than offsets `check_call` speaks
        packing.check_offsets(cu_seqlens.tolist(), q.shape[1])
    return cu_seqlens.to(q.device, non_blocking=True)


def apply(
    tensors: tuple[Tensor | None, ...], last: bool, options: dict[str, Any], form: str = "chunkwise"
) -> tuple[Tensor, States]:
    """h and the last states.

    tensors: by NAMES, perhaps by ARGUMENTS; options: of `check_call`; last: the states may get cotangents.
    """
    key = call_key(tensors, form, *options.values())
    call = _settled(key, tensors)
    if call is None:
        infos = {name: describe(name, x) for name, x in zip(ARGUMENTS, tensors, strict=False)}
        problem = check_call(infos, **options, form=form)
        q = tensors[0]
        assert q is not None
        backend = choose_backend(options["backend"], platform_of(q))
        if backend != "reference":
            given = tensors
            tensors = tuple(readable_argument(n, x, problem.layout) for n, x in zip(ARGUMENTS, tensors, strict=False))
            call = _settle(problem, backend, tensors)
            if all(x is y for x, y in zip(tensors, given, strict=True)) and _aligned(tensors):
                _remember(key, call)
    m = tensors[7]
    if m is not None:
        tensors = (*tensors[:7], m.reshape(m.shape[:2]), *tensors[8:])
    return run_kernels(call, tensors, last) if call else run_reference(problem, tensors)


def mlstm_chunkwise(
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
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    save_states: bool = True,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    cu_seqlens: Int[Tensor, " offsets"] | None = None,
    chunk_table: Int32[Tensor, " table"] | None = None,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Tensor, "B _ _ V"] | tuple[Float[Tensor, "B _ _ V"], States]:
    """The mLSTM over a whole sequence, chunk by chunk, differentiable in all eight arrays.

    h_t = C_t^T (s q_t) / (max(|n_t . s q_t|, exp(-m_t)) + eps), with C_t = f' C_{t-1} + i' k_t v_t^T, n_t alike, and
    exponential input gate and sigmoid forget gate stabilised by m_t (Beck et al. 2024, arXiv:2405.04517; chunkwise
    form: Beck et al. 2025, arXiv:2503.14376). Equations and gradients: docs/architecture.md.

    Args:
        q, k: queries and keys, (B, H, T, K) or with layout="bthd" (B, T, H, K); float32, bfloat16 or float16.
        v: values, (B, H, T, V) or (B, T, H, V), in the dtype of q. 1 <= K, V <= 512, T >= 1.
        i, f: input and forget gate pre-activations (natural-log units), (B, H, T) or (B, T, H); any float dtype,
            computed in float32 or better.
        c_initial, n_initial, m_initial: state before the first token, (B, H, K, V), (B, H, K), (B, H) or (B, H, 1),
            float32; all three or none (then zeros).
        return_last_states: also return the state after the last token.
        eps: added to the normaliser.
        chunk_size: tokens per chunk, a power of two from 16 to 512; None: the best for the shape. The result is the
            same to rounding.
        qk_scale: s above; None: K ** -0.5.
        normalizer_grad: "exact", or "detached": the normaliser is a constant in the backward pass, as in mlstm-kernels
            (right only if a scale-invariant norm follows h).
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
            where they are on the host; elsewhere offsets that do not go from 0 to T, or go down, give wrong
            results.
        chunk_table: `make_chunk_table(cu_seqlens, T, chunk_size)`, for several calls; without it each makes its own.
        backend: "triton" (CUDA or ROCm device), "interpret" (the same kernels on a CPU under TRITON_INTERPRET=1, slow),
            "reference" (native operations, any device), "auto" (triton on a GPU, else reference).

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
    tensors = (q, k, v, i, f, c_initial, n_initial, m_initial, host_checked(cu_seqlens, q, layout), chunk_table)
    h, last = apply(tensors, return_last_states, options)
    return (h, last) if return_last_states else h
