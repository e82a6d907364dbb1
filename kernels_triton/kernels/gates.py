"""The gates' kernels: all that depends on i and f alone, before any matrix product, and their gradients after all."""

import triton
import triton.language as tl

from .common import LOG2E, NEG_INF, cast, exp2_difference, store_pair

# A closed forget gate below this cannot be told from -inf in any state; finite, so that prefix sums stay finite.
LOG_FORGET_MIN = tl.constexpr(-1e6)
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y)


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
    c,  # (B, H, 2, NT * L) pair: i - b in log2 units, b the prefix sum of log f inside the chunk
    a,  # (B, H, 2, NT * L) pair: m - b
    ends,  # (B, H, 4, NT) pairs: the state's stabiliser at the chunk's start; a at its end
    floor,  # (B, H, NT * L) exp(-m)
    m,  # (B, H, T) stabiliser per token
    m_chunk,  # (B, H, NT + 1) stabiliser of the state at each chunk's start, and of the last state
    m_last,  # (B, H)
    picked,  # (B, H) int32: token whose input gate is the last stabiliser's maximum; -1: the initial stabiliser
    H: tl.constexpr,
    L: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_I: tl.constexpr,
    F_IS_LOG: tl.constexpr,
    M_GIVEN: tl.constexpr,
):  # fmt: skip
    """One program per head.

    D_ij = 2**(c_j - a_i), beta_i = 2**(M - a_i), alpha_j = 2**(c_j - a_L), gamma = 2**(M - a_L).
    """
    head = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, L)
    n_chunks = tl.cdiv(T, L)
    padded = n_chunks.to(tl.int64) * L
    p_i = i + (head // H) * i_sb + (head % H) * i_sh
    p_f = f + (head // H) * f_sb + (head % H) * f_sh
    chunk_row = head * (n_chunks + 1)

    if HAS_INITIAL:
        start = tl.load(m_initial + head).to(tl.float64)
    else:
        start = tl.full([], 0.0, tl.float64)
    if M_GIVEN:
        start = tl.load(m_chunk_given + chunk_row).to(tl.float64)
    pick = tl.full([], -1, tl.int32)
    tl.store(m_chunk + chunk_row, start.to(tl.float32))

    for n in range(0, n_chunks):
        t = n * L + o
        m_t = t < T
        if HAS_I:
            b_i = tl.load(p_i + t.to(tl.int64) * i_st, mask=m_t, other=NEG_INF).to(tl.float64)
        else:
            b_i = tl.where(m_t, 0.0, NEG_INF).to(tl.float64)
        b_f = tl.load(p_f + t.to(tl.int64) * f_st, mask=m_t, other=0.0).to(tl.float64)
        b_logf = tl.where(m_t, _log_forget(b_f, F_IS_LOG), 0.0)  # beyond T: remembers all, adds nothing
        b_sum = tl.cumsum(b_logf, 0)
        total = tl.sum(tl.where(o == L - 1, b_sum, 0.0), 0)
        b_c = b_i - b_sum
        if M_GIVEN:
            end = tl.load(m_chunk_given + chunk_row + n + 1).to(tl.float64) - total
            b_m = tl.load(m_token + head * T + t, mask=m_t, other=0.0).to(tl.float64)
            b_a = tl.where(m_t, b_m - b_sum, end)
        else:
            b_a = tl.maximum(tl.associative_scan(b_c, 0, _maximum), start)
            end = tl.sum(tl.where(o == L - 1, b_a, 0.0), 0)
            b_m = b_a + b_sum
        largest = tl.max(b_c, 0)
        token = tl.min(tl.where(b_c == largest, t, NO_TOKEN), 0)
        pick = tl.where(largest > start, token, pick)

        o_row = head * 2 * padded + t
        store_pair(c, o_row, padded, b_c * LOG2E)
        store_pair(a, o_row, padded, b_a * LOG2E)
        o_end = head * 4 * n_chunks + n
        store_pair(ends, o_end, n_chunks, start * LOG2E)
        store_pair(ends, o_end + 2 * n_chunks, n_chunks, end * LOG2E)
        tl.store(floor + head * padded + t, tl.exp(-b_m).to(tl.float32))
        tl.store(m + head * T + t, b_m.to(tl.float32), mask=m_t)
        start = end + total
        tl.store(m_chunk + chunk_row + n + 1, start.to(tl.float32))

    tl.store(m_last + head, start.to(tl.float32))
    tl.store(picked + head, pick)


@triton.jit(
    do_not_specialize_on_alignment=["f_sb", "f_sh", "f_st", "T"],
)
def gates_backward(
    f, f_sb, f_sh, f_st,  # (B, H, T) forget gate pre-activations
    ends,  # (B, H, 4, NT)
    rows,  # (B, H, 2 * NKT, NT * L) per key tile: sum_j<i X_ij + P_i; X_ii
    cols,  # (B, H, 2 * NKT, NT * L) per key tile: sum_i>j X_ij; U_j
    inner,  # (B, H, NP, NT + 2) partial <dC', C> + dn'.n per chunk; at the last state; at the initial state
    dm_last,  # (B, H) if HAS_DM_LAST
    picked,  # (B, H)
    T,
    di,  # (B, H, T) or (B, T, H)
    df,  # likewise
    dm_initial,  # (B, H)
    H: tl.constexpr,
    L: tl.constexpr,
    NKT: tl.constexpr,
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

    o_inner = head * NP * (n_chunks + 2)
    w = tl.full([], 0.0, tl.float64)
    at_last = tl.full([], 0.0, tl.float64)
    at_initial = tl.full([], 0.0, tl.float64)
    for part in range(0, NP):
        p_inner = inner + o_inner + part * (n_chunks + 2)
        w += tl.load(p_inner + n).to(tl.float64)
        at_last += tl.load(p_inner + n_chunks).to(tl.float64)
        at_initial += tl.load(p_inner + n_chunks + 1).to(tl.float64)
    p_end = ends + head * 4 * n_chunks + n
    gamma = exp2_difference(
        tl.load(p_end), tl.load(p_end + n_chunks), tl.load(p_end + 2 * n_chunks), tl.load(p_end + 3 * n_chunks)
    )
    w = w * gamma.to(tl.float64)

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
