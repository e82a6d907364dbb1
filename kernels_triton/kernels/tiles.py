"""Device functions that read and write masked tiles: of tokens, of states, of vectors."""

import triton
import triton.language as tl

from .common import DESCRIPTORS, GIVEN, cast


@triton.jit
def token_view(x, sb, sh, st, head, t, T, H: tl.constexpr, UNIT: tl.constexpr, SOURCE: tl.constexpr):
    """One head's rows from token t on, for `load_tokens`. Strides are in units of UNIT elements.

    Rows are counted from t, so that 32 bits hold their offsets (the host checks the token stride).
    """
    if SOURCE == DESCRIPTORS:
        view = (x, (head // H).to(tl.int32), (head % H).to(tl.int32), t)
    else:
        view = (x + ((head // H) * sb + (head % H) * sh + t.to(tl.int64) * st) * UNIT, st * UNIT, T - t)
    return view


@triton.jit
def load_tokens(view, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr):
    """A [ROWS, BLOCK] tile of rows of COLS elements; zeros beyond COLS.

    Rows from T on are finite, either zeros or the last row again: they must be weighed by 0.
    """
    if SOURCE == DESCRIPTORS:
        b_x = view[0].load([view[1], view[2], view[3] + row, col]).reshape([ROWS, BLOCK])
    elif SOURCE == GIVEN:
        b_x = view[0]
    else:
        o_row = tl.minimum(row + tl.arange(0, ROWS), view[2] - 1) * view[1]
        o_col = col + tl.arange(0, BLOCK)
        p_x = view[0] + (o_row[:, None] + o_col[None, :])
        if COLS % BLOCK != 0:
            b_x = tl.load(p_x, mask=(o_col < COLS)[None, :], other=0.0)
        else:
            b_x = tl.load(p_x)
    return b_x


@triton.jit
def store_tokens(x, value, row, row_stride, length, col, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """x[row, col] = value inside (length, COLS), rounded once to x's dtype.

    Results are not read again soon: they leave the L2 cache first.
    """
    o_row = row + tl.arange(0, ROWS)
    o_col = col + tl.arange(0, BLOCK)
    p_x = x + ((o_row * row_stride)[:, None] + o_col[None, :])
    m_x = (o_row < length)[:, None]
    if COLS % BLOCK != 0:
        m_x = m_x & (o_col < COLS)[None, :]
    tl.store(p_x, cast(value, x.dtype.element_ty), mask=m_x, eviction_policy="evict_first")


@triton.jit
def state_view(x, chunk, K: tl.constexpr, V: tl.constexpr, SOURCE: tl.constexpr):
    """The state of one head and chunk, for `load_state` and `store_state`."""
    if SOURCE == DESCRIPTORS:
        view = (x, chunk.to(tl.int32))
    else:
        view = (x + chunk * K * V,)
    return view


@triton.jit
def load_state(
    view,
    k0,
    v0,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """A [BK, BV] tile of a contiguous (K, V) state; zeros outside."""
    if SOURCE == DESCRIPTORS:
        b_x = view[0].load([view[1], k0, v0]).reshape([BK, BV])
    elif SOURCE == GIVEN:
        b_x = view[0]
    else:
        o_k = k0 + tl.arange(0, BK)
        o_v = v0 + tl.arange(0, BV)
        p_x = view[0] + (o_k[:, None] * V + o_v[None, :])
        if K % BK == 0 and V % BV == 0:
            b_x = tl.load(p_x)
        else:
            b_x = tl.load(p_x, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
    return b_x


@triton.jit
def store_state(
    view,
    value,
    k0,
    v0,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """A [BK, BV] tile of a contiguous (K, V) state, rounded once to its dtype."""
    if SOURCE == DESCRIPTORS:
        view[0].store([view[1], k0, v0], cast(value, view[0].dtype).reshape([1, BK, BV]))
    else:
        o_k = k0 + tl.arange(0, BK)
        o_v = v0 + tl.arange(0, BV)
        p_x = view[0] + (o_k[:, None] * V + o_v[None, :])
        value = cast(value, view[0].dtype.element_ty)
        m_x = (o_k < K)[:, None] & (o_v < V)[None, :]
        if K % BK == 0 and V % BV == 0:
            tl.store(p_x, value)
        else:
            tl.store(p_x, value, mask=m_x)


@triton.jit
def load_vector(x, o, N: tl.constexpr, BLOCK: tl.constexpr):
    """x[o], zeros from N on."""
    if N % BLOCK != 0:
        b_x = tl.load(x + o, mask=o < N, other=0.0)
    else:
        b_x = tl.load(x + o)
    return b_x


@triton.jit
def vector(x, o):
    """x itself where it is a vector already, else what it points to at o."""
    if x.dtype.is_ptr():
        y = tl.load(x + o)
    else:
        y = x
    return y


@triton.jit
def load_norm(x, o_k, K: tl.constexpr, BK: tl.constexpr, SOURCE: tl.constexpr):
    """n or its cotangent: x itself where it is a tile, else loaded from x."""
    if SOURCE == GIVEN:
        b_x = x
    else:
        b_x = load_vector(x, o_k, K, BK)
    return b_x


@triton.jit
def store_vector(x, value, o, N: tl.constexpr, BLOCK: tl.constexpr):
    """x[o] = value below N."""
    if N % BLOCK != 0:
        tl.store(x + o, value, mask=o < N)
    else:
        tl.store(x + o, value)


@triton.jit
def contiguous_rows(head, t, T, H: tl.constexpr, D: tl.constexpr, BTHD: tl.constexpr):
    """Offset of head's row t and the row stride in a contiguous (B, H, T, D) or (B, T, H, D) tensor."""
    if BTHD:
        offset = (((head // H) * T + t) * H + head % H) * D
        stride = H * D
    else:
        offset = (head * T + t) * D
        stride = D
    return offset, stride
