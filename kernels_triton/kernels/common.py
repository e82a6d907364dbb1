"""Device functions that the kernels share: the matrix product and its operands, hi/lo pairs, decays."""

import triton
import triton.language as tl

# True while Triton's interpreter runs the kernels; fixed when this module is imported, as Triton itself does.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
# How tokens and states are read: from memory, from memory through tensor descriptors, or a tile that is there already.
POINTERS = tl.constexpr(0)
DESCRIPTORS = tl.constexpr(1)
GIVEN = tl.constexpr(2)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32; operands in one dtype."""
    if INTERPRETED:  # NumPy has no bfloat16 product; the upcast is exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # A sum of its own, then added: a third of the rounding of one long chain, at no cost. Through fma, since the
        # compiler would fold a plain addition back into the chain.
        y = tl.fma(tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32), 1.0, acc)
    else:
        y = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)
    return y


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x in another float dtype, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter truncates: round before it does
        bits = tl.where(x == x, x.to(tl.float32), 0.0).to(
            tl.uint32, bitcast=True
        )  # a NaN's may be the largest there are
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.uint32).to(tl.float32, bitcast=True), x.to(tl.float32))
    return x.to(DTYPE)


@triton.jit
def operand(x, BF16: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of a product with a weighted factor: bfloat16 for bfloat16 inputs, else float32.

    float16 inputs go through float32 (tf32) products: gate weights and states exceed float16's range.
    """
    if BF16:
        y = cast(x, tl.bfloat16)
    else:
        y = x.to(tl.float32)
        if PRECISION == "tf32":  # matrix units cut off the 13 bits that tf32 lacks: round to nearest even first
            bits = y.to(tl.uint32, bitcast=True)
            rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
            y = tl.where(y == y, rounded.to(tl.uint32).to(tl.float32, bitcast=True), y)
    return y


@triton.jit
def zeros_tuple(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """COUNT accumulators."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, COLS], tl.float32),)
    return tiles


@triton.jit
def inner_product(x, y, SIZE: tl.constexpr):
    """sum x y. Through a vector: Triton 3.6 fails for sm_100 where it reduces a product's accumulator axis by axis."""
    return tl.sum(tl.reshape(x * y, [SIZE]), 0)


@triton.jit
def add_products(b_x, b_c, b_dc, BF16: tl.constexpr, PRECISION: tl.constexpr):
    """b_x + C^T dC, whose trace is <C, dC>: registers do not read the tiles then, and they are fetched ahead."""
    return dot(tl.trans(operand(b_c, BF16, PRECISION)), operand(b_dc, BF16, PRECISION), b_x, PRECISION)


@triton.jit
def trace(b_x, N: tl.constexpr):
    """The sum of an [N, N] accumulator's diagonal."""
    o = tl.arange(0, N)
    return tl.sum(tl.reshape(tl.where(o[:, None] == o[None, :], b_x, 0.0), [N * N]), 0)


@triton.jit
def row_products(x, y, N: tl.constexpr, PRECISION: tl.constexpr):
    """x_i . y_i of the N rows of two tiles, as a product's diagonal: see `add_products`."""
    b_x = dot(x, tl.trans(y), tl.zeros([N, N], tl.float32), PRECISION)
    o = tl.arange(0, N)
    return tl.sum(tl.where(o[:, None] == o[None, :], b_x, 0.0), 1)


@triton.jit
def _leading(x):
    """A float32 cut off after the digits that bfloat16 has."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def times_vector(x, y, PRECISION: tl.constexpr):
    """x y of a tile and a float32 vector, as exact as in float32.

    In bfloat16 by matrix units, which takes a fraction of the instructions: y is the sum of three bfloat16 columns.
    """
    if x.dtype == tl.bfloat16:
        o = tl.arange(0, 8)[None, :]  # the fewest columns a product may have
        first = _leading(y)
        second = _leading(y - first)
        rest = (y - first) - second
        b_y = tl.where(o == 0, first[:, None], tl.where(o == 1, second[:, None], rest[:, None]))
        columns = tl.where(o < 3, b_y, 0.0).to(tl.bfloat16)
        z = tl.sum(dot(x, columns, tl.zeros([x.shape[0], 8], tl.float32), PRECISION), 1)
    else:
        z = tl.sum(x.to(tl.float32) * y[None, :], 1)
    return z


@triton.jit
def as_accumulator(x, PRECISION: tl.constexpr):
    """x in the layout of a product's accumulator, which fixes the order of a sum over it however tiles are read.

    A product of zeros, added to x, says so; there is no other way to say it.
    """
    left, right = tl.zeros([x.shape[0], 16], tl.bfloat16), tl.zeros([16, x.shape[1]], tl.bfloat16)
    return dot(left, right, x.to(tl.float32), PRECISION)


@triton.jit
def loaded_inner_product(x, y, SIZE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr):
    """`inner_product` of an x that was loaded: in bfloat16 its layout depends on how states are read and stored."""
    if BF16:
        x = as_accumulator(x, PRECISION)
    return inner_product(x, y, SIZE)


@triton.jit
def rows_times_accumulator(x, accumulator, PRECISION: tl.constexpr, SOURCE: tl.constexpr):
    """sum_k x_k accumulator_k of each row, in one order however x was read: that of the accumulator's layout.

    From pointers the compiler would move the accumulator to the layout of x instead. Other dtypes than bfloat16 are
    always read by pointers.
    """
    y = x.to(tl.float32)
    if SOURCE == POINTERS and x.dtype == tl.bfloat16:
        y = as_accumulator(x, PRECISION)
    return tl.sum(y * accumulator, 1)


@triton.jit
def store_pair(x, x_low, o, value, mask):
    """A float64 value as the sum of two float32, x[o] and x_low[o]."""
    hi = value.to(tl.float32)
    lo = (value - hi.to(tl.float64)).to(tl.float32)
    lo = tl.where(value == hi.to(tl.float64), 0.0, lo)  # also for infinities, whose difference is nan
    tl.store(x + o, hi, mask=mask)
    tl.store(x_low + o, lo, mask=mask)


@triton.jit
def exp2_difference(x_hi, x_lo, y_hi, y_lo, PAIRS: tl.constexpr):
    """2 ** (x - y) of two pairs; differences of long prefix sums keep all their digits this way.

    Without PAIRS of the leading parts alone: half the registers, and enough for half-precision gradients.
    """
    if PAIRS:
        y = tl.exp2((x_hi - y_hi) + (x_lo - y_lo))
    else:
        y = tl.exp2(x_hi - y_hi)
    return y


@triton.jit
def load_pair(x, x_low, o, PAIRS: tl.constexpr):
    """The two parts of pairs that `store_pair` wrote; without PAIRS there is no second one, nor any need of it."""
    hi = tl.load(x + o)
    lo = hi
    if PAIRS:
        lo = tl.load(x_low + o)
    return hi, lo


@triton.jit
def load_row_decays(p_a, p_a_low, p_e, o, PAIRS: tl.constexpr):
    """Of rows o: the pair whose decays they take, and what is left of 1 / d as a factor.

    Without PAIRS d is in the exponent. There it would cost as many digits as its logarithm has.
    """
    if PAIRS:
        hi, lo = load_pair(p_a, p_a_low, o, True)
        factor = tl.load(p_e + o)
    else:
        hi = tl.load(p_e + o)
        lo = hi
        factor = tl.full(hi.shape, 1.0, tl.float32)
    return hi, lo, factor


@triton.jit
def state_weight(hi, lo, factor, p_gamma, p_gamma_low, SCALE: tl.constexpr, PAIRS: tl.constexpr):
    """scale beta / d of rows, from their `load_row_decays`: C's weight in h, and dh's in the state's cotangent."""
    g_hi, g_lo = load_pair(p_gamma, p_gamma_low, 0, PAIRS)
    return factor * SCALE * exp2_difference(g_hi, g_lo, hi, lo, PAIRS)
