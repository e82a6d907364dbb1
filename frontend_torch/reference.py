"""The readable reference on torch tensors: native operations, differentiable any number of times."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernels_triton import packing, reference
from kernels_triton.problem import Problem

from .tensors import dtype_of, is_autocast


def run_reference(problem: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The readable reference in float32, under autocast too."""
    device = tensors[0].device.type if tensors[0] is not None else ""
    if is_autocast(device):
        with torch.autocast(device, enabled=False):
            return run_reference(problem, tensors)
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
