"""What the search for tile sizes does with a configuration: compile it, time one of its kernels, check its results."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernels_triton import assembler, plan
from kernels_triton import config as tables
from kernels_triton.config import Config, Tile
from kernels_triton.launch import Launch
from kernels_triton.problem import Problem, contiguous_strides
from kernels_triton.validation import ArrayInfo, check_call

from . import compare, sass
from .bench_cases import DTYPES, Dtype, Shape
from .cases import Arrays, Case, make_inputs
from .tune_candidates import KERNELS, with_tile

CHECKED_TOKENS = (1024, 131072)  # at least of each head; of all together: few heads take segments
FAR = 1.25  # of the best time: what one round leaves behind that is not timed again


def dtype_named(name: str) -> Dtype:
    """One of tools.bench's dtypes: float32 with its precision."""
    found = next((x for x in DTYPES if x.name == name), None)
    if found is None:
        raise ValueError(f"dtype: expected one of {', '.join(x.name for x in DTYPES)}, got {name!r}")
    return found


def make_problem(shape: Shape, name: str, arch: str) -> Problem:
    """The operator's problem on contiguous inputs; through descriptors where the PyTorch frontend does so.

    name: of a dtype of tools.bench.
    """
    B, H, T, K, V = shape.sizes
    dtype, precision = dtype_named(name).dtype, dtype_named(name).precision
    shapes = {"q": (B, H, T, K), "k": (B, H, T, K), "v": (B, H, T, V), "i": (B, H, T), "f": (B, H, T)}
    problem = check_call(
        {name: ArrayInfo(x, "float32" if name in ("i", "f") else dtype, "") for name, x in shapes.items()},
        eps=1e-6,
        chunk_size=None,
        qk_scale=None,
        normalizer_grad="exact",
        layout="bhtd",
        precision=precision,
        backend="auto",
    )
    descriptors = arch == "sm_90" and dtype == "bfloat16" and K % 8 == 0 and V % 8 == 0
    return dataclasses.replace(problem, arch=arch, descriptors=descriptors)


def config_of(problem: Problem, field: str) -> Config:
    """The configuration that the table has now; without fused kernels where with them the field's tile shapes nothing.

    The table's entry serves other numbers of heads too, which take the kernel that it shapes.
    """
    config = tables.configure(problem)
    tile: Tile | None = getattr(config, field)
    if tile is None:
        return config
    other = with_tile(config, field, dataclasses.replace(tile, num_warps=2 * tile.num_warps))
    shapes = launches_of(field, problem, config) != launches_of(field, problem, other)
    return config if shapes else dataclasses.replace(config, fused=None, dfused=None)


def this_architecture() -> str:
    """Of the GPU here. Raises ValueError without one."""
    if not torch.cuda.is_available():
        raise ValueError("target: expected an architecture such as sm_90, since this machine has no GPU")
    from frontend_torch.tensors import architecture_of

    return architecture_of(torch.device("cuda"))


def machine() -> str:
    """The GPU, the compiler and the assembler, for the table's record."""
    import triton

    found = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}"
    if torch.version.hip:
        return found
    major, minor = torch.cuda.get_device_capability()
    return f"{found}, {assembler.choose(10 * major + minor).name}"


def table_path(arch: str) -> Path:
    """The file that holds an architecture's table."""
    return Path(tables.__file__).parent / "configs" / f"{tables.TABLES.get(arch, tables.FALLBACK)}.json"


def too_large(shared: int, arch: str) -> str:
    """Why so much shared memory is too much, or nothing."""
    limit = tables.SHARED_MEMORY[tables.TABLES.get(arch, tables.FALLBACK)]
    return f"shared memory > {limit}" if shared > limit else ""


def _launches(problem: Problem, config: Config) -> tuple[Launch, ...]:
    forward = plan.forward_pass(problem, True, config)
    return forward.launches + plan.backward_pass(problem, None, False, config).launches


def launches_of(field: str, problem: Problem, config: Config) -> list[Launch]:
    """The launches, of both passes, of the kernel that a field of Config shapes."""
    name, backward = KERNELS[field]
    launches = (x for x in _launches(problem, config) if x.name == name)
    return [x for x in launches if backward in (None, x.constexprs.get("BACKWARD"))]


def compile_one(shape: Shape, dtype: str, field: str, arch: str, tile: tuple[int, ...]) -> tuple[int, int, str]:
    """(spilled bytes, shared memory, error) of one kernel; runs in a process of its own, needs no GPU.

    Of several launches the most.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from .compile_only import CompileOnly, Driver, resources

    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True  # the assembler reports only when it runs
    hip = arch.startswith("gfx")
    driver.set_active(Driver(GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)))
    problem = make_problem(shape, dtype, arch)
    config = with_tile(config_of(problem, field), field, Tile(*tile))
    results: list[tuple[Any, str]] = []
    try:
        for launch in launches_of(field, problem, config):
            run_one(dataclasses.replace(launch, kernel=CompileOnly(launch.kernel, results)), problem, config)
    except Exception as error:  # a compiler's failure is a result here
        return 0, 0, f"{type(error).__name__}: {str(error)[:60]}"
    spills = max(resources(compiled, log)[1] for compiled, log in results)
    shared = max(compiled.metadata.shared for compiled, _ in results)
    if arch == "sm_90" and any(sass.defects(sass.disassemble(x.asm["cubin"])) for x, _ in results):
        return 0, shared, "defect of the assembler"
    return spills, shared, ""


def compile_passes(problem: Problem, alone: Problem) -> None:
    """Compile all that the passes launch, and a forward pass without gradients of `alone`; needs no memory."""
    from .compile_only import CompileOnly

    config = tables.configure(problem)
    for launch in (*plan.forward_pass(alone, False, config).launches, *_launches(problem, config)):
        run_one(dataclasses.replace(launch, kernel=CompileOnly(launch.kernel, [])), problem, config)


def run_one(launch: Launch, problem: Problem, config: Config) -> None:
    """Launch on tensors without memory."""
    from frontend_torch import executor

    specs = {buffer: spec for x in _launches(problem, config) for buffer, spec in x.outputs.values()}
    B, H, T, K, V = problem.B, problem.H, problem.T, problem.K, problem.V
    shapes = {
        "q": (B, H, T, K),
        "k": (B, H, T, K),
        "v": (B, H, T, V),
        "dh": (B, H, T, V),
        "i": (B, H, T),
        "f": (B, H, T),
    }
    env = {}
    for name in launch.buffers:
        half = name in ("q", "k", "v", "dh")
        shape, dtype = (
            (shapes[name], problem.dtype if half else "float32")
            if name in shapes
            else (specs[name].shape, specs[name].dtype)
        )
        env[name] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    executor.launch_one(launch, env, torch.device("meta"))


def checked_case(p: Problem) -> Case:
    """A case of as many heads, which decide on the launches and are compiled in, and fewer tokens."""
    of_each, together = CHECKED_TOKENS
    T = min(p.T, max(of_each, together // (p.B * p.H)))
    return Case("tune", B=p.B, H=p.H, T=T, K=p.K, V=p.V, dtype=p.dtype, precision=p.precision)


def of_case(p: Problem, case: Case) -> Problem:
    """The problem with a case's tokens, its inputs contiguous."""
    tails = {"q": p.K, "k": p.K, "v": p.V, "i": 1, "f": 1}
    strides = tuple((name, contiguous_strides(case.H, case.T, D, p.layout)) for name, D in tails.items())
    return dataclasses.replace(p, T=case.T, strides=strides)


class Bench:
    """Times kernels of one problem on the GPU, and compares whole passes with float64."""

    def __init__(self, problem: Problem, config: Config) -> None:
        from frontend_torch import executor

        self.executor, self.problem = executor, problem
        self.env = self._inputs(problem)
        for launch in _launches(problem, config):
            executor.launch_one(launch, self.env, self.env["q"].device)

    @staticmethod
    def _inputs(problem: Problem) -> dict[str, torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        B, H, T, K, V = problem.B, problem.H, problem.T, problem.K, problem.V
        tails: dict[str, tuple[int, ...]] = {"q": (K,), "k": (K,), "v": (V,), "dh": (V,), "i": (), "f": ()}
        env = {}
        for name, tail in tails.items():
            x = torch.randn((B, H, T, *tail), generator=generator, device="cuda")
            env[name] = x.to(getattr(torch, problem.dtype)) if tail else x + 3.0 * (name == "f")
        return env

    def time(self, field: str, config: Config) -> float:
        """Milliseconds of one kernel under a configuration; from a CUDA graph, as few heads take the host longer."""
        from triton.testing import do_bench_cudagraph

        launches = launches_of(field, self.problem, config)
        made = {buffer for launch in launches for buffer, _ in launch.outputs.values()}
        env = dict(self.env)

        def call() -> None:
            for buffer in made:
                env.pop(buffer, None)
            for launch in launches:
                self.executor.launch_one(launch, env, env["q"].device)

        return float(do_bench_cudagraph(call, rep=20, return_mode="median"))

    def check(self, config: Config) -> str:
        """What is wrong with a configuration's results against float64, or nothing; once more and by pointers, too."""
        problem, inputs, exact, tolerance = self._small
        results = self._results(problem, config, inputs)
        for name, x in results.items():
            error = compare.frobenius_error(compare.from_torch(x), exact[name])
            if not error <= tolerance[name]:
                return f"{name}: error {error:.1e} > {tolerance[name]:.1e}"
        by_pointers = dataclasses.replace(problem, descriptors=False)  # as in JAX
        for way, other in (("in another run", problem), ("by pointers", by_pointers)):
            for name, x in self._results(other, config, inputs).items():
                if not torch.equal(x, results[name]):
                    return f"{name}: other bits {way}"
        return ""

    @functools.cached_property
    def _small(self) -> tuple[Problem, dict[str, torch.Tensor], Arrays, dict[str, float]]:
        """A shorter problem, its inputs, their results in float64 and the tolerances."""
        case = checked_case(self.problem)
        arrays = make_inputs(case)
        exact = compare.truth(case, arrays, "cuda")
        inputs = {"dh" if name == "d_h" else name: compare.to_torch(x, "cuda") for name, x in arrays.items()}
        return of_case(self.problem, case), inputs, exact, compare.tolerances(case, arrays, exact, "cuda")

    def _results(self, problem: Problem, config: Config, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        env = dict(inputs)
        forward = plan.forward_pass(problem, True, config)
        env |= self.executor.launch_all(forward, env)
        gradients = self.executor.launch_all(plan.backward_pass(problem, None, False, config), env, earlier=forward)
        return {"h": env["h"], **gradients}


def measure(
    shape: Shape, dtype: str, field: str, arch: str, tiles: Mapping[int, Tile], rounds: int, slack: float, send: Any
) -> None:
    """Times tiles in turns, and checks them, the fastest first, until one is right. For a process of its own.

    Tiles that a round leaves FAR behind the best are not timed again. Sends ("turns", number) of what is left to time
    before each round, ("time", n) and ("check", n) before it does so with tile n, ("times", {n: milliseconds}) and,
    last, ("wrong", {n: what}) of those that were checked, "" for the one that is right. Those within `slack` of the
    best keep their order.
    """
    problem = make_problem(shape, dtype, arch)
    config = config_of(problem, field)
    bench = Bench(problem, config)
    rows: dict[int, list[float]] = {n: [] for n in tiles}
    times: dict[int, float] = {}
    close = list(tiles)
    for left in range(rounds, 0, -1):
        send.send(("turns", left * len(close)))
        for n in close:
            send.send(("time", n))
            rows[n].append(bench.time(field, with_tile(config, field, tiles[n])))
        times = {n: statistics.median(row) for n, row in rows.items()}
        best = min(times.values())
        close = [n for n in close if times[n] <= FAR * best]
    send.send(("times", times))
    wrong = {}
    for n in sorted(times, key=lambda n: (times[n] > best * slack, times[n] if times[n] > best * slack else n)):
        send.send(("check", n))
        wrong[n] = bench.check(with_tile(config, field, tiles[n]))
        if not wrong[n]:
            break
    send.send(("wrong", wrong))
