"""Calls the operator in the ways that training code does, and holds each against the plain call, to the bit.

    python -m tools.transforms [--device cpu|cuda] [--cases GLOB ...]

torch.compile, CUDA graphs, torch.export, vmap, checkpoints and dispatch modes; jax.vmap, checkpoint, scan and export.
On a CPU the kernels run in Triton's interpreter. Exit code 1 if a bit differs or a way fails; 130 if interrupted.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from . import compare, report
from .cases import Case, make_inputs, select
from .parity import BACKENDS, device_name, prepare

Function = Callable[..., Any]
# A way: from a function of the operator's arrays by name to another with the same results.
Way = Callable[[Function], Function]
DEFAULT = {
    "cpu": ["states-exact", "bthd-states-bfloat16", "one-token"],
    "cuda": [
        "gpu-bfloat16-128x256",
        "gpu-float32-64x64",
        "gpu-strided",
        "gpu-many-heads-exact",
        "gpu-recurrent-bfloat16",
        "gpu-step",
    ],
}


def _flat(function: Function, inputs: dict[str, Any]) -> tuple[Function, Callable[[tuple[Any, ...]], Any]]:
    """The function of positional arrays with a tuple as result, and the way back to the operator's form of it."""
    names = tuple(inputs)

    def flat(*arrays: Any) -> tuple[Any, ...]:
        out = function(**dict(zip(names, arrays, strict=True)))
        return (out[0], *out[1]) if isinstance(out, tuple) else (out,)

    return flat, lambda out: (out[0], out[1:]) if len(out) > 1 else out[0]


def _compiled(function: Function, dynamic: bool = False) -> Function:
    import torch

    torch._dynamo.reset()
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=dynamic or None)
    return compiled


def _graphed(function: Function) -> Function:
    import torch

    def call(**inputs: Any) -> Any:
        flat, back = _flat(function, inputs)
        graphed: Any = torch.cuda.make_graphed_callables(flat, tuple(inputs.values()))
        return back(graphed(*inputs.values()))

    return call


def _exported(function: Function) -> Function:
    import torch

    def call(**inputs: Any) -> Any:
        flat, back = _flat(function, inputs)

        class Module(torch.nn.Module):
            def forward(self, *arrays: Any) -> Any:
                return flat(*arrays)

        exported: Any = torch.export.export(Module(), tuple(inputs.values())).module()
        return back(exported(*inputs.values()))

    return call


def _mapped(function: Function) -> Function:
    """With a mapped axis of one call: the batch, and so the plan, is then the plain call's."""
    import torch

    def call(**inputs: Any) -> Any:
        flat, back = _flat(function, inputs)
        return back(tuple(x[0] for x in torch.func.vmap(flat)(*(x[None] for x in inputs.values()))))

    return call


def _checkpointed(function: Function, selective: bool = False) -> Function:
    import torch
    from torch.utils import checkpoint

    def policy(context: Any, operator: Any, *_: Any, **__: Any) -> Any:
        saved = operator is torch.ops.mlstm_dual.chunkwise.default
        return checkpoint.CheckpointPolicy.MUST_SAVE if saved else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, policy)

    def call(**inputs: Any) -> Any:
        flat, back = _flat(function, inputs)
        how = contexts if selective else checkpoint.noop_context_fn
        run: Any = checkpoint.checkpoint
        return back(run(flat, *inputs.values(), use_reentrant=False, context_fn=how))

    return call


def _watched(function: Function) -> Function:
    """Under a dispatch mode that does nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    def call(**inputs: Any) -> Any:
        with FlopCounterMode(display=False):
            return function(**inputs)

    return call


def _jax_mapped(function: Function) -> Function:
    import jax

    def call(**inputs: Any) -> Any:
        many = jax.tree.map(lambda x: x[None], inputs)
        return jax.tree.map(lambda x: x[0], jax.vmap(lambda x: function(**x))(many))

    return call


def _jax_checkpointed(function: Function, policy: str) -> Function:
    import jax

    return jax.checkpoint(function, policy=getattr(jax.checkpoint_policies, policy))


def _jax_scanned(function: Function) -> Function:
    """As the one layer of a scan."""
    import jax

    def call(**inputs: Any) -> Any:
        many = jax.tree.map(lambda x: x[None], inputs)
        return jax.tree.map(lambda x: x[0], jax.lax.scan(lambda _, x: (None, function(**x)), None, many)[1])

    return call


def _jax_exported(function: Function) -> Function:
    import jax
    import jax.export

    def call(**inputs: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
        checks = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")]
        exported = jax.export.export(jax.jit(lambda x: function(**x)), disabled_checks=checks)(shapes)
        return jax.export.deserialize(exported.serialize(vjp_order=1)).call(inputs)

    return call


WAYS: dict[str, dict[str, Way]] = {
    "torch": {
        "torch.compile": _compiled,
        "torch.compile, any shape": functools.partial(_compiled, dynamic=True),
        "CUDA graph of both passes": _graphed,
        "torch.export": _exported,
        "vmap": _mapped,
        "checkpoint": _checkpointed,
        "selective checkpoint": functools.partial(_checkpointed, selective=True),
        "dispatch mode": _watched,
    },
    "jax": {
        "vmap": _jax_mapped,
        "checkpoint, nothing saved": functools.partial(_jax_checkpointed, policy="nothing_saveable"),
        "checkpoint, products saved": functools.partial(_jax_checkpointed, policy="dots_saveable"),
        "scan": _jax_scanned,
        "export and back": _jax_exported,
    },
}
# On a CPU there is no CUDA graph, and the interpreter, a callback into this process, cannot be exported from it.
GPU_ONLY = {("torch", "CUDA graph of both passes"), ("jax", "export and back")}


@functools.cache
def _run(case: Case, framework: str, device: str, way: Way | None = None) -> dict[str, np.ndarray]:
    options = case.options() | {"backend": BACKENDS[device]}
    operator: Function = functools.partial(compare.frontend(framework, case.form), **options)

    def function(**inputs: Any) -> Any:
        return (way(operator) if way else operator)(**inputs)

    # cu_seqlens, which belong to a case and not to its options, arrive as an input.
    return compare.RUN[framework](function, {}, case, make_inputs(case), device)


def outcome(case: Case, framework: str, way: Way, device: str) -> str:
    """What came of calling the operator that way: "identical", or what differs, or the error."""
    plain = _run(case, framework, device)
    try:
        got = _run(case, framework, device, way)
    except Exception as error:  # whatever went wrong is this way's row
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    differ = [name for name in plain if not compare.identical(plain[name], got[name])]
    return f"differ: {', '.join(differ)}" if differ else "identical"


def ways(device: str) -> Iterator[tuple[str, str, Way]]:
    """The ways to call each framework's operator on a device."""
    for framework, named in WAYS.items():
        for name, way in named.items():
            if device == "cuda" or (framework, name) not in GPU_ONLY:
                yield framework, name, way


def main(
    device: str = typer.Option("cpu", help="cpu: Triton's interpreter. cuda: a GPU."),
    cases: list[str] = typer.Option([], help="Glob patterns of tools.parity's cases; by default a few."),
) -> None:
    """Hold the operator under each framework's transforms against the plain call."""
    if device not in BACKENDS:
        raise typer.BadParameter(f"expected one of {', '.join(BACKENDS)}, got {device}", param_hint="--device")
    prepare(device)
    try:
        selected = select(cases or DEFAULT[device], cuda=device == "cuda")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(width=None if sys.stdout.isatty() else 170)
    report.show(console, {"backend": BACKENDS[device], "device": device_name(device), **report.versions()})
    table = Table(
        "framework", "way", *(case.name for case in selected), title="Outputs and gradients, against the plain call"
    )
    todo = list(ways(device))
    good = True
    try:
        for framework, name, way in tqdm(todo, desc="transforms", unit="way"):
            outcomes = [outcome(case, framework, way, device) for case in selected]
            good &= set(outcomes) == {"identical"}
            table.add_row(framework, name, *outcomes)
    except KeyboardInterrupt:
        console.print("interrupted")
        raise typer.Exit(130) from None
    console.print(table)
    if not good:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
