"""The gradient of one or more tiles of values."""

import triton
import triton.language as tl

from .common import dot, exp2_difference, load_pair, load_row_decays, operand, zeros_tuple
from .tiles import load_state, load_tokens, store_tokens


@triton.jit
def _add_scores(
    scores, q, k, k0,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    ROW: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    SPAN: tl.constexpr,
    SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK keys' part of k.q, keys on the rows, of each tile of keys against each of its tiles of queries; k's too."""
    keys = ()
    for x in tl.static_range(SPAN):
        keys = keys + (load_tokens(k, ROW + x * BT, k0, BT, K, BK, SOURCE),)
    queries = ()
    for y in tl.static_range(COUNT):
        queries = queries + (load_tokens(q, (FIRST + y) * BS, k0, BS, K, BK, SOURCE),)
    updated = ()
    for x in tl.static_range(SPAN):
        for y in tl.static_range(x, COUNT):
            updated = updated + (dot(keys[x], tl.trans(queries[y]), scores[len(updated)], PRECISION),)
    return updated, keys


@triton.jit
def _times_state(values, keys, b_dc, BF16: tl.constexpr, PRECISION: tl.constexpr):
    """values + k dC of each tile of keys."""
    updated = ()
    for x in tl.static_range(len(keys)):
        b_k = operand(keys[x], BF16, PRECISION)
        updated = updated + (dot(b_k, operand(b_dc, BF16, PRECISION), values[x], PRECISION),)
    return updated


@triton.jit
def values_backward(
    q, k, dh, p_c, p_c_low, p_a, p_a_low, p_e, dstate,
    p_dv, dv_row, length, share,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    L: tl.constexpr,
    BS: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    SCALE: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    STATES: tl.constexpr,
    BF16: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of SPAN tiles of the chunk from TILE on, against their rows from there on, of a part of V.

    share: which of as many parts of V as K has tiles. Several tiles read dh and the state's cotangent once, and take
    BS = BT. Scores are computed transposed, keys on the rows, so that no product's result is ever transposed.
    """
    NKT: tl.constexpr = (K + BK - 1) // BK
    SHARE: tl.constexpr = (V + BV * NKT - 1) // (BV * NKT) * BV
    FIRST: tl.constexpr = TILE * BT // BS  # tiles of rows before this one lie wholly in the past
    COUNT: tl.constexpr = L // BS - FIRST
    ROW: tl.constexpr = TILE * BT

    pairs = ()
    scores = ()
    for x in tl.static_range(SPAN):
        pairs = pairs + (load_pair(p_c, p_c_low, ROW + x * BT + tl.arange(0, BT), PAIRS),)
        scores = scores + zeros_tuple(COUNT - x, BT, BS)
    if NKT == 1:
        scores, keys = _add_scores(scores, q, k, 0, K, BT, BK, BS, ROW, FIRST, COUNT, SPAN, SOURCE, PRECISION)
    else:
        for k0 in range(0, K, BK):
            scores, _ = _add_scores(scores, q, k, k0, K, BT, BK, BS, ROW, FIRST, COUNT, SPAN, SOURCE, PRECISION)
    alphas = ()
    weighted = ()
    for x in tl.static_range(SPAN):
        t_k = ROW + x * BT + tl.arange(0, BT)
        c_hi, c_lo = pairs[x]
        alphas = alphas + (exp2_difference(c_hi, c_lo, 0.0, 0.0, PAIRS),)
        for y in tl.static_range(x, COUNT):
            t_q = (FIRST + y) * BS + tl.arange(0, BS)
            a_hi, a_lo, b_scale = load_row_decays(p_a, p_a_low, p_e, t_q, PAIRS)
            b_d = exp2_difference(c_hi[:, None], c_lo[:, None], a_hi[None, :], a_lo[None, :], PAIRS)
            b_s = scores[len(weighted)] * (b_scale * SCALE)[None, :] * b_d
            if (FIRST + y) * BS < ROW + x * BT + BT:
                b_s = tl.where(t_q[None, :] >= t_k[:, None], b_s, 0.0)
            weighted = weighted + (operand(b_s, BF16, PRECISION),)

    for v0 in range(share * SHARE, tl.minimum(share * SHARE + SHARE, V), BV):
        values = zeros_tuple(SPAN, BT, BV)
        if NKT == 1:
            b_dc = load_state(dstate, 0, v0, K, V, BK, BV, STATES)
            values = _times_state(values, keys, b_dc, BF16, PRECISION)
        else:
            for k0 in range(0, K, BK):
                keys = ()
                for x in tl.static_range(SPAN):
                    keys = keys + (load_tokens(k, ROW + x * BT, k0, BT, K, BK, SOURCE),)
                b_dc = load_state(dstate, k0, v0, K, V, BK, BV, STATES)
                values = _times_state(values, keys, b_dc, BF16, PRECISION)
        updated = ()
        for x in tl.static_range(SPAN):
            updated = updated + (values[x] * alphas[x][:, None],)
        values = updated
        for y in tl.static_range(COUNT):
            b_dh = operand(load_tokens(dh, (FIRST + y) * BS, v0, BS, V, BV, SOURCE), BF16, PRECISION)
            updated = ()
            for x in tl.static_range(SPAN):
                b_dv = values[x]
                if y >= x:  # before tile x there are COUNT, COUNT - 1, ... weights
                    b_dv = dot(weighted[x * COUNT - x * (x + 1) // 2 + y], b_dh, b_dv, PRECISION)
                updated = updated + (b_dv,)
            values = updated
        for x in tl.static_range(SPAN):
            store_tokens(p_dv, values[x], ROW + x * BT, dv_row, length, v0, BT, V, BV)
