"""Device functions that the kernels share: masked tiles, hi/lo pairs, decays and the matrix product."""

import triton
import triton.language as tl

# True while Triton's interpreter runs the kernels; fixed when this module is imported, as Triton itself does.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))


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
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300  # the interpreter truncates: round before it does
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
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
def load_tile(x, o_row, row_stride, n_rows, o_col, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """x[o_row, o_col] as [rows, BLOCK]; zeros outside (n_rows, COLS)."""
    p_x = x + o_row[:, None].to(tl.int64) * row_stride + o_col[None, :]
    m_x = (o_row < n_rows)[:, None]
    if COLS % BLOCK != 0:
        m_x = m_x & (o_col < COLS)[None, :]
    return tl.load(p_x, mask=m_x, other=0.0)


@triton.jit
def load_tile_t(x, o_row, row_stride, n_rows, o_col, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """The transpose of `load_tile`: [BLOCK, rows]."""
    p_x = x + o_row[None, :].to(tl.int64) * row_stride + o_col[:, None]
    m_x = (o_row < n_rows)[None, :]
    if COLS % BLOCK != 0:
        m_x = m_x & (o_col < COLS)[:, None]
    return tl.load(p_x, mask=m_x, other=0.0)


@triton.jit
def store_tile(x, value, o_row, row_stride, n_rows, o_col, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """x[o_row, o_col] = value inside (n_rows, COLS), rounded once to x's dtype."""
    p_x = x + o_row[:, None].to(tl.int64) * row_stride + o_col[None, :]
    m_x = (o_row < n_rows)[:, None]
    if COLS % BLOCK != 0:
        m_x = m_x & (o_col < COLS)[None, :]
    tl.store(p_x, cast(value, x.dtype.element_ty), mask=m_x)


@triton.jit
def load_vector(x, o, N: tl.constexpr, BLOCK: tl.constexpr):
    """x[o], zeros from N on."""
    if N % BLOCK != 0:
        b_x = tl.load(x + o, mask=o < N, other=0.0)
    else:
        b_x = tl.load(x + o)
    return b_x


@triton.jit
def store_vector(x, value, o, N: tl.constexpr, BLOCK: tl.constexpr):
    """x[o] = value below N."""
    if N % BLOCK != 0:
        tl.store(x + o, value, mask=o < N)
    else:
        tl.store(x + o, value)


@triton.jit
def store_pair(x, o, plane, value):
    """A float64 value as the sum of two float32: hi at x[o], lo at x[o + plane]."""
    hi = value.to(tl.float32)
    lo = (value - hi.to(tl.float64)).to(tl.float32)
    lo = tl.where(value == hi.to(tl.float64), 0.0, lo)  # also for infinities, whose difference is nan
    tl.store(x + o, hi)
    tl.store(x + o + plane, lo)


@triton.jit
def exp2_difference(x_hi, x_lo, y_hi, y_lo):
    """2 ** (x - y) of two pairs; differences of long prefix sums keep all their digits this way."""
    return tl.exp2((x_hi - y_hi) + (x_lo - y_lo))


@triton.jit
def contiguous_head(head, T, H: tl.constexpr, D: tl.constexpr, BTHD: tl.constexpr):
    """Offset of head's first row and its row stride in a contiguous (B, H, T, D) or (B, T, H, D) tensor."""
    if BTHD:
        offset = ((head // H) * T * H + head % H) * D
        stride = H * D
    else:
        offset = head * T * D
        stride = D
    return offset, stride
