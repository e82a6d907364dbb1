"""Runs a case through PyTorch, JAX and the float64 truth, and measures how far apart the results are.

Results are dicts of NumPy arrays in their own dtypes, tokens after heads whatever the layout: h, c_last, n_last, m_last
(where returned) and dq, dk, dv, di, df, dc_initial, dn_initial, dm_initial (where there is such an input).

Tolerance on a relative Frobenius error against float64: FACTOR times the larger of two errors on the same case, plus
FLOOR, a few units in the last place of float32 for sums in another order. The two errors are
- that of the "reference" backend: plain float32 operations, results rounded to their dtypes;
- that of the float64 truth itself, results rounded likewise, once its operands carry a rounding to the dtype of the
  products: what a matrix unit costs, since a kernel rounds one factor of a product once more than the reference does.
  A random relative error of a rounding's size stands for it (on exponents one of float32's); the root mean square of
  ROUNDINGS draws counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels_triton import reference
from kernels_triton.problem import NORMALIZER_GRADS

from .cases import DEFAULTS, INITIAL, LAST, Arrays, Case

Function = Callable[..., Any]

FACTOR = 4.0
FLOOR = 10 * 2.0**-24
ROUNDINGS = 8
SMALLEST_NORMAL = 2.0**-126  # of float32
ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-11, "float32": 2.0**-24}
ROUNDING_RMS = 0.42  # root mean square of a rounding's relative error, in units of the above
# Operands that are not exact in a product. With half-precision inputs q.k is exact, and so its share of the normaliser;
# products of float32 are not.
# Exponents never go through a matrix unit, but exp takes them in float32: at -60, a closed gate, that costs 2e-6.
ROUNDED_HALF = ("v", "c_initial", "d_h", "d_c_last")
ROUNDED_FLOAT32 = ("q", "k", *ROUNDED_HALF, "n_initial", "d_n_last")
EXPONENTS = ("i", "f", "m_initial")
RECURRENT_UP_TO = 32  # tokens; longer sequences take the chunkwise reference


@dataclass(frozen=True)
class Row:
    """One tensor of one case."""

    case: str
    tensor: str
    dtype: str
    errors: Mapping[str, float]  # relative Frobenius error by column: of each framework, or against each gradient mode
    tolerance: float
    identical: bool | None = None  # torch and JAX to the bit; None: there are not both
    ulp: int | None = None  # largest distance of torch and JAX in units in the last place of the tensor's dtype
    difference: float | None = None  # largest |torch - jax| / max(|torch|, |jax|)

    @property
    def ok(self) -> bool:
        # Where the columns are gradient modes, agreeing with one of them is enough.
        judge = any if set(self.errors) <= set(NORMALIZER_GRADS) else all
        return self.identical is not False and judge(self.within(column) for column in self.errors)

    def within(self, column: str) -> bool:
        return self.errors[column] <= self.tolerance


def identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same shape, dtype and bits (a NaN equals itself, 0 and -0 differ)."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def max_ulp(a: np.ndarray, b: np.ndarray) -> int:
    """The largest distance in units in the last place of the arrays' dtype; the widest possible where one is NaN."""
    if a.size == 0:
        return 0
    bits = np.dtype(f"i{a.dtype.itemsize}")
    lowest, widest = int(np.iinfo(bits).min), 2 ** (8 * a.dtype.itemsize)

    def ordered(x: np.ndarray) -> np.ndarray:
        """Integers in the order of the floats, as Python integers where 64 bits would overflow."""
        n = np.ascontiguousarray(x).view(bits).astype(object if bits.itemsize == 8 else np.int64)
        return np.where(n < 0, lowest - n, n)

    distance = np.abs(ordered(a) - ordered(b))
    one_nan = np.isnan(a) != np.isnan(b)
    distance = np.where(np.isnan(a) & np.isnan(b), 0, np.where(one_nan, widest, distance))
    return int(distance.max())


def max_relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest |a - b| / max(|a|, |b|); 0 where equal or both NaN, infinite where only one is finite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        relative = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(np.max(np.where(same, 0.0, np.where(np.isfinite(relative), relative, np.inf)), initial=0.0))


def frobenius_error(x: np.ndarray, truth: np.ndarray) -> float:
    """|x - truth| / |truth|, infinite where x is not finite.

    Below float32's smallest normal |truth| counts as that: what underflows, or is 0, has no digits to agree in.
    """
    if x.shape != truth.shape:
        raise ValueError(f"x: expected the shape of the truth, {truth.shape}, got {x.shape}")
    error = float(np.linalg.norm(x.astype(np.float64) - truth)) / max(float(np.linalg.norm(truth)), SMALLEST_NORMAL)
    return error if np.isfinite(error) else np.inf


def to_torch(x: np.ndarray, device: str = "cpu") -> Tensor:
    """A tensor with the array's bits; torch takes no NumPy bfloat16."""
    x = np.array(x)  # torch wants writable memory
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(x).to(device)


def from_torch(x: Tensor) -> np.ndarray:
    """The array with a tensor's bits."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def _swap(x: np.ndarray, case: Case) -> np.ndarray:
    """Between the layout of the case and tokens after heads."""
    return np.ascontiguousarray(x.swapaxes(1, 2)) if case.layout == "bthd" else x


def _per_token(name: str) -> bool:
    return "_" not in name.removeprefix("d_")


def _view(x: Tensor, layout: str) -> Tensor:
    """The same values as a view, as models make them: transposed heads, or a slice of a fused projection."""
    if layout == "bhtd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return torch.cat([x, torch.full_like(x[..., :8], torch.nan)], dim=-1)[..., : x.shape[-1]]


def _named(result: Any, case: Case) -> dict[str, Any]:
    """What an operator returns, by name."""
    if not case.last:
        return {"h": result[0] if isinstance(result, tuple) else result}
    h, states = result
    named = dict(zip(LAST, states, strict=True))
    return {"h": h, **named, "m_last": named["m_last"].reshape(named["c_last"].shape[:2])}


def _results(outputs: Arrays, gradients: Arrays, case: Case) -> Arrays:
    results = {**outputs, **{f"d{name}": x for name, x in gradients.items()}}
    return {n: _swap(x, case) if _per_token(n.removeprefix("d")) else x for n, x in results.items()}


def run_torch(function: Function, options: Mapping[str, Any], case: Case, arrays: Arrays, device: str) -> Arrays:
    """Outputs and gradients of a PyTorch operator; without gradients where it is not differentiable."""
    tensors = {n: to_torch(_swap(x, case) if _per_token(n) else x, device) for n, x in arrays.items()}
    if case.strided:
        tensors |= {name: _view(tensors[name], case.layout) for name in ("q", "k", "v")}
    inputs = {name: tensors[name].requires_grad_(case.gradients) for name in case.inputs}
    if case.lengths:
        offsets = torch.tensor(case.offsets, device=device)
        options = {**options, "cu_seqlens": offsets}
        if case.table:
            make = importlib.import_module("frontend_torch").make_chunk_table
            options["chunk_table"] = make(offsets, case.T, case.chunk_size, backend=options["backend"])
    outputs = _named(function(**inputs, **options), case)
    driven = [name for name in case.driven if outputs[name].requires_grad]
    # What depends on no input, such as the sigmoid gate's last stabiliser, leaves gradients of 0.
    gradients = {name: torch.zeros_like(x) for name, x in inputs.items()} if case.gradients else {}
    if driven:
        cotangents = [tensors[f"d_{name}"].to(outputs[name].dtype) for name in driven]
        found = torch.autograd.grad([outputs[n] for n in driven], list(inputs.values()), cotangents, allow_unused=True)
        for (name, x), gradient in zip(inputs.items(), found, strict=True):
            gradients[name] = torch.zeros_like(x) if gradient is None else gradient
    return _results(
        {n: from_torch(x) for n, x in outputs.items()}, {n: from_torch(x) for n, x in gradients.items()}, case
    )


@functools.lru_cache(maxsize=16)
def _jax_program(
    function: Function, options: tuple[tuple[str, Any], ...], last: bool, table: bool, driven: tuple[str, ...]
) -> Function:
    """The outputs and gradients of a JAX operator, compiled; kept, so that calls of one shape are traced once.

    driven: the outputs that have a cotangent; without any there are no gradients.
    """
    import jax

    def both(inputs: dict[str, Any], cotangents: dict[str, Any], packing: dict[str, Any]) -> Any:
        if table:
            make = importlib.import_module("frontend_jax").make_chunk_table
            given = dict(options)
            size = (packing["cu_seqlens"], inputs["q"].shape[1], given["chunk_size"])
            packing = {**packing, "chunk_table": make(*size, backend=given["backend"])}
        case = Case("", last=last)

        def call(x: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            outputs = _named(function(**x, **packing, **dict(options)), case)
            return {name: outputs[name] for name in driven}, outputs

        if not driven:
            return call(inputs)[1], {}
        ends, pull, outputs = jax.vjp(call, inputs, has_aux=True)
        return outputs, pull({name: cotangents[name].astype(x.dtype) for name, x in ends.items()})[0]

    return jax.jit(both)


def run_jax(function: Function, options: Mapping[str, Any], case: Case, arrays: Arrays, device: str) -> Arrays:
    """Outputs and gradients of a JAX operator, under jax.jit."""
    import jax
    import jax.numpy as jnp

    wide = any(x.dtype == np.float64 for x in arrays.values())
    place = jax.devices("cpu" if device == "cpu" else "gpu")[0]
    with jax.default_device(place), jax.enable_x64(True) if wide else contextlib.nullcontext():
        placed = {n: jax.device_put(_swap(x, case) if _per_token(n) else x, place) for n, x in arrays.items()}
        inputs = {name: placed[name] for name in case.inputs}
        packing = {"cu_seqlens": jnp.asarray(case.offsets, jnp.int32)} if case.lengths else {}
        settings = (case.last, bool(case.lengths) and case.table, case.driven)
        program = _jax_program(function, tuple(options.items()), *settings)
        outputs, gradients = program(inputs, {name: placed[f"d_{name}"] for name in case.driven}, packing)
        host = [{name: np.asarray(x) for name, x in part.items()} for part in (outputs, gradients)]
        return _results(host[0], host[1], case)


RUN = {"torch": run_torch, "jax": run_jax}


@functools.cache
def frontend(framework: str, form: str = "chunkwise") -> Function:
    """The public operator of a framework; a step as an operator over sequences of one token."""
    module = importlib.import_module(f"frontend_{framework}")
    operator: Function = getattr(module, f"mlstm_{form}")
    if form != "step":
        return operator

    def step(
        q: Any, k: Any, v: Any, i: Any, f: Any, c_initial: Any, n_initial: Any, m_initial: Any, **options: Any
    ) -> Any:
        h, last = operator(*(x[:, :, 0] for x in (q, k, v, i, f)), c_initial, n_initial, m_initial, **options)
        return h[:, :, None], last

    return step


def truth(
    case: Case,
    arrays: Arrays,
    device: str = "cpu",
    normalizer_grad: str | None = None,
    chunk_size: int | None = None,
    held: bool = False,
) -> Arrays:
    """Outputs and gradients in float64, from the inputs as they are in the case's dtypes.

    chunk_size: tokens per chunk; None: short sequences token by token, longer ones in chunks of 64. held: as of
    `reference.chunkwise`, with a chunk size.
    """
    if case.lengths:
        return _truth_of_each(case, arrays, device, normalizer_grad, chunk_size, held)
    states = {name: np.zeros(case.shape(name)) for name in INITIAL} | {n: x for n, x in arrays.items() if n in INITIAL}
    wide = {n: to_torch(x.astype(np.float64), device) for n, x in {**arrays, **states}.items()}
    names = ("q", "k", "v", "i", "f", *INITIAL)
    inputs = [wide[name].requires_grad_(case.gradients) for name in names]
    run: Function = reference.recurrent
    options: dict[str, Any] = {}
    if chunk_size or case.T > RECURRENT_UP_TO:
        run, options = reference.chunkwise, {"chunk_size": chunk_size or 64, "held": held}
    h, last = run(
        *inputs,
        scale=case.K**-0.5 if case.qk_scale is None else case.qk_scale,
        eps=case.eps,
        normalizer_grad=normalizer_grad or case.normalizer_grad,
        stop_gradient=Tensor.detach,
        input_gate=case.input_gate,
        normalize=case.normalize,
        **options,
    )
    outputs = dict(zip(("h", *LAST), (h, *last), strict=True))
    results = {n: from_torch(outputs[n]) for n in case.outputs}
    if not case.gradients:
        return results
    loss = sum((outputs[name] * wide[f"d_{name}"]).sum() for name in case.driven)
    # The sigmoid gate's last stabiliser is a constant.
    constant = not (isinstance(loss, Tensor) and loss.requires_grad)
    found = [None] * len(inputs) if constant else torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(names, inputs, found, strict=True)}
    return results | {f"d{n}": from_torch(gradients[n]) for n in case.inputs}


def _truth_of_each(
    case: Case, arrays: Arrays, device: str, normalizer_grad: str | None, chunk_size: int | None, held: bool
) -> Arrays:
    """Packed sequences one by one. An empty one is a token that adds nothing and forgets nothing, then left out."""
    N, found = len(case.lengths), []
    for s, (start, stop) in enumerate(itertools.pairwise(case.offsets)):
        alone = dataclasses.replace(case, lengths=(), T=max(stop - start, 1))
        own = {n: x[:, :, start:stop] if _per_token(n) else x[s::N] for n, x in arrays.items()}
        if stop == start:
            own |= {n: np.zeros((*x.shape[:2], 1, *x.shape[3:])) for n, x in own.items() if _per_token(n)}
            own |= {"i": own["i"] - 1e30, "f": own["f"] + 1e30}
        results = truth(alone, own, device, normalizer_grad, chunk_size, held)
        found.append({n: x[:, :, : stop - start] if _per_token(n.removeprefix("d")) else x for n, x in results.items()})
    joined = {}
    for name, x in found[0].items():
        parts = [results[name] for results in found]
        if _per_token(name.removeprefix("d")):
            joined[name] = np.concatenate(parts, axis=2)
        else:
            joined[name] = np.stack(parts, axis=1).reshape(-1, *x.shape[1:])
    return joined


def _with_roundings(case: Case, arrays: Arrays, device: str) -> list[Arrays]:
    """The truth of ROUNDINGS copies of the inputs, whose operands carry random relative errors of a rounding's size."""
    rng = np.random.default_rng(0)
    half = case.dtype != "float32"
    products = ROUNDOFF["tf32" if not half and case.precision == "tf32" else case.dtype]
    sizes = dict.fromkeys(ROUNDED_HALF if half else ROUNDED_FLOAT32, products)
    sizes |= dict.fromkeys(EXPONENTS, ROUNDOFF["float32"])
    copies: Arrays = {}
    for name, x in arrays.items():
        wide = np.concatenate([x.astype(np.float64)] * ROUNDINGS)
        wide *= 1 + ROUNDING_RMS * sizes.get(name, 0.0) * rng.standard_normal(wide.shape)
        copies[name] = wide
    # As one batch where a token takes a step of its own; one by one where they are long, for the memory that takes.
    parts = 1 if case.T <= RECURRENT_UP_TO else ROUNDINGS
    batches = {name: np.split(x, parts) for name, x in copies.items()}
    batch = dataclasses.replace(case, B=case.B * ROUNDINGS // parts)
    found = [truth(batch, {name: x[n] for name, x in batches.items()}, device) for n in range(parts)]
    each = ROUNDINGS // parts
    return [{name: np.split(x, each)[n] for name, x in results.items()} for results in found for n in range(each)]


def tolerances(case: Case, arrays: Arrays, exact: Arrays, device: str) -> dict[str, float]:
    """The tolerance on every tensor's error, as the module's docstring defines it."""
    plain = run_torch(frontend("torch", case.form), case.options() | {"backend": "reference"}, case, arrays, device)
    rounded = _with_roundings(case, arrays, device)
    found = {}
    for name, x in exact.items():
        draws = [results[name].astype(plain[name].dtype) for results in rounded]
        once_more = float(np.sqrt(np.mean([frobenius_error(y, x) ** 2 for y in draws])))
        found[name] = FACTOR * max(frobenius_error(plain[name], x), once_more) + FLOOR
    return found


def compare(case: Case, results: Mapping[str, Arrays], exact: Arrays, tolerance: Mapping[str, float]) -> list[Row]:
    """Rows of a case: every framework's results against the truth, and of two frameworks against each other."""
    rows = []
    for name, x in exact.items():
        each = {framework: result[name] for framework, result in results.items()}
        errors = {framework: frobenius_error(y, x) for framework, y in each.items()}
        first, *others = each.values()
        pair = (
            (identical(first, others[0]), max_ulp(first, others[0]), max_relative(first, others[0])) if others else ()
        )
        rows.append(Row(case.name, name, first.dtype.name, errors, tolerance[name], *pair))
    return rows


def accepted_options(function: Function, case: Case) -> tuple[dict[str, Any], list[str]]:
    """The case's options that a function names in its signature, and what the case needs but it does not name.

    A chunk size is never needed: results do not depend on it but for rounding.
    """
    names = inspect.signature(function).parameters
    options = {name: x for name, x in case.options().items() if name in names}
    if options.get("chunk_size", 0) is None:
        del options["chunk_size"]  # None means "the best" here, and perhaps nothing there
    optional = (*options, "chunk_size")
    missing = [f"{name}={x!r}" for name, x in case.options().items() if name not in optional and x != DEFAULTS[name]]
    if case.initial and not set(INITIAL) <= set(names):
        missing.append("initial states")
    return options, missing
