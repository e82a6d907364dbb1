"""How far from float64 a result of a random call may be.

Errors are relative Frobenius errors, |x - truth| / |truth|. The tolerance on one tensor is

    max(FACTOR * max(reference, spread * chance(n)) + FLOOR, least)

- `spread`: what rounding costs at best. DRAWS times the float64 truth is computed with roundings where a kernel has
  them, at random (`Rounding`): the operands of each matrix product, forward and backward, are rounded to the digits
  that matrix units take. Of two factors one of which has no more digits (q, k, v, dh), either may carry the weight that
  the other one has here, and where their product is small by chance (q . n near 0, say) it matters which: half of the
  draws round the one, half the other, and the larger `spread * chance(n)` of the two halves counts. h, which the
  gradient of the normaliser is made of, is rounded too; states, exponents and cotangents get a relative error of a
  rounding's size first, as in `tools.compare`; results are rounded to their own dtype.
  `spread` is the root mean square error of those draws.
  In float32 by tf32, matrix units cut operands off instead of rounding them: up to twice the error, and all one way.
  Whatever cancels in a sum cancels in the draws too, and leaves the noise of the terms that were summed; to that end
  stabilisers are held constant between chunks, as in the kernels.
- Gradients of gates and of the initial stabiliser are differences of large sums: of what di sums up in a chunk, of
  <dC, C> at both ends. Their `spread` is at least float32's rounding of one such sum (`_cancelled`).
- `chance(n)`: an error of n independent parts may by chance be larger than its root mean square, much so if n is small:
  the square root of the quantile of chi-squared with n degrees of freedom, divided by n, that 3 in 100,000 exceed (4.2
  for one number, 2 for ten, 1.1 for a thousand). n is the smaller of two estimates from the draws: how few elements
  hold their squared errors, and how much their errors vary from draw to draw.
- `reference`: the error of the plain float32 backend, which has the same chance in it and is not multiplied by it.
- FACTOR: kernels round a little more often than the draws do; twice that for float32, whose errors come from sums in
  an order that draws do not know. FLOOR: for the same reason.
- `least`: for gradients of half-precision calls one rounding to that precision: their exponents are single float32
  numbers.

The token-by-token forms use no matrix units: their outputs are held to roundings of float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import compare
from .cases import Arrays
from .fuzz_call import Call, case_of, work

DRAWS = 32
FACTOR, FACTOR_FLOAT32 = 1.75, 3.5
FLOOR = compare.FLOOR
QUANTILE = 4.0  # in standard deviations of a normal distribution
DIGITS = {"bfloat16": 8, "float16": 11, "tf32": 11, "float32": 24}  # of a product's operand, the leading one included
ELEMENTS = 2**24  # of the draws that are computed side by side, as `fuzz_call.work` counts
PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
QUOTIENT = torch.ops.aten.div.Tensor


class Rounding(TorchDispatchMode):
    """While it lasts, operands of matrix products are rounded at random to so many digits; backward, h too."""

    def __init__(
        self, digits: int, generator: torch.Generator, cuts_off: bool = False, copies: int = 1, start: int = 0
    ):
        """copies: draws side by side, of every batch of matrices equal parts; start: the number of the first one."""
        super().__init__()
        self.digits, self.generator, self.cuts_off = digits, generator, cuts_off
        self.copies, self.start = copies, start
        self.numerators: set[int] = set()  # addresses of what h was divided from; autograd keeps their memory

    def digits_of(self, x: torch.Tensor, cut_off: bool) -> torch.Tensor:
        """x in so many digits, rounded to nearest or cut off."""
        mantissa, exponent = torch.frexp(x)
        whole = mantissa * 2.0**self.digits
        return torch.ldexp(torch.trunc(whole) if cut_off else torch.round(whole), exponent - self.digits)

    def is_exact(self, x: torch.Tensor) -> bool:
        return bool((~torch.isfinite(x) | (self.digits_of(x, True) == x)).all())

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """On a grid that is shifted by chance, each matrix's by its own."""
        shape = (*x.shape[:-2], 1, 1)
        shift = 2.0 ** torch.rand(shape, dtype=x.dtype, device=x.device, generator=self.generator)
        return torch.where(torch.isfinite(x), self.digits_of(x * shift, self.cuts_off) / shift, x)

    def operands(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a product, as the module's docstring has it."""
        exact = self.is_exact(x), self.is_exact(y)
        if all(exact):
            return x, y
        if not any(exact):
            return self.rounded(x), self.rounded(y)
        matrices = x.shape[0] if x.ndim == 3 else 1
        copy = torch.arange(matrices, device=x.device) * self.copies // matrices
        first = ((self.start + copy) % 2 == 0).view(-1, *[1] * (x.ndim - 1))
        first = first if x.ndim == 3 else first[0]
        return torch.where(first, self.rounded(x), x), torch.where(first, y, self.rounded(y))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = self.operands(*args)
        result = func(*args, **(kwargs or {}))
        if func is QUOTIENT and result.ndim == 4:
            address = args[0].data_ptr()
            if torch.is_grad_enabled():  # forward
                self.numerators.add(address)
            elif address in self.numerators:
                return self.rounded(result)
        return result


def chance(n: float) -> float:
    """How many times its root mean square an error of n independent parts hardly ever exceeds."""
    w = 2 / (9 * n)  # by Wilson and Hilferty
    return math.sqrt((1 - w + QUANTILE * math.sqrt(w)) ** 3)


def parts(errors: np.ndarray) -> float:
    """How many independent parts errors have. errors: (draws, ...), of one tensor."""
    most = np.abs(errors).max(initial=0.0)
    if not 0 < most < math.inf:
        return 1.0
    squares = (errors.reshape(len(errors), -1) / most) ** 2
    of_draws, of_elements = squares.sum(1), squares.mean(0)
    few = float(of_elements.sum() ** 2 / (of_elements**2).sum())
    vary = float(of_draws.var(ddof=1))
    return max(1.0, min(few, 2 * float(of_draws.mean()) ** 2 / vary if vary else math.inf))


def within_range(x: np.ndarray, truth: np.ndarray, dtype: Any) -> np.ndarray:
    """x with the truth where that is beyond a dtype's range, and x is too, or at its end: float16 ends at 65504."""
    largest = float(ml_dtypes.finfo(dtype).max)
    beyond = (np.abs(truth) > 0.98 * largest) & (np.abs(x.astype(np.float64)) > 0.9 * largest)
    beyond &= np.sign(truth) == np.sign(x.astype(np.float64))
    return np.where(beyond, truth, x.astype(np.float64))


def _draws(call: Call, arrays: Arrays, device: str, products: str) -> Arrays:
    """The results of DRAWS roundings, one after the other along the first axis."""
    rng = np.random.default_rng(0)
    generator = torch.Generator(device).manual_seed(0)
    operands = ("c_initial", "d_c_last", *(("n_initial", "d_n_last") if call.dtype == "float32" else ()))
    sizes = dict.fromkeys(operands, compare.ROUNDOFF[products])
    sizes |= dict.fromkeys(compare.EXPONENTS, compare.ROUNDOFF["float32"])
    at_once = int(min(DRAWS, max(1, ELEMENTS // work(call))))
    at_once = 2 ** int(math.log2(at_once))
    found: dict[str, list[np.ndarray]] = {}
    batch = case_of(call, B=call.B * at_once)
    chunk = min(call.chunk_size or 64, 128)
    for start in range(0, DRAWS, at_once):
        copies: Arrays = {}
        for name, x in arrays.items():
            wide = np.concatenate([x.astype(np.float64)] * at_once)
            if name in sizes:
                wide *= 1 + compare.ROUNDING_RMS * sizes[name] * rng.standard_normal(wide.shape)
            copies[name] = wide
        rounding = Rounding(DIGITS[products], generator, products == "tf32", at_once, start)
        with rounding, torch.autograd.set_multithreading_enabled(False):
            results = compare.truth(batch, copies, device, chunk_size=chunk, held=True)
        for name, x in results.items():
            found.setdefault(name, []).append(x)
    return {name: np.concatenate(x) for name, x in found.items()}


def _cancelled(call: Call, arrays: Arrays, truth: Arrays) -> dict[str, float]:
    """The norms of float32's rounding in gradients that are differences of large sums."""

    def squares(x: np.ndarray | None, y: np.ndarray | None) -> np.ndarray | float:
        """The squared rounding of <x, y>, by head."""
        if x is None or y is None:
            return 0.0
        products = x.astype(np.float64) * y
        found = np.sum(products.reshape(*x.shape[:2], -1) ** 2, axis=-1)
        return found.sum(axis=0, keepdims=True) if call.lengths else found

    last = squares(arrays.get("d_c_last"), truth.get("c_last")) + squares(arrays.get("d_n_last"), truth.get("n_last"))
    first = squares(truth.get("dc_initial"), arrays.get("c_initial"))
    first = first + squares(truth.get("dn_initial"), arrays.get("n_initial"))
    weights = 1 / (1 + np.exp(np.minimum(arrays["f"].astype(np.float64), 700.0)))  # df = weights * dlogf
    of_tokens = np.sum(truth["di"] ** 2, axis=-1) + first + last
    found = {
        "df": np.sum(np.sum(weights**2, axis=-1) * of_tokens),
        "di": np.sum(last),
        "dm_initial": np.sum(first + last),
    }
    return {name: compare.ROUNDOFF["float32"] * float(np.sqrt(x)) for name, x in found.items()}


def tolerances(call: Call, arrays: Arrays, truth: Arrays, device: str = "cpu") -> dict[str, float]:
    """The tolerance on every tensor's error, as the module's docstring defines it."""
    function = compare.frontend("torch", call.form)
    plain = compare.run_torch(function, call.options() | {"backend": "reference"}, call, arrays, device)
    products = "tf32" if (call.dtype, call.precision) == ("float32", "tf32") else call.dtype
    drawn = _draws(call, arrays, device, products)
    if call.form != "chunkwise" and products != "float32":
        outputs = dataclasses.replace(call, gradients=False, cotangents=(), plant="", split=0)
        exact = _draws(outputs, arrays, device, "float32")
        drawn |= exact
    cancelled = _cancelled(call, arrays, truth) if call.gradients else {}
    found = {}
    for name, x in truth.items():
        own = plain[name].dtype
        with np.errstate(over="ignore"):
            draws = drawn[name].reshape(DRAWS, *x.shape).astype(own)
        errors = within_range(draws, x, own) - x
        norm = max(float(np.linalg.norm(x)), compare.SMALLEST_NORMAL)
        least_spread = cancelled.get(name, 0.0) / norm
        reference = compare.frobenius_error(within_range(plain[name], x, own), x)
        most = reference if math.isfinite(reference) else 0.0
        for part in (errors[::2], errors[1::2]):
            spread = max(float(np.linalg.norm(part)) / math.sqrt(len(part)) / norm, least_spread)
            most = max(most, spread * chance(parts(part)))
        half = name.startswith("d") and call.dtype != "float32"
        least = compare.ROUNDING_RMS * compare.ROUNDOFF[call.dtype] if half else 0.0
        factor = FACTOR_FLOAT32 if products == "float32" else FACTOR
        found[name] = max(factor * most + FLOOR, least)
    return found
