"""The part of tools.multi_gpu_check that one process per device does in PyTorch."""

from __future__ import annotations

import datetime
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

import frontend_torch
from frontend_torch import segments as exchange
from kernels_triton import context

from . import compare
from .cases import Arrays, Case, make_inputs
from .multi_gpu_worker import (
    BATCH,
    CONTEXT,
    EQUAL,
    LENGTHS,
    SHARDED,
    Place,
    equality,
    options_of,
    scaling,
    timed,
)


def _own(place: Place, x: Tensor, axis: int) -> Tensor:
    return x.chunk(place.devices, axis)[place.rank].contiguous()


def _wait(place: Place, _: Any = None) -> None:
    """Until all devices are done."""
    distributed.barrier()
    if place.device == "cuda":
        torch.cuda.synchronize()


def _split(place: Place, case: Case, arrays: Arrays) -> Arrays:
    """Results of the whole sequence, each process computing its part of it."""

    def call(**inputs: Tensor) -> Any:
        own = {name: x if "_" in name else _own(place, x, 2) for name, x in inputs.items()}
        arguments: dict[str, Any] = {**own, **options_of(case, place)}
        h, last = frontend_torch.mlstm_context_parallel(**arguments)
        sides = case.T // place.devices * place.rank, case.T // place.devices * (place.devices - 1 - place.rank)
        # Gradients are of the sum of all processes' losses: one of them has the loss of the last states.
        return torch.nn.functional.pad(h, (0, 0, *sides)), [x if place.rank == 0 else x.detach() for x in last]

    results = compare.run_torch(call, {}, case, arrays, place.device)
    for name, x in results.items():
        if not name.endswith("_last"):
            total = compare.to_torch(x, place.device)
            distributed.all_reduce(total)
            results[name] = compare.from_torch(total)
    return results


def _equal(place: Place) -> None:
    for case in EQUAL[place.device]:
        arrays = make_inputs(case)
        split = _split(place, case, arrays)
        if place.rank == 0:
            one = compare.run_torch(frontend_torch.mlstm_chunkwise, options_of(case, place), case, arrays, place.device)
            place.add("equality", equality(case, arrays, one, split, place.device))
        _wait(place)


def _bits(place: Place) -> None:
    """DTensor over batch and over heads: the bits of one device."""
    from torch.distributed.tensor import Shard, distribute_tensor

    case = SHARDED[place.device]
    mesh = distributed.device_mesh.init_device_mesh(place.device, (place.devices,))
    arrays = {name: compare.to_torch(x, place.device) for name, x in make_inputs(case).items()}
    dh = arrays.pop("d_h")
    operator: Callable[..., Any] = functools.partial(frontend_torch.mlstm_chunkwise, **options_of(case, place))

    def both(tensors: Mapping[str, Tensor], dh: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        h = operator(**leaves)
        return (h.detach(), *torch.autograd.grad(h, list(leaves.values()), dh))

    one = both(arrays, dh)
    for name, axis in (("batch", 0), ("heads", 1)):
        over = {n: distribute_tensor(x, mesh, [Shard(axis)]) for n, x in arrays.items()}
        many: Any = both(over, distribute_tensor(dh, mesh, [Shard(axis)]))
        same = all(torch.equal(x, y.full_tensor()) for x, y in zip(one, many, strict=True))
        place.add("bits", {"split": name, "case": case.name, "same": same})


def _draw(place: Place, shape: Sequence[int]) -> list[Tensor]:
    """q, k, v, i, f and dh."""
    B, H, T, K, V = shape
    dtype = torch.bfloat16 if place.device == "cuda" else torch.float32
    randn = functools.partial(torch.randn, device=place.device)
    heads = [randn(B, H, T, D, dtype=dtype) for D in (K, K, V, V)]
    return [*heads[:3], randn(B, H, T), randn(B, H, T) + 4, heads[3]]


def _passes(operator: Callable[..., Any], tensors: list[Tensor]) -> dict[str, Callable[[], Any]]:
    *inputs, dh = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    return {"fw": lambda: operator(*inputs), "fw+bw": lambda: torch.autograd.grad(operator(*leaves), leaves, dh)}


def _times(place: Place, operator: Callable[..., Any], shape: Sequence[int], together: bool) -> dict[str, float]:
    """Of all processes together, or of the first alone."""
    if not together and place.rank:
        return dict.fromkeys(("fw", "fw+bw"), 0.0)

    def wait(_: Any) -> None:
        if place.device == "cuda":
            torch.cuda.synchronize()

    wait_all = functools.partial(_wait, place) if together else wait
    return {name: timed(call, wait_all, place.device) for name, call in _passes(operator, _draw(place, shape)).items()}


def _scale(place: Place) -> None:
    one_device = functools.partial(frontend_torch.mlstm_chunkwise, backend=place.timed_backend)
    by_tokens = functools.partial(frontend_torch.mlstm_context_parallel, backend=place.timed_backend)
    for name, shape, axis, operator in (
        ("tokens", CONTEXT[place.device], 2, by_tokens),
        ("batch", BATCH[place.device], 0, one_device),
    ):
        own = [n // place.devices if a == axis else n for a, n in enumerate(shape)]
        one = _times(place, one_device, shape, together=False)
        _wait(place)
        if place.device == "cuda":
            torch.cuda.empty_cache()
        many = _times(place, operator, own, together=True)
        place.add("scaling", *scaling(name, shape, {x: (one[x], many[x]) for x in one}))


def _count(place: Place) -> None:
    """Bytes handed to the gathering of each pass."""
    gather, found = exchange._all_gather, []

    def counting(made: Tensor, given: Tensor, **options: Any) -> None:
        found.append(given.numel() * given.itemsize)
        gather(made, given, **options)

    exchange._all_gather = counting
    B, H, _, K, V = CONTEXT[place.device]
    for T in LENGTHS[place.device]:
        found.clear()
        operator = functools.partial(frontend_torch.mlstm_context_parallel, backend=place.backend)
        _passes(operator, _draw(place, (B, H, T, K, V)))["fw+bw"]()
        formula = context.exchanged_bytes(B, H, K, V)
        for pass_, bytes_, expected in zip(("forward", "backward"), found, formula, strict=True):
            place.add("bytes", {"pass": pass_, "tokens": T, "formula": expected, "measured": bytes_})
    exchange._all_gather = gather


def leave() -> NoReturn:
    """Ends the process of a rank whose work is done and well.

    Python's own way out can abort: gloo's threads may still drop tensors (github.com/pytorch/pytorch/issues/190489).
    """
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run(place: Place, store: str, timeout: datetime.timedelta) -> NoReturn:
    """All parts; does not return."""
    kind = "gloo"
    if place.device == "cuda":
        torch.cuda.set_device(place.rank)
        kind = "nccl"
    else:
        torch.set_num_threads(1)
    distributed.init_process_group(
        kind, init_method=f"file://{store}", rank=place.rank, world_size=place.devices, timeout=timeout
    )
    for part in (_equal, _bits, _count, _scale):
        part(place)
    leave()
