"""What the operators in PyTorch's registry have in common: names and order of arguments, results without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels_triton.validation import TWICE

from .calls import NAMES, RESULTS

OPTIONS = {
    "eps": "float",
    "chunk_size": "int?",
    "qk_scale": "float?",
    "normalizer_grad": "str",
    "layout": "str",
    "precision": "str",
    "save_states": "bool",
    "input_gate": "str",
    "normalize": "bool",
    "backend": "str",
}
# What a forward pass may save, each an output of its own: what a call has no need of is empty, (B, H, 0).
SAVED = ("c", "c_low", "a", "a_low", "gamma", "gamma_low", "picked", "states", "norms", "floor", "r", "chunks")
GRADIENTS = tuple(f"d{name}" for name in NAMES)  # those of absent initial states are empty
COTANGENTS = tuple(f"d{name}" for name in RESULTS)
HEADS = {"bhtd": 1, "bthd": 2}  # the axis of heads


def schema(*groups: tuple[str, Sequence[str]], options: Mapping[str, str], returns: int) -> str:
    """A schema. groups: a kind of argument each, and the arguments' names; options: kinds by name; returns: tensors."""
    inputs = ", ".join(f"{kind} {name}" for kind, names in groups for name in names)
    given = ", ".join(f"{kind} {name}" for name, kind in options.items())
    return f"({inputs}, {given}) -> ({', '.join(['Tensor'] * returns)})"


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator of the namespace mlstm_dual; fake: makes results that have no memory, of symbolic sizes perhaps."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    library.impl(name, run, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.mlstm_dual, name).default
    torch.library.register_fake(operator, fake, lib=library)
    return operator


library = torch.library.Library("mlstm_dual", "DEF")


def twice(ctx: Any, *_: Tensor | None) -> Any:
    """The derivative of an operator that is a derivative."""
    raise RuntimeError(TWICE)


def empty(q: Tensor, layout: str) -> Tensor:
    """What stands for a result that there is no need of."""
    return q.new_empty((q.shape[0], q.shape[HEADS[layout]], 0))


def like(x: Tensor, transposed: bool) -> Tensor:
    """A tensor of x's shape, contiguous or with tokens before heads in memory."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) if transposed else x.new_empty(x.shape)


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work, which wraps tensors in plain ones."""
    return torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Whether x stands for a batch of tensors, as autograd makes them for batched gradients."""
    return torch._C._functorch.is_legacy_batchedtensor(x)
