"""The token-by-token forms for PyTorch: a short sequence, and one token of inference."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from kernels_triton.validation import check_step

from . import library
from .adapter import refuse_forward_mode, run_kernels
from .calls import NAMES, Call, call_key
from .executor import run
from .operator import States, apply
from .reference import run_reference
from .tensors import architecture_of, backend_for, describe, materialised

# Options of a sequence that a step has not.
SEQUENCE = {
    "chunk_size": None,
    "normalizer_grad": "exact",
    "layout": "bhtd",
    "precision": "ieee",
    "save_states": True,
}
STEP = ("q", "k", "v", "i", "f", "c", "n", "m")
OUT = tuple(f"out_states[{x}]" for x in range(3))


def mlstm_recurrent(
    q: Float[Tensor, "B _ _ K"],
    k: Float[Tensor, "B _ _ K"],
    v: Float[Tensor, "B _ _ V"],
    i: Float[Tensor, "B _ _"],
    f: Float[Tensor, "B _ _"],
    c_initial: Float[Tensor, "B H K V"] | None = None,
    n_initial: Float32[Tensor, "B H K"] | None = None,
    m_initial: Float32[Tensor, "B H"] | Float32[Tensor, "B H 1"] | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    *,
    qk_scale: float | None = None,
    normalizer_grad: Literal["exact", "detached"] = "exact",
    layout: Literal["bhtd", "bthd"] = "bhtd",
    precision: Literal["ieee", "tf32x3", "tf32"] = "ieee",
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> Float[Tensor, "B _ _ V"] | tuple[Float[Tensor, "B _ _ V"], States]:
    """The mLSTM token by token in one kernel: for short sequences, and as a check of `mlstm_chunkwise`.

    Arguments, results and errors as of `mlstm_chunkwise`, which takes this form by itself for up to 16 tokens without
    gradients. c_initial may be bfloat16, and c_last is then. The backward pass is that of the chunkwise form
    (precision: of its products).
    """
    options = {
        "eps": eps,
        "chunk_size": None,
        "qk_scale": qk_scale,
        "normalizer_grad": normalizer_grad,
        "layout": layout,
        "precision": precision,
        "save_states": True,
        "input_gate": input_gate,
        "normalize": normalize,
        "backend": backend,
    }
    h, last = apply((q, k, v, i, f, c_initial, n_initial, m_initial), return_last_states, options, "recurrent")
    return (h, last) if return_last_states else h


@dataclasses.dataclass(frozen=True)
class Step:
    """What is settled for steps alike: their call, and the bytes that each of their tensors spans, out_states last."""

    call: Call
    spans: tuple[int, ...]


# Steps that are settled, by all that they depend on, and that can be read in place.
_settled: dict[Any, Step] = {}
MAX_STEPS = 1024


def _settle(
    tensors: tuple[Tensor, ...], out_states: tuple[Tensor, ...], options: dict[str, Any], key: Any
) -> tuple[Step, tuple[Tensor, ...]]:
    """The checked step, and tensors that its kernel can read."""
    infos = {name: describe(name, x) for name, x in zip(STEP, tensors, strict=True)}
    infos |= {name: describe(name, x) for name, x in zip(OUT, out_states, strict=False)}
    problem = check_step(infos, **options)
    for name, x in zip(OUT, out_states, strict=False):
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
        if x.is_neg() or x._is_zerotensor():
            raise ValueError(f"{name}: expected a tensor to write to, got a view of negated numbers or of no memory")
    spans = tuple(map(_span, (*tensors, *out_states)))
    given = tensors
    tensors = tuple(map(materialised, tensors))
    backend = backend_for(options["backend"], tensors[0])
    B, H = problem.B, problem.H
    rows = tuple(x if n > 2 or x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for n, x in enumerate(tensors))
    read = (*rows[:5], *(x.contiguous() for x in rows[5:]))
    strides = tuple(
        (name, (x.stride(0) if B > 1 else 0, x.stride(1) if H > 1 else 0, 0))
        for name, x in zip(STEP[:5], read[:5], strict=True)
    )
    problem = dataclasses.replace(problem, strides=strides, arch=architecture_of(tensors[0].device))
    step = Step(Call(problem, problem, backend, transposed=False), spans)
    if all(x is y for x, y in zip(read, given, strict=True)):
        if len(_settled) >= MAX_STEPS:
            _settled.clear()
        _settled[key] = step
    return step, read


def _span(x: Tensor) -> int:
    """Bytes from x's first element to the end of its last."""
    return (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


def _check_apart(tensors: tuple[Tensor, ...], out: tuple[Tensor, ...], spans: tuple[int, ...]) -> None:
    """Raises ValueError where out_states share memory with one another, or with inputs but the state that each follows.

    tensors: as given. A state itself may be written in its place: the same memory, all of it.
    """
    start = [x.data_ptr() for x in (*tensors, *out)]
    names = (*STEP, *OUT)
    for x in range(len(STEP), len(start)):
        for y in range(x):
            if start[x] < start[y] + spans[y] and start[y] < start[x] + spans[x]:
                itself = y == x - 3 and start[x] == start[y] and spans[x] == spans[y] and tensors[y].is_contiguous()
                if not itself:
                    raise ValueError(f"{names[x]}: expected memory of its own, got some that is also {names[y]}'s")


def _is_recorded(tensors: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> bool:
    """Whether gradients are, which out_states do not go with."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *out))
    if recorded and out:
        raise ValueError(
            "out_states: expected None while gradients are recorded (torch.no_grad() stops it), got states"
        )
    return recorded


def _registered(tensors: tuple[Tensor, ...], out: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, States]:
    """The step as a sequence of one token, for compilers and transforms; out is written after it."""
    infos = {name: describe(name, x) for name, x in zip((*STEP, *OUT), (*tensors, *out), strict=False)}
    check_step(infos, **options)
    _is_recorded(tensors, out)
    sequence = (*(x.unsqueeze(2) for x in tensors[:5]), *tensors[5:])
    h, last = library.apply(sequence, SEQUENCE | options, "recurrent")
    for x, y in zip(out, last, strict=False):
        x.copy_(y.reshape(x.shape))
    return h.squeeze(2), (out if out else last)  # type: ignore[return-value]


def _given(out_states: Any) -> tuple[Tensor, ...]:
    if out_states is None:
        return ()
    if not isinstance(out_states, tuple | list):
        raise TypeError(f"out_states: expected three tensors, c, n and m, got {type(out_states).__name__}")
    if len(out_states) != 3:
        raise ValueError(f"out_states: expected three tensors, c, n and m, got {len(out_states)}")
    return tuple(out_states)


def _elsewhere(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share no memory."""
    return x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()


def mlstm_step(
    q: Float[Tensor, "B H K"],
    k: Float[Tensor, "B H K"],
    v: Float[Tensor, "B H V"],
    i: Float[Tensor, "B H"],
    f: Float[Tensor, "B H"],
    c: Float[Tensor, "B H K V"],
    n: Float32[Tensor, "B H K"],
    m: Float32[Tensor, "B H"] | Float32[Tensor, "B H 1"],
    *,
    eps: float = 1e-6,
    qk_scale: float | None = None,
    input_gate: Literal["exponential", "sigmoid"] = "exponential",
    normalize: bool = True,
    out_states: States | None = None,
    backend: Literal["triton", "interpret", "reference", "auto"] = "auto",
) -> tuple[Float[Tensor, "B H V"], States]:
    """One token: h and the next state, in one kernel that reads the state once and writes it once.

    Args:
        q, k: (B, H, K); v: (B, H, V); i, f: pre-activations (B, H). Dtypes and other options as of `mlstm_chunkwise`.
        c, n, m: the state, (B, H, K, V) float32 or bfloat16, (B, H, K) float32, (B, H) or (B, H, 1) float32; zeros
            before the first token. A bfloat16 c is computed in float32 and rounded once per step.
        out_states: contiguous tensors that take the next state, in the dtypes of c, n, m. They may be c, n, m
            themselves (n and m then cost a copy each; two sets in turn cost none), and otherwise share no memory with
            one another or with any input. Not while gradients are recorded.

    Returns:
        h (B, H, V) in the dtype of v, and the next (c, n, m): out_states themselves if given, else m of (B, H).

    Differentiable; the backward pass is that of the chunkwise form. One launch and no synchronisation, so that a CUDA
    graph can capture it.
    """
    tensors: tuple[Tensor, ...] = (*library.autocast((q, k, v)), i, f, c, n, m)
    out = _given(out_states)
    options = {
        "eps": eps,
        "qk_scale": qk_scale,
        "input_gate": input_gate,
        "normalize": normalize,
        "backend": backend,
    }
    if not library.is_plain((*tensors, *out)):
        return _registered(tensors, out, options)
    key = call_key((*tensors, *out), *options.values())
    try:
        step = _settled.get(key)
    except TypeError:
        step = None
    given = tensors
    if step is None:
        step, tensors = _settle(tensors, out, options, key)
    if out:
        _check_apart(given, out, step.spans)
    call = step.call
    if call.backend != "reference":
        refuse_forward_mode(tensors)
    problem = call.problem
    head = (problem.B, problem.H)
    recorded = _is_recorded(tensors, out)
    tensors = (*tensors[:-1], tensors[-1].reshape(head))
    if recorded or call.backend == "reference":
        sequence = (*(x.unsqueeze(2) for x in tensors[:5]), *tensors[5:])
        by_reference = call.backend == "reference"
        h, last = run_reference(problem, sequence) if by_reference else run_kernels(call, sequence, last=True)
        for x, y in zip(out, last, strict=False):
            x.copy_(y.reshape(x.shape))
        return h.squeeze(2), (out if out else last)  # type: ignore[return-value]

    from kernels_triton import plan

    env = dict(zip(NAMES, tensors, strict=True))
    direct = {}
    for name, x, y in zip(plan.LAST, out, tensors[5:], strict=False):
        # A program writes the part of C that it has read; n and m are read by several.
        if _elsewhere(x, y) or (name == "c_last" and x.data_ptr() == y.data_ptr()):
            direct[name] = x.view(head) if name == "m_last" else x
    results = run(plan.forward_pass(problem, False), env, call.backend, direct)
    for name, x in zip(plan.LAST, out, strict=False):
        if name in direct:
            torch.autograd.graph.increment_version(x)
        else:
            x.copy_(results[name].view(x.shape))
    return results["h"].squeeze(2), (out if out else tuple(results[name] for name in plan.LAST))  # type: ignore[return-value]
