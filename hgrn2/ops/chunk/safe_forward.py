"""The safe chunks of the scan in Triton (see `common`): their factors and scores.

This kernel and the one of `safe_backward` work on halves of M = 32 tokens (all of a chunk of 32): tiles of 64 do not
fit the registers. Levels and blocks within a half concern its tokens alone. At the top level, where the halves of a
chunk of 64 meet, each token has one factor `x`, `k 2^(sum after it)` in the first half and `q 2^(sum up to it)` in the
second; it is kept for the backward in place of ex, which safe chunks have no use for.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk.common import (
    BLOCK_LIMIT,
    backwards,
    decay,
    finite,
    load_mask,
    locate,
    masked_sum,
    meeting_pairs,
    product,
    rounded,
    settle,
    to_accumulator,
)
from hgrn2.ops.gates import activate_tile, gate_tile

# indices of `tiles.sum_masks` for 32 tokens
MASK_LEVEL, MASK_CENTRED, MASK_UP_TO, MASK_AFTER = (tl.constexpr(i) for i in (3, 14, 15, 16))


@triton.jit
def _inner_scores(
    b_q, b_k, b_g, mask_ptr, M: tl.constexpr, BK: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Scores `[M, M]` of a half's tokens among themselves from one tile of channels."""
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, M)[None, :]
    zero = tl.zeros([M, BK], dtype=tl.float32)
    none = tl.zeros([M, M], dtype=tl.float32)
    if SUB == 0:
        b_a = tl.where(i == j, tl.sum(b_q * b_k, axis=1)[:, None], 0.0)
    else:
        b_e = masked_sum(load_mask(mask_ptr, MASK_CENTRED, M), tl.maximum(b_g, -BLOCK_LIMIT), zero, SPLIT)
        b_x = settle(b_q * decay(b_e, PRECISION))
        b_a = product(b_x, tl.trans(settle(b_k * decay(-b_e, PRECISION))), none, PRECISION)
        b_a = tl.where(((i >> SUB) == (j >> SUB)) & (i >= j), b_a, 0.0)
    for shift in tl.range(SUB, 5, num_stages=1):
        b_e = decay(masked_sum(load_mask(mask_ptr, MASK_LEVEL + shift, M), b_g, zero, SPLIT), PRECISION)
        b_x = settle(tl.where(((i >> shift) & 1) == 1, b_q, b_k) * b_e)
        b_level = product(b_x, tl.trans(b_x), none, PRECISION)
        b_a += tl.where(meeting_pairs(shift, M) & (i > j), b_level, 0.0)
    return b_a


@triton.jit
def _load_half(p_q, p_f, q_stride_t, f_stride_t, o_r, t0, rows, length, sign):
    """q, f and which are real of the tokens o_r of a chunk."""
    o_t = o_r * sign
    m_real = ((o_r < rows) & (t0 + o_t < length))[:, None]
    b_f = tl.load(p_f + o_t[:, None] * f_stride_t, mask=m_real, other=100.0)
    return tl.load(p_q + o_t[:, None] * q_stride_t, mask=m_real, other=0.0), b_f, m_real


@triton.jit
def _gated(b_q, b_f, m_real, gamma, eye, HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, EXACT: tl.constexpr):
    """q after activation, k and log2 lam, laid out as accumulators."""
    b_q = to_accumulator(b_q, eye)
    if Q_ACT != 0:
        b_q = tl.where(m_real, activate_tile(b_q, Q_ACT), 0.0)
    _sigma, _minus, b_k, _lam, b_g = gate_tile(to_accumulator(finite(b_f), eye), gamma, HAS_LB, EXACT)
    return b_q, b_k, b_g


@triton.jit
def any_safe(safe_ptr, first, until):
    """Whether any of the flags from first to until, 16 at most, is set: most programs find none and leave."""
    o_n = first + tl.arange(0, 16)
    return tl.max(tl.load(safe_ptr + o_n, mask=o_n < until, other=0)) > 0


@triton.jit(do_not_specialize=["T", "NT", "P", "NC", "H", "GROUP", "sign", "has_len", "keep"])
def chunk_score_kernel(
    q_ptr, f_ptr, lb_ptr, mask_ptr, safe_ptr, kx_ptr, x_ptr, a_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h,
    T, NT, P, NC, H, GROUP, sign, has_len, keep,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """kx = k 2^R, x (not if keep is 0) and the scores `[NC, H, C, C]`, 0 above the diagonal, of the safe ones among
    GROUP chunks and heads.

    BACK: of two scans the one back (see `pair_forward`), whose scores are added to the other's. x keeps its own order.
    """
    first = tl.program_id(0) * GROUP
    until = tl.minimum(first + GROUP, NC * H)
    if not any_safe(safe_ptr, first, until):
        return
    for pid in tl.range(first, until, num_stages=1):
        flag = tl.load(safe_ptr + pid)
        if flag != 0:
            _scores(
                q_ptr, f_ptr, lb_ptr, mask_ptr, kx_ptr, x_ptr, a_ptr, table_ptr, len_ptr, q_stride_b, q_stride_p,
                q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, T, NT, P, H, sign, has_len,
                keep, pid, flag - 1, K, BK, C, SUB, VARLEN, HAS_LB, Q_ACT, PRECISION, SPLIT, BACK,
            )  # fmt: skip


@triton.jit
def _scores(
    q_ptr, f_ptr, lb_ptr, mask_ptr, kx_ptr, x_ptr, a_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h,
    T, NT, P, H, sign, has_len, keep, pid, zero_,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    # zero_ is a zero that the compiler does not know of: what depends on it stays in the loop
    mask_ptr += zero_ * 16
    M: tl.constexpr = 32
    i_h = (pid % H).to(tl.int64)
    c = pid // H
    p_ch = c.to(tl.int64) * H + i_h
    way = 1 if BACK else sign
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, way, has_len, C, VARLEN)
    t0 += rows - 1 if BACK else 0
    t64 = t0.to(tl.int64)
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    o_m = tl.arange(0, M)
    i = o_m[:, None]
    j = o_m[None, :]
    eye = load_mask(mask_ptr, 0, M)
    zero = tl.zeros([M, BK], dtype=tl.float32)
    b_first = tl.zeros([M, M], dtype=tl.float32)
    b_second = tl.zeros([M, M], dtype=tl.float32)
    b_across = tl.zeros([M, M], dtype=tl.float32)
    q_ptr += b * q_stride_b + p * q_stride_p + t64 * q_stride_t + i_h * q_stride_h
    f_ptr += b * f_stride_b + p * f_stride_p + t64 * f_stride_t + i_h * f_stride_h
    o_k = tl.arange(0, BK)
    if C > M:
        b_q2, b_f2, m_real2 = _load_half(
            q_ptr + o_k[None, :], f_ptr + o_k[None, :], q_stride_t, f_stride_t, M + o_m, t0, rows, length, sign
        )
    for k0 in tl.range(0, K, BK, num_stages=1):
        o_k = k0 + tl.arange(0, BK)
        gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
        p_q = q_ptr + o_k[None, :]
        p_f = f_ptr + o_k[None, :]
        p_x = p_ch * C * K + i * K + o_k[None, :]
        p_k = p_ch * C * K + (backwards(i, rows, C) if BACK else i) * K + o_k[None, :]
        b_rest = tl.zeros([BK], dtype=tl.float32)
        # each half is loaded ahead of the other's work, which hides how long this takes
        b_q1, b_f1, m_real1 = _load_half(p_q, p_f, q_stride_t, f_stride_t, o_m, t0, rows, length, sign)
        if C > M:
            b_q, b_k, b_g = _gated(b_q2, b_f2, m_real2, gamma, eye, HAS_LB, Q_ACT, EXACT)
            b_second += _inner_scores(b_q, b_k, b_g, mask_ptr, M, BK, SUB, PRECISION, SPLIT)
            b_e = masked_sum(load_mask(mask_ptr, MASK_AFTER, M), b_g, zero, SPLIT)
            b_x = rounded(settle(b_k * decay(b_e, PRECISION)), PRECISION)
            p_k2 = p_ch * C * K + (backwards(i + M, rows, C) if BACK else i + M) * K + o_k[None, :]
            tl.store(kx_ptr + p_k2, b_x.to(kx_ptr.dtype.element_ty))
            b_e = masked_sum(load_mask(mask_ptr, MASK_UP_TO, M), b_g, zero, SPLIT)
            b_later = rounded(settle(b_q * decay(b_e, PRECISION)), PRECISION)
            tl.store(x_ptr + p_x + M * K, b_later.to(x_ptr.dtype.element_ty), mask=(o_k < keep * K)[None, :])
            b_rest = tl.sum(b_g, axis=0)
            b_q2, b_f2, _ = _load_half(
                p_q + BK, p_f + BK, q_stride_t, f_stride_t, M + o_m, t0, tl.where(k0 + BK < K, rows, 0), length, sign
            )
        b_q, b_k, b_g = _gated(b_q1, b_f1, m_real1, gamma, eye, HAS_LB, Q_ACT, EXACT)
        b_first += _inner_scores(b_q, b_k, b_g, mask_ptr, M, BK, SUB, PRECISION, SPLIT)
        b_e = masked_sum(load_mask(mask_ptr, MASK_AFTER, M), b_g, zero, SPLIT)
        b_x = rounded(settle(b_k * decay(b_e + b_rest[None, :], PRECISION)), PRECISION)
        tl.store(kx_ptr + p_k, b_x.to(kx_ptr.dtype.element_ty))
        if C > M:
            b_x = rounded(settle(b_k * decay(b_e, PRECISION)), PRECISION)
            tl.store(x_ptr + p_x, b_x.to(x_ptr.dtype.element_ty), mask=(o_k < keep * K)[None, :])
            b_across = product(b_later, tl.trans(b_x), b_across, PRECISION)
    a_ptr += p_ch * C * C
    if BACK:
        i1 = backwards(i, rows, C) * C
        j1 = backwards(j, rows, C)
        b_first += tl.load(a_ptr + i1 + j1).to(tl.float32)
        tl.store(a_ptr + i1 + j1, b_first.to(a_ptr.dtype.element_ty))
        if C > M:
            i2 = backwards(i + M, rows, C) * C
            j2 = backwards(j + M, rows, C)
            b_second += tl.load(a_ptr + i2 + j2).to(tl.float32)
            tl.store(a_ptr + i2 + j1, b_across.to(a_ptr.dtype.element_ty))
            tl.store(a_ptr + i2 + j2, b_second.to(a_ptr.dtype.element_ty))
    else:
        p_a = a_ptr + i * C + j
        tl.store(p_a, b_first.to(a_ptr.dtype.element_ty))
        if C > M:
            tl.store(p_a + M, tl.zeros([M, M], dtype=a_ptr.dtype.element_ty))
            tl.store(p_a + M * C, b_across.to(a_ptr.dtype.element_ty))
            tl.store(p_a + M * C + M, b_second.to(a_ptr.dtype.element_ty))
