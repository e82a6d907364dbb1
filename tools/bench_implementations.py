"""The implementations as runners: what is called, on which operands, in torch and in JAX. Measures nothing itself."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .bench_cases import Dtype, Implementation, Shape

NAMES = ("q", "k", "v", "i", "f")
Inputs = dict[str, Tensor]  # NAMES and dh
Function = Callable[..., Any]
Adapt = Callable[[Inputs], list[Tensor]]  # a peer's own arguments, its dh last


class NotAvailable(Exception):
    """An implementation that this machine or version does not have. The text is the result to report."""


class Runner(Protocol):
    """One pass of one implementation on one shape."""

    note: str

    def operands(self, inputs: Inputs) -> Any:
        """What `call` takes, made from a set of inputs; not part of the time."""

    def call(self, operands: Any) -> Any: ...

    def wait(self, result: Any) -> None:
        """Until that result is there; the caller then waits for the device as well."""

    def memory(self, operands: Any) -> int | None:
        """Peak bytes of one call, inputs, outputs and gradients included; None where that is not known."""


def make_inputs(shape: Shape, dtype: Dtype, device: str, seed: int) -> Inputs:
    """One set of inputs and the cotangent of h. Gates are float32, as models compute them."""
    generator = torch.Generator(device).manual_seed(seed)
    B, H, T, K, V = shape.sizes
    tails = {"q": (K,), "k": (K,), "v": (V,), "i": (), "f": (), "dh": (V,)}
    kind = getattr(torch, dtype.dtype)
    inputs = {
        name: torch.randn((B, H, T, *tail), generator=generator, device=device).to(
            kind if tail or name == "dh" else torch.float32
        )
        for name, tail in tails.items()
    }
    inputs["f"] += 3.0  # forget gates of trained models are mostly open
    return inputs


def set_bytes(inputs: Inputs) -> int:
    """What a set of inputs holds."""
    return sum(x.nbytes for x in inputs.values())


def _as_given(inputs: Inputs) -> list[Tensor]:
    return [inputs[name] for name in (*NAMES, "dh")]


class TorchRunner:
    """A function of torch tensors, and its gradients through autograd."""

    def __init__(self, function: Function, pass_: str, adapt: Adapt = _as_given, note: str = "") -> None:
        self.function, self.pass_, self.adapt, self.note = function, pass_, adapt, note

    def operands(self, inputs: Inputs) -> Any:
        *arguments, dh = self.adapt(inputs)
        leaves = [x.detach().requires_grad_(self.pass_ != "fw") for x in arguments]
        return leaves, dh, self.function(*leaves) if self.pass_ == "bw" else None

    def call(self, operands: Any) -> Any:
        leaves, dh, h = operands
        if self.pass_ == "fw":
            with torch.no_grad():
                return self.function(*leaves)
        if h is None:
            return torch.autograd.grad(self.function(*leaves), leaves, dh)
        return torch.autograd.grad(h, leaves, dh, retain_graph=True)

    def wait(self, result: Any) -> None:
        pass

    def memory(self, operands: Any) -> int | None:
        leaves, dh, _ = operands
        if self.pass_ == "bw" or dh.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = self.call(operands)
        torch.cuda.synchronize()
        del result
        given = [*leaves, dh] if self.pass_ == "fw+bw" else leaves
        return torch.cuda.max_memory_allocated() - before + sum(x.nbytes for x in given)


class GraphRunner:
    """A torch runner's call, captured in a CUDA graph per set of inputs and replayed."""

    note = "replayed"

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.captured: dict[int, tuple[Inputs, Any]] = {}  # holds the inputs too, so that their id stays theirs

    def operands(self, inputs: Inputs) -> Any:
        if id(inputs) not in self.captured:
            self.captured[id(inputs)] = (inputs, self._capture(inputs))
        return self.captured[id(inputs)][1]

    def _capture(self, inputs: Inputs) -> Any:
        operands = self.runner.operands(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks before a capture
            for _ in range(2):
                self.runner.call(operands)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.runner.call(operands)
        return graph, operands, results

    def call(self, operands: Any) -> Any:
        operands[0].replay()

    def wait(self, result: Any) -> None:
        pass

    def memory(self, operands: Any) -> int | None:
        return None


class JaxRunner:
    """A jitted function on the same memory. "bw" alone does not exist: XLA would not keep a graph between calls."""

    note = ""

    def __init__(self, function: Callable[..., Any], pass_: str) -> None:
        import jax

        def forward_and_backward(*arguments: Any) -> Any:
            *leaves, dh = arguments
            h, pull = jax.vjp(function, *leaves)
            return h, pull(dh)

        self.pass_ = pass_
        self.jitted = jax.jit(function if pass_ == "fw" else forward_and_backward)
        self.compiled: Any = None

    def operands(self, inputs: Inputs) -> Any:
        import jax

        names = NAMES if self.pass_ == "fw" else (*NAMES, "dh")
        arrays = [jax.dlpack.from_dlpack(inputs[name]) for name in names]
        if self.compiled is None:
            self.compiled = self.jitted.lower(*arrays).compile()
        return arrays

    def call(self, operands: Any) -> Any:
        return self.compiled(*operands)

    def wait(self, result: Any) -> None:
        import jax

        jax.block_until_ready(result)

    def memory(self, operands: Any) -> int | None:
        stats = self.compiled.memory_analysis()
        if stats is None or operands[0].device.platform == "cpu":
            return None
        sizes = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
        return int(sizes - stats.alias_size_in_bytes)


def _ours(x: Implementation, dtype: Dtype, backend: str) -> Function:
    from frontend_torch import mlstm_chunkwise

    options = dict(x.options)
    descriptors = options.pop("descriptors", None)
    missing = sorted(set(options) - set(inspect.signature(mlstm_chunkwise).parameters))
    if missing:
        raise NotAvailable(f"the operator has no option {', '.join(missing)}")
    function: Function = mlstm_chunkwise
    function = functools.partial(function, precision=dtype.precision, backend=backend, **options)
    return function if descriptors is None else _with_descriptors(descriptors, function)


def _with_descriptors(wish: str, function: Function) -> Function:
    """The function, called while MLSTM_DESCRIPTORS is that. The backward pass does as the forward pass did."""
    from frontend_torch import calls

    def call(*arguments: Any) -> Any:
        before, calls.descriptors = calls.descriptors, wish
        try:
            return function(*arguments)
        finally:
            calls.descriptors = before

    return call


def _ours_torch(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    return TorchRunner(_ours(x, dtype, "triton"), pass_)


def _ours_graph(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    return GraphRunner(TorchRunner(_ours(x, dtype, "triton"), pass_))


def _jax(dtype: Dtype, pass_: str, backend: str) -> Runner:
    from frontend_jax import mlstm_chunkwise

    function: Callable[..., Any] = mlstm_chunkwise
    return JaxRunner(functools.partial(function, precision=dtype.precision, backend=backend), pass_)


def _ours_jax(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    return _jax(dtype, pass_, "triton")


def _reference_jax(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    return _jax(dtype, pass_, "reference")


@functools.cache  # compiled once for all passes
def _reference(precision: str, compiled: bool) -> Function:
    from frontend_torch import mlstm_chunkwise

    function: Function = mlstm_chunkwise
    function = functools.partial(function, precision=precision, backend="reference")
    return torch.compile(function, dynamic=False) if compiled else function


def _reference_torch(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    return TorchRunner(_reference(dtype.precision, x.options.get("compile", False)), pass_)


def _mlstm_kernels(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    module, _, name = x.options["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    options = {name: value for name, value in x.options.items() if name not in ("target", "half_gates")}
    options["autocast_kernel_dtype"] = getattr(torch, dtype.dtype)

    def half_gates(inputs: Inputs) -> list[Tensor]:
        return _as_given({**inputs, **{name: inputs[name].to(inputs["q"].dtype) for name in ("i", "f")}})

    adapt = half_gates if x.options.get("half_gates") else _as_given
    return TorchRunner(functools.partial(function, **options), pass_, adapt)


def _fla(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def tokens_first(inputs: Inputs) -> list[Tensor]:
        log_decay = torch.nn.functional.logsigmoid(inputs["f"].float())
        arguments = (inputs["q"], inputs["k"], inputs["v"], log_decay, inputs["dh"])
        return [x.transpose(1, 2).contiguous() for x in arguments]

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return chunk_simple_gla(q, k, v, g=g)[0]

    return TorchRunner(function, pass_, tokens_first)


def _sdpa(x: Implementation, shape: Shape, dtype: Dtype, pass_: str) -> Runner:
    """With v of head dim K where no fused kernel takes K and V; the one that stores all scores is never chosen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(fused):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def narrow(inputs: Inputs, width: int) -> list[Tensor]:
        v, dh = (inputs[name][..., :width].contiguous() for name in ("v", "dh"))
        return [inputs["q"], inputs["k"], v, dh]

    def of_width(width: int) -> TorchRunner:
        note = "" if width == shape.V else f"v of head dim {width}"
        return TorchRunner(function, pass_, functools.partial(narrow, width=width), note)

    if shape.K >= shape.V:
        return of_width(shape.V)
    try:  # one head is enough to see whether a kernel takes these head dims, and its gradient
        probe = TorchRunner(function, "fw+bw", functools.partial(narrow, width=shape.V))
        one = Shape("", 1, 1, 128, shape.K, shape.V)
        with warnings.catch_warnings(action="ignore"):  # each kernel that declines says so
            probe.call(probe.operands(make_inputs(one, dtype, "cuda", 0)))
    except RuntimeError:
        return of_width(shape.K)
    return of_width(shape.V)


BUILD: dict[str, Callable[[Implementation, Shape, Dtype, str], Runner]] = {
    "ours_torch": _ours_torch,
    "ours_graph": _ours_graph,
    "ours_jax": _ours_jax,
    "reference_torch": _reference_torch,
    "reference_jax": _reference_jax,
    "mlstm_kernels": _mlstm_kernels,
    "fla": _fla,
    "sdpa": _sdpa,
}


def missing_modules(modules: Sequence[str]) -> list[str]:
    """Those of the modules that are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def build(x: Implementation, shape: Shape, dtype: Dtype, pass_: str, device: str) -> Runner:
    """The runner of an implementation. Raises NotAvailable with the reason where there is none."""
    missing = missing_modules(x.modules)
    if missing:
        raise NotAvailable(f"not installed: {', '.join(missing)}")
    if device not in x.devices:
        raise NotAvailable("needs a GPU")
    return BUILD[x.kind](x, shape, dtype, pass_)
