"""The gates' kernels: all that depends on i and f alone, before any matrix product, and their gradients after all."""

import triton
import triton.language as tl

from .common import LOG2E, NEG_INF, cast, store_pair

# A closed forget gate below this cannot be told from -inf in any state; finite, so that prefix sums stay finite.
LOG_FORGET_MIN = tl.constexpr(-1e6)
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def _then(total_x, best_x, total_y, best_y):
    """Two stretches of tokens, one after the other: what they add to a stabiliser, and the least they leave."""
    return total_x + total_y, tl.maximum(best_x + total_y, best_y)


@triton.jit
def _previous(x, first, G: tl.constexpr):
    """x shifted by one: element n - 1 at n, `first` at 0."""
    o = tl.arange(0, G)
    y = tl.max(tl.where(o[None, :] == o[:, None] - 1, x[None, :], NEG_INF), 1)
    return tl.where(o == 0, first, y)


@triton.jit
def _log_forget(x, IS_LOG: tl.constexpr):
    """log(sigmoid(x)) in float64, stable on both sides; x itself where it is that logarithm already."""
    if IS_LOG:
        y = x
    else:
        y = tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    y = tl.where(x != x, x, y)
    return tl.where(y < LOG_FORGET_MIN, LOG_FORGET_MIN, y)


@triton.jit(
    do_not_specialize_on_alignment=["i_sb", "i_sh", "i_st", "f_sb", "f_sh", "f_st", "T"],
)
def gates_forward(
    i, i_sb, i_sh, i_st,  # (B, H, T) input gate pre-activations
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations, or their log-sigmoid
    m_initial,  # (B, H) if HAS_INITIAL
    m_token,  # (B, H, T) stabilisers to use if M_GIVEN, else computed
    m_chunk_given,  # (B, H, NT + 1) likewise, at chunk boundaries
    T,
    c,  # (B, H, 2, NT * L) pair: i - b in log2 units, b the prefix sum of log f inside the chunk; less a_L
    a,  # (B, H, 2, NT * L) pair: m - b, likewise
    alpha,  # (B, H, NT * L) what a token adds to the state at the chunk's end
    beta,  # (B, H, NT * L) what the state at the chunk's start adds to a token
    gamma,  # (B, H, NT) what that state adds to the one at the chunk's end
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
):  # fmt: skip
    """One program per head, G chunks at a time.

    D_ij = 2**(c_j - a_i), alpha_j = 2**(c_j - a_L), beta_i = 2**(M - a_i), gamma = 2**(M - a_L), M the stabiliser of
    the state at the chunk's start. a_L, the chunk's largest a, is subtracted from all.
    """
    head = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, G)
    o_t = tl.arange(0, L)[None, :]
    n_chunks = tl.cdiv(T, L)
    padded = n_chunks.to(tl.int64) * L
    p_i = i + (head // H) * i_sb + (head % H) * i_sh
    p_f = f + (head // H) * f_sb + (head % H) * f_sh
    chunk_row = head * (n_chunks + 1)

    if HAS_INITIAL:
        carry = tl.load(m_initial + head).to(tl.float64)
    else:
        carry = tl.full([], 0.0, tl.float64)
    if M_GIVEN:
        carry = tl.load(m_chunk_given + chunk_row).to(tl.float64)
    pick = tl.full([], -1, tl.int32)
    tl.store(m_chunk + chunk_row, carry.to(tl.float32))

    for n0 in range(0, n_chunks, G):
        n = n0 + o_n
        m_n = n < n_chunks
        t = n[:, None] * L + o_t
        m_t = t < T
        if HAS_I:
            b_i = tl.load(p_i + t.to(tl.int64) * i_st, mask=m_t, other=NEG_INF).to(tl.float64)
        else:
            b_i = tl.where(m_t, 0.0, NEG_INF).to(tl.float64)
        b_f = tl.load(p_f + t.to(tl.int64) * f_st, mask=m_t, other=0.0).to(tl.float64)
        b_logf = tl.where(m_t, _log_forget(b_f, F_IS_LOG), 0.0)  # beyond T: remembers all, adds nothing
        b_sum = tl.cumsum(b_logf, 1)
        total = tl.sum(tl.where(o_t == L - 1, b_sum, 0.0), 1)
        b_c = b_i - b_sum
        largest = tl.max(b_c, 1)
        if M_GIVEN:
            begin = tl.load(m_chunk_given + chunk_row + n, mask=m_n, other=0.0).to(tl.float64)
            end = tl.load(m_chunk_given + chunk_row + n + 1, mask=m_n, other=0.0).to(tl.float64) - total
            b_m = tl.load(m_token + head * T + t, mask=m_t, other=0.0).to(tl.float64)
            b_a = tl.where(m_t, b_m - b_sum, end[:, None])
        else:
            totals, best = tl.associative_scan((total, largest + total), 0, _then)
            after = tl.maximum(carry + totals, best)
            begin = _previous(after, carry, G)
            b_a = tl.maximum(tl.associative_scan(b_c, 1, _maximum), begin[:, None])
            end = tl.maximum(largest, begin)
            b_m = b_a + b_sum
        token = tl.min(tl.where(b_c == largest[:, None], t, NO_TOKEN), 1)
        last = tl.max(tl.where(largest > begin, n, -1), 0)
        pick = tl.where(last >= 0, tl.max(tl.where(n == last, token, -1), 0), pick)

        m_row = m_n[:, None] & (o_t < L)
        o_row = head * 2 * padded + t
        origin = tl.where(end > NEG_INF, end, 0.0)
        store_pair(c, o_row, padded, (b_c - origin[:, None]) * LOG2E, m_row)
        store_pair(a, o_row, padded, (b_a - origin[:, None]) * LOG2E, m_row)
        b_alpha = tl.exp2(((b_c - origin[:, None]) * LOG2E).to(tl.float32))
        b_beta = tl.exp2(((begin[:, None] - b_a) * LOG2E).to(tl.float32))
        tl.store(alpha + head * padded + t, b_alpha, mask=m_row)
        tl.store(beta + head * padded + t, b_beta, mask=m_row)
        tl.store(gamma + head * n_chunks + n, tl.exp2(((begin - origin) * LOG2E).to(tl.float32)), mask=m_n)
        tl.store(floor + head * padded + t, tl.exp(-b_m).to(tl.float32), mask=m_row)
        tl.store(m + head * T + t, b_m.to(tl.float32), mask=m_t)
        after = end + total
        tl.store(m_chunk + chunk_row + n + 1, after.to(tl.float32), mask=m_n)
        carry = tl.max(tl.where(o_n == G - 1, after, NEG_INF), 0)

    tl.store(m_last + head, carry.to(tl.float32))
    tl.store(picked + head, pick)


@triton.jit(
    do_not_specialize_on_alignment=["f_sb", "f_sh", "f_st", "T"],
)
def gates_backward(
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations
    gamma,  # (B, H, NT)
    rows,  # (B, H, 2 * NKT, NT * L) per key tile: sum_j<i X_ij + P_i; X_ii
    cols,  # (B, H, 2 * NKT, NT * L) per key tile: sum_i>j X_ij; U_j
    inner,  # (B, H, NW, NT) partial <dC', C> + dn'.n per chunk
    outer,  # (B, H, NP, 2) likewise at the last state; at the initial state
    dm_last,  # (B, H) if HAS_DM_LAST
    picked,  # (B, H)
    T,
    di,  # (B, H, T) or (B, T, H)
    df,  # likewise
    dm_initial,  # (B, H)
    H: tl.constexpr,
    L: tl.constexpr,
    NKT: tl.constexpr,
    NW: tl.constexpr,
    NP: tl.constexpr,
    HAS_DLAST: tl.constexpr,
    HAS_DM_LAST: tl.constexpr,
    BTHD: tl.constexpr,
):  # fmt: skip
    """One program per head and chunk: dI and dF from per-token sums, added in float64 in a fixed order."""
    n_chunks = tl.cdiv(T, L)
    pid = tl.program_id(0).to(tl.int64)
    head = pid // n_chunks
    n = pid % n_chunks
    padded = n_chunks.to(tl.int64) * L
    o = tl.arange(0, L)
    t = n * L + o
    m_t = t < T

    b_row = tl.zeros([L], tl.float64)
    b_diag = tl.zeros([L], tl.float64)
    b_col = tl.zeros([L], tl.float64)
    b_u = tl.zeros([L], tl.float64)
    for kt in tl.static_range(NKT):
        p_rows = rows + (head * 2 * NKT + 2 * kt) * padded + t
        b_row += tl.load(p_rows).to(tl.float64)
        b_diag += tl.load(p_rows + padded).to(tl.float64)
        p_cols = cols + (head * 2 * NKT + 2 * kt) * padded + t
        b_col += tl.load(p_cols).to(tl.float64)
        b_u += tl.load(p_cols + padded).to(tl.float64)

    w = tl.full([], 0.0, tl.float64)
    for part in range(0, NW):
        w += tl.load(inner + (head * NW + part) * n_chunks + n).to(tl.float64)
    at_last = tl.full([], 0.0, tl.float64)
    at_initial = tl.full([], 0.0, tl.float64)
    for part in range(0, NP):
        at_last += tl.load(outer + (head * NP + part) * 2).to(tl.float64)
        at_initial += tl.load(outer + (head * NP + part) * 2 + 1).to(tl.float64)
    w = w * tl.load(gamma + head * n_chunks + n).to(tl.float64)

    b_di = b_col + b_diag + b_u
    b_dlogf = tl.cumsum(b_row - b_col, 0, reverse=True) + (tl.cumsum(b_u, 0) - b_u) + w
    dm0 = at_initial
    if HAS_DLAST:  # the last stabiliser's own cotangent goes where its maximum came from
        rho = -at_last
        if HAS_DM_LAST:
            rho += tl.load(dm_last + head).to(tl.float64)
        pick = tl.load(picked + head)
        b_di += tl.where(t == pick, rho, 0.0)
        b_dlogf += tl.where(t > pick, rho, 0.0)
        dm0 += tl.where(pick < 0, rho, 0.0)

    p_f = f + (head // H) * f_sb + (head % H) * f_sh
    b_f = tl.load(p_f + t * f_st, mask=m_t, other=0.0).to(tl.float64)
    b_df = b_dlogf / (1.0 + tl.exp(b_f))
    if BTHD:
        o_out = ((head // H) * T + t) * H + head % H
    else:
        o_out = head * T + t
    tl.store(di + o_out, cast(b_di, di.dtype.element_ty), mask=m_t)
    tl.store(df + o_out, cast(b_df, df.dtype.element_ty), mask=m_t)
    if n == 0:
        tl.store(dm_initial + head, dm0.to(tl.float32))
