"""The gates' kernels forward: all that depends on i and f alone, before any matrix product."""

import triton
import triton.language as tl

from .common import LOG2E, NEG_INF, load_pair, store_pair
from .gates_sums import chunk_sums, load_float64, log_input, then
from .packing import chunk_count, sequence_span

# The largest jump of a stabiliser, in natural-log units, that stays as it is. Weights of 2**-256 are 0 in float32, and
# times 1 / d, which eps = 0 lets reach 2**127, still far below any digit of the row's own weight.
MAX_JUMP = tl.constexpr(256 * 0.6931471805599453)
# A larger jump comes from where nothing has a weight, where there are no digits to keep.
FROM_NOTHING = tl.constexpr(1e9)
# The stabiliser of rows that nothing has a weight in, as a finite number: minus infinity less itself would be NaN.
NO_WEIGHT = tl.constexpr(-1e30)


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def _previous(x, first, G: tl.constexpr):
    """x shifted by one: element n - 1 at n, `first` at 0."""
    o = tl.arange(0, G)
    y = tl.max(tl.where(o[None, :] == o[:, None] - 1, x[None, :], NEG_INF), 1)
    return tl.where(o == 0, first, y)


@triton.jit
def _advance(carry, pick, n, total, largest, token, G: tl.constexpr):
    """The stabilisers before and after each of G chunks n, the one after them all, and the token that gave it."""
    totals, best = tl.associative_scan((total, largest + total), 0, then)
    after = tl.maximum(carry + totals, best)
    begin = _previous(after, carry, G)
    last = tl.max(tl.where(largest > begin, n, -1), 0)
    pick = tl.where(last >= 0, tl.max(tl.where(n == last, token, -1), 0), pick)
    return begin, after, tl.max(tl.where(tl.arange(0, G) == G - 1, after, NEG_INF), 0), pick


@triton.jit
def _largest_and_before(largest_x, before_x, largest_y, before_y):
    """Of two stretches of tokens, one after the other: the maximum, and that of all tokens but the last."""
    return tl.maximum(largest_x, largest_y), tl.maximum(largest_x, before_y)


@triton.jit
def _excess(x, begin):
    """How far rows' stabilisers a have jumped beyond MAX_JUMP at a time, summed over the chunk's rows so far.

    x: tokens' candidates, whose maximum so far, `begin` included, is a; or a itself. What a token from before such a
    jump adds to a row behind it is 0 in float32 either way. Without the excess a and c stay small, so that a forget
    gate that closes does not cost the tokens of its chunk their digits.
    """
    largest, before = tl.associative_scan((x, tl.full(x.shape, NEG_INF, tl.float64)), 1, _largest_and_before)
    before = tl.maximum(before, begin[:, None])
    jump = tl.maximum(largest, begin[:, None]) - before
    jump = tl.where(jump < FROM_NOTHING, jump - MAX_JUMP, 0.0)
    return tl.cumsum(tl.maximum(jump, 0.0), 1)


@triton.jit
def _as_float32(x):
    """float64 rounded to float32's digits; unchanged beyond its range."""
    y = x.to(tl.float32).to(tl.float64)
    return tl.where(tl.abs(y) < float("inf"), y, x)


@triton.jit
def _float64(pair):
    return pair[0].to(tl.float64) + pair[1].to(tl.float64)


@triton.jit(
    do_not_specialize_on_alignment=[
        "i_sb", "i_sh", "i_st", "f_sb", "f_sh", "f_st", "sequences", "T",
    ],
)  # fmt: skip
def gates_forward(
    i, i_sb, i_sh, i_st,  # (B, H, T) input gate pre-activations
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations, or their log-sigmoid
    m_initial,  # (B, H) if HAS_INITIAL
    m_token,  # (B, H, T) stabilisers to use if M_GIVEN, else computed
    m_chunk_given,  # (B, H, NT + 1) likewise, at chunk boundaries
    sums,  # (B, H, 2, NT * L) if SPLIT
    totals,  # (B, H, 4, NT) if SPLIT
    tokens,  # (B, H, NT) if SPLIT
    groups,  # (B, H, 4, NT / G) if SPLIT
    chunks,  # of packed sequences: see packing.py
    sequences,  # likewise: how many; else 0
    T,
    c,  # (B, H, NT * L) i - b in log2 units, b the prefix sum of log f inside the chunk; less a_L
    c_low,  # (B, H, NT * L) what c lacks: a pair holds twice the digits
    a,  # (B, H, NT * L) m - b, likewise
    a_low,  # (B, H, NT * L)
    gamma,  # (B, H, NT) log2 of what the state at the chunk's start adds to the one at its end
    gamma_low,  # (B, H, NT)
    floor,  # (B, H, NT * L) exp(-m)
    m,  # (B, H, T) stabiliser per token
    m_chunk,  # (B, H, NT + 1) stabiliser of the state at each chunk's start, and of the last state
    m_last,  # (B, H)
    picked,  # (B, H) int32: token whose input gate is the last stabiliser's maximum; -1: the initial stabiliser
    H: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_I: tl.constexpr,
    F_IS_LOG: tl.constexpr,
    M_GIVEN: tl.constexpr,
    ROUNDED: tl.constexpr,
    SPLIT: tl.constexpr,
    SIGMOID: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One program per head (and packed sequence), G chunks at a time; if SPLIT, one per G chunks, after `gates_sums`.

    What token j adds to row i, D_ij = 2**(c_j - a_i), and to the state at the chunk's end, alpha_j = 2**c_j; what the
    state at the chunk's start adds to row i, beta_i = 2**(gamma - a_i), and to the one at the end, 2**gamma. a_L, the
    chunk's largest a, is subtracted from c, a and gamma: its stabiliser at the end, less b. ROUNDED: the states at all
    chunks' ends are handed on, not only the last one.
    """
    n_chunks = chunk_count(T, sequences, L, PACKED)
    padded = n_chunks.to(tl.int64) * L
    pid = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, G)
    o_t = tl.arange(0, L)[None, :]
    if SPLIT:
        n_groups = tl.cdiv(n_chunks, G)
        head = pid // n_groups
        state = head
        first = (pid % n_groups).to(tl.int32) * G
        stop = tl.minimum(first + G, n_chunks)
        begin_n = 0
        t_first = 0
        t_end = T
    else:
        state = pid
        head = pid % H if PACKED else pid
        begin_n, stop, t_first, t_end = sequence_span(chunks, pid // H, n_chunks, T, L, PACKED)
        first = begin_n
    chunk_row = head * (n_chunks + 1)
    p_totals = totals + head * 4 * n_chunks

    if HAS_INITIAL:
        carry = tl.load(m_initial + state).to(tl.float64)
    else:
        carry = tl.full([], 0.0, tl.float64)
    if M_GIVEN:
        carry = tl.load(m_chunk_given + chunk_row).to(tl.float64)
    pick = tl.full([], -1, tl.int32)
    if not PACKED and first == 0:
        tl.store(m_chunk + chunk_row, carry.to(tl.float32))
    if SPLIT and not SIGMOID:
        p_groups = groups + head * 4 * n_groups
        pick_group = tl.full([], -1, tl.int32)  # the last group in which a token exceeds what was there
        pick_carry = carry
        for group in tl.range(0, first // G, loop_unroll_factor=4):
            moved = carry + load_float64(p_groups, group, n_groups)
            best = load_float64(p_groups + 2 * n_groups, group, n_groups)
            pick_group = tl.where(best > moved, group, pick_group)
            pick_carry = tl.where(best > moved, carry, pick_carry)
            carry = tl.maximum(moved, best)
        if stop == n_chunks and pick_group >= 0:
            n = pick_group * G + o_n
            total = _float64(load_pair(p_totals, p_totals + n_chunks, n, True))
            largest = _float64(load_pair(p_totals + 2 * n_chunks, p_totals + 3 * n_chunks, n, True))
            token = tl.load(tokens + head * n_chunks + n)
            _, _, _, pick = _advance(pick_carry, pick, n, total, largest, token, G)

    for n0 in range(first, stop, G):
        n = n0 + o_n
        m_n = n < (stop if PACKED else n_chunks)
        row = n[:, None] * L + o_t
        t = t_first + (n[:, None] - begin_n) * L + o_t
        m_t = t < t_end
        if SPLIT:
            m_sum = m_n[:, None] & (o_t < L)
            o_sum = tl.where(m_sum, row, 0)
            p_sums = sums + head * 2 * padded
            b_sum = _float64(load_pair(p_sums, p_sums + padded, o_sum, True))
            b_c = log_input(i, i_sb, i_sh, i_st, head, t, m_t, H, SIGMOID) - b_sum
            o_total = tl.minimum(n, n_chunks - 1)
            total = _float64(load_pair(p_totals, p_totals + n_chunks, o_total, True))
            total = tl.where(m_n, total, 0.0)
            largest = _float64(load_pair(p_totals + 2 * n_chunks, p_totals + 3 * n_chunks, o_total, True))
            largest = tl.where(m_n, largest, NEG_INF)
            token = tl.load(tokens + head * n_chunks + o_total)
        else:
            b_sum, b_c, total, largest, token = chunk_sums(
                i, i_sb, i_sh, i_st, f, f_sb, f_sh, f_st, head, t, m_t, H, L, HAS_I, F_IS_LOG, SIGMOID
            )
        if SIGMOID:  # the gates need no stabiliser: it is 0 but for that of the initial state
            begin = tl.where(n == begin_n, carry, 0.0)
            after = tl.zeros([G], tl.float64)
            b_a = -b_sum
            end = -total
            b_m = tl.zeros([G, L], tl.float64)
        else:
            begin, after, carry, pick = _advance(carry, pick, n, total, largest, token, G)
        if M_GIVEN:
            begin = tl.load(m_chunk_given + chunk_row + n, mask=m_n, other=0.0).to(tl.float64)
            after = tl.load(m_chunk_given + chunk_row + n + 1, mask=m_n, other=0.0).to(tl.float64)
            end = after - total
            b_m = tl.load(m_token + head * T + t, mask=m_t, other=0.0).to(tl.float64)
            b_a = tl.where(m_t, b_m - b_sum, end[:, None])
        elif not SIGMOID:
            b_a = tl.maximum(tl.associative_scan(b_c, 1, _maximum), begin[:, None])
            end = tl.maximum(largest, begin)
            b_m = b_a + b_sum
            # A state that is handed on belongs to its stabiliser as float32 holds it, not to the exact one.
            last = n == (stop if PACKED else n_chunks) - 1
            if ROUNDED:
                begin = _as_float32(begin)
                last = n >= 0
            rounded = _as_float32(after)
            end = tl.where(last & (end > NEG_INF), rounded - total, end)
            after = tl.where(last, rounded, after)

        if tl.max(tl.where(m_n, end - begin, 0.0), 0) > MAX_JUMP:  # few sequences have a jump at all
            excess = _excess(b_a if SIGMOID or M_GIVEN else b_c, begin)
            b_a -= excess
            b_c -= excess
            end -= tl.max(excess, 1)
        m_row = m_n[:, None] & (o_t < L)
        o_row = head * padded + row
        origin = tl.where(end > NEG_INF, end, 0.0)
        store_pair(c, c_low, o_row, (b_c - origin[:, None]) * LOG2E, m_row)
        b_a = tl.where(b_a > NEG_INF, b_a, NO_WEIGHT)
        store_pair(a, a_low, o_row, (b_a - origin[:, None]) * LOG2E, m_row)
        store_pair(gamma, gamma_low, head * n_chunks + n, (begin - origin) * LOG2E, m_n)
        tl.store(floor + o_row, tl.exp(-b_m).to(tl.float32), mask=m_row)
        tl.store(m + head * T + t, b_m.to(tl.float32), mask=m_t)
        if not PACKED:
            tl.store(m_chunk + chunk_row + n + 1, after.to(tl.float32), mask=m_n)

    if PACKED or stop == n_chunks:
        if SIGMOID:
            carry = tl.full([], 0.0, tl.float64)
        tl.store(m_last + state, carry.to(tl.float32))
        tl.store(picked + state, pick)
