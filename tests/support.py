"""One description of a call, one runner per frontend, the float64 truth, and the one place with error limits.

Arrays are NumPy's. Results are named h, c_last, n_last, m_last, and dX for the gradient of input X.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

import frontend_jax
import frontend_torch
from kernels_triton import reference

INPUTS = ("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial")
LAST = ("c_last", "n_last", "m_last")
OUTPUTS = ("h", *LAST)
# Half of the last place of 1: the largest relative error of one rounding.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-12}
# About 30 times the error of a well conditioned float32 result.
FLOOR = 3e-6
OPERATORS: dict[str, Callable[..., Any]] = {
    "torch": frontend_torch.mlstm_chunkwise,
    "jax": frontend_jax.mlstm_chunkwise,
}
MODULES = {"torch": frontend_torch, "jax": frontend_jax}
FRAMEWORKS = tuple(OPERATORS)
Results = dict[str, np.ndarray]
# Makes another function with the operator's arrays as keywords out of the operator.
Via = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs, cotangents by output (absent: none given) and options of one call."""

    arrays: Mapping[str, np.ndarray]
    cotangents: Mapping[str, np.ndarray]
    options: Mapping[str, Any]

    @property
    def bthd(self) -> bool:
        return self.options.get("layout") == "bthd"

    def but(self, **options: Any) -> "Case":
        return dataclasses.replace(self, options={**self.options, **options})

    def replacing(self, **arrays: np.ndarray) -> "Case":
        """With other inputs, or other cotangents (dh, dc_last, ...)."""
        inputs = {name: arrays.get(name, x) for name, x in self.arrays.items()}
        cotangents = {name: arrays.get(f"d{name}", x) for name, x in self.cotangents.items()}
        return dataclasses.replace(self, arrays=inputs, cotangents=cotangents)


def make_case(
    B=1,
    H=2,
    T=37,
    K=16,
    V=24,
    *,
    seed=0,
    N=None,
    dtype="float32",
    i_dtype="float32",
    f_dtype="float32",
    i_mean=0.0,
    f_mean=3.0,
    states=True,
    cotangents: Iterable[str] = OUTPUTS,
    **options: Any,
) -> Case:
    """A random call; return_last_states unless no state has a cotangent."""
    rng = np.random.default_rng(seed)
    bthd = options.get("layout") == "bthd"

    def draw(shape: tuple[int, ...], dtype: str, mean: float = 0.0, token: bool = True) -> np.ndarray:
        x = (rng.standard_normal(shape) + mean).astype(dtype)
        return np.ascontiguousarray(x.swapaxes(1, 2)) if bthd and token else x

    head, tokens = (B, H), (B, H, T)
    arrays = {"q": draw((*tokens, K), dtype), "k": draw((*tokens, K), dtype), "v": draw((*tokens, V), dtype)}
    arrays |= {"i": draw(tokens, i_dtype, i_mean), "f": draw(tokens, f_dtype, f_mean)}
    head = (N or B, H)  # N: packed sequences
    state_shapes = ((*head, K, V), (*head, K), head)
    if states:
        arrays |= {n: draw(s, "float32", token=False) for n, s in zip(INPUTS[5:], state_shapes, strict=True)}
    given = {"h": draw((*tokens, V), dtype)}
    given |= {name: draw(shape, "float32", token=False) for name, shape in zip(LAST, state_shapes, strict=True)}
    given = {name: x for name, x in given.items() if name in set(cotangents)}
    return Case(arrays, given, {"return_last_states": bool(given.keys() - {"h"}), **options})


@functools.cache
def vectors() -> dict[str, tuple[Case, dict[str, Results]]]:
    """The stored vectors: each case, and its float64 results by normalizer_grad."""
    found = {}
    for file in sorted((Path(__file__).parent / "vectors").glob("*.npz")):
        with np.load(file) as data:
            arrays = {name: data[name] for name in INPUTS if name in data}
            cotangents = {name: data[f"d_{name}"].astype(np.float32) for name in OUTPUTS if f"d_{name}" in data}
            case = Case(arrays, cotangents, {"eps": float(data["eps"]), "return_last_states": True})
            outputs = {name: data[name] for name in OUTPUTS}
            modes = {
                mode: outputs | {f"d{name}": data[f"{mode}_grad_{name}"] for name in arrays}
                for mode in ("exact", "detached")
            }
            found[file.stem] = case, modes
    return found


def to_torch(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def from_torch(x: torch.Tensor) -> np.ndarray:
    x = x.detach().contiguous()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def named(outputs: Any) -> dict[str, Any]:
    """The operator's outputs by name."""
    return dict(zip(OUTPUTS, (outputs[0], *outputs[1]), strict=True)) if isinstance(outputs, tuple) else {"h": outputs}


def torch_results(function: Callable[..., Any], arrays: Mapping[str, Any], cotangents: Mapping[str, Any]) -> Results:
    """Outputs and gradients of torch tensors; a gradient that does not exist is zero."""
    leaves = {name: x.detach().requires_grad_() for name, x in arrays.items()}
    outputs = named(function(**leaves))
    # The sigmoid gate's m_last is a constant 0, which by the reference depends on nothing.
    picked = {name: outputs[name] for name in cotangents if outputs[name].requires_grad}
    gradients = torch.autograd.grad(
        list(picked.values()), leaves.values(), [cotangents[name] for name in picked], allow_unused=True
    )
    results = {name: from_torch(x) for name, x in outputs.items()}
    for (name, x), gradient in zip(leaves.items(), gradients, strict=True):
        results[f"d{name}"] = from_torch(torch.zeros_like(x) if gradient is None else gradient)
    return results


def jax_results(function: Callable[..., Any], arrays: Mapping[str, Any], cotangents: Mapping[str, Any]) -> Results:
    """Outputs and gradients of JAX arrays; a cotangent that is not given is zero."""
    outputs, pullback = jax.vjp(lambda x: named(function(**x)), dict(arrays))
    (gradients,) = pullback({name: cotangents.get(name, jnp.zeros_like(x)) for name, x in outputs.items()})
    return {name: np.asarray(x) for name, x in (outputs | {f"d{n}": x for n, x in gradients.items()}).items()}


def run(framework: str, case: Case, backend: str, via: Via | None = None, operator: str = "mlstm_chunkwise") -> Results:
    """Outputs and gradients of a case."""
    function = functools.partial(getattr(MODULES[framework], operator), backend=backend, **case.options)
    function = via(function) if via else function
    if framework == "torch":
        arrays, cotangents = ({n: to_torch(x) for n, x in group.items()} for group in (case.arrays, case.cotangents))
        return torch_results(function, arrays, cotangents)
    wide = any(x.dtype == np.float64 for x in case.arrays.values())
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        arrays, cotangents = ({n: jnp.asarray(x) for n, x in group.items()} for group in (case.arrays, case.cotangents))
        return jax_results(function, arrays, cotangents)


def readable(framework: str, case: Case, form: str, dtype: str) -> Results:
    """Outputs and gradients of the readable reference, computed in a dtype by a framework's autodiff."""
    is_torch = framework == "torch"
    xp: Any = torch if is_torch else jnp
    options, K = case.options, case.arrays["q"].shape[-1]
    scale = options.get("qk_scale")

    def function(q: Any, k: Any, v: Any, i: Any, f: Any, c_initial=None, n_initial=None, m_initial=None) -> Any:
        if case.bthd:
            q, k, v, i, f = (xp.swapaxes(x, 1, 2) for x in (q, k, v, i, f))
        B, H, _, V = v.shape
        zeros = functools.partial(xp.zeros, dtype=q.dtype)
        states = (
            (c_initial, n_initial, m_initial)
            if c_initial is not None
            else map(zeros, ((B, H, K, V), (B, H, K), (B, H)))
        )
        c, n, m = states
        h, last = getattr(reference, form)(
            *(q, k, v, i, f, c, n, m.reshape(B, H)),
            scale=K**-0.5 if scale is None else scale,
            eps=options.get("eps", 1e-6),
            normalizer_grad=options.get("normalizer_grad", "exact"),
            input_gate=options.get("input_gate", "exponential"),
            normalize=options.get("normalize", True),
            stop_gradient=torch.Tensor.detach if is_torch else jax.lax.stop_gradient,
            **({"chunk_size": 16} if form == "chunkwise" else {}),
            **({"scan": jax.lax.scan} if form == "chunkwise" and not is_torch else {}),
        )
        h = xp.swapaxes(h, 1, 2) if case.bthd else h
        return (h, last) if options.get("return_last_states") else h

    with contextlib.nullcontext() if is_torch else jax.enable_x64(dtype == "float64"):
        convert = torch.from_numpy if is_torch else jnp.asarray
        arrays, cotangents = (
            {n: convert(x.astype(dtype)) for n, x in group.items()} for group in (case.arrays, case.cotangents)
        )
        return (torch_results if is_torch else jax_results)(function, arrays, cotangents)


def truth(case: Case) -> Results:
    """Float64 results of the recurrence, token by token."""
    return readable("torch", case, "recurrent", "float64")


def error(x: np.ndarray, true: np.ndarray) -> float:
    """The larger of the relative errors in the root mean square and at the worst element; NaN counts as infinite."""
    difference = np.abs(x.astype(np.float64) - true)
    if not np.all(np.isfinite(difference)):
        return np.inf
    smallest = float(ml_dtypes.finfo(x.dtype).smallest_normal)  # below it even one rounding is not relative
    rms = np.linalg.norm(difference) / (np.linalg.norm(true) + smallest * true.size**0.5)
    return float(max(rms, difference.max(initial=0.0) / (np.abs(true).max(initial=0.0) + smallest)))


def limits(case: Case, true: Results) -> dict[str, float]:
    """The error that each result may have: a multiple of what the dtype costs an honest computation, plus a floor.

    float32: 30 times the error of the float32 recurrence. Else: 4 times what it costs to round the inputs once more.
    """
    dtypes = {name: x.dtype.name for name, x in case.arrays.items()}
    if dtypes["q"] == "float32":
        factor, rough = 30, readable("torch", case, "recurrent", "float32")
    else:
        rng = np.random.default_rng(1)

        def rounded(x: np.ndarray) -> np.ndarray:
            return x.astype(np.float64) * (1 + ROUNDING[x.dtype.name] * rng.uniform(-1, 1, x.shape))

        noisy = {name: rounded(case.arrays[name]) for name in ("q", "k", "v")}
        noisy |= {f"d{name}": rounded(x) for name, x in case.cotangents.items() if name == "h"}
        factor, rough = 4, truth(case.replacing(**noisy))
    own = {"h": dtypes["v"]} | {f"d{name}": dtype for name, dtype in dtypes.items()}  # states are float32
    return {
        # Operands are rounded to the inputs' dtype, whatever a result's own dtype.
        name: factor * error(rough[name], x)
        + FLOOR
        + 4 * max(ROUNDING[own.get(name, "float32")], ROUNDING[dtypes["q"]])
        for name, x in true.items()
    }


def check(got: Results, case: Case, true: Results | None = None, like: Case | None = None) -> None:
    """Every result is within its limit of the truth. `like`: a case with the same results, to compute both from."""
    true = truth(like or case) if true is None else true
    allowed = limits(like or case, true)
    assert got.keys() == true.keys()
    errors = {name: error(got[name], x) for name, x in true.items()}
    assert {name: (e, allowed[name]) for name, e in errors.items() if not e <= allowed[name]} == {}


def same_bits(x: Results, y: Results) -> None:
    """Two sets of results agree in names, dtypes, shapes and every bit."""
    assert x.keys() == y.keys()
    assert {n: (x[n].dtype, x[n].shape) for n in x} == {n: (y[n].dtype, y[n].shape) for n in y}
    assert [n for n in x if x[n].tobytes() != y[n].tobytes()] == []
