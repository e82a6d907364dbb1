"""The host's share of eager calls in PyTorch: Python, dispatch and launcher, without a GPU.

    python -m tools.host_time [--shape B,H,T,K,V] [--calls N]

Kernels are compiled for sm_90 and launched by Triton's own launcher on a CUDA driver that does nothing (stub_driver.c),
on tensors in the CPU's memory. What a real driver takes for a launch, and a real allocator for memory, comes on top;
tools.bench measures whole calls on a GPU. Needs a C compiler, as Triton's launcher does. Exit code 130 if interrupted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from . import stub_driver

ROUNDS = 9


def _microseconds(call: Callable[[], Any], calls: int) -> list[float]:
    """Of one call, each round's mean."""
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return found


def _calls(B: int, H: int, T: int, K: int, V: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    import torch

    import frontend_torch
    from frontend_torch import calls, recurrent

    # Tensors of the CPU pass for a GPU's.
    calls.backend_for = recurrent.backend_for = lambda backend, x: "triton"  # type: ignore[attr-defined]

    def draw(*dims: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(dims, dtype=dtype)

    tokens: Any = [draw(B, H, T, D) for D in (K, K, V)] + [draw(B, H, T, dtype=torch.float32) for _ in range(2)]
    leaves: Any = [x.clone().requires_grad_() for x in tokens]
    dh = draw(B, H, T, V)
    state: Any = [draw(B, H, *dims, dtype=torch.float32) for dims in ((K, V), (K,), ())]
    token: Any = [x[:, :, 0].contiguous() for x in tokens]
    into: Any = tuple(torch.empty_like(x) for x in state)

    def forward() -> Any:
        return frontend_torch.mlstm_chunkwise(*tokens)

    def recorded() -> Any:
        return frontend_torch.mlstm_chunkwise(*leaves)

    def both() -> Any:
        return torch.autograd.grad(recorded(), leaves, dh)

    def step() -> Any:
        return frontend_torch.mlstm_step(*token, *state, out_states=into)

    return {
        "forward": forward,
        "forward, gradients recorded": recorded,
        "forward and backward": both,
        "one step, into other states": step,
    }


def main(
    shape: Annotated[str, typer.Option(help="B,H,T,K,V; small: tensors lie in the CPU's memory")] = "1,4,512,64,64",
    calls: Annotated[int, typer.Option(min=1, help=f"calls in each of {ROUNDS} rounds")] = 400,
) -> None:
    """Median microseconds of the host's time per call, and launches per call."""
    try:
        sizes = [int(x) for x in shape.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 5 or min(sizes) < 1:
        raise typer.BadParameter(f"expected five numbers B,H,T,K,V from 1, got {shape!r}", param_hint="--shape")
    with tempfile.TemporaryDirectory() as folder:
        stub = stub_driver.activate(stub_driver.build(Path(folder)))
        import torch
        import triton

        torch.set_num_threads(1)
        table = Table(title=f"host time per call, {shape}, torch {torch.__version__}, Triton {triton.__version__}")
        for title in ("call", "launches", "us, median", "least", "most"):
            table.add_column(title, justify="left" if title == "call" else "right")
        try:
            for name, call in tqdm(_calls(*sizes).items(), desc="calls", unit="call"):
                call()  # compiles
                before = stub.stub_count()
                call()
                launches = stub.stub_count() - before
                found = _microseconds(call, calls)
                table.add_row(name, str(launches), *(f"{f(found):.1f}" for f in (statistics.median, min, max)))
        except KeyboardInterrupt:
            Console().print("interrupted")
            raise typer.Exit(130) from None
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
