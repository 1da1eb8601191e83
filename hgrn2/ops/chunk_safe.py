"""The safe chunks of the scan in Triton (see `chunk_common`): their scores, and their gradients of q and f."""

import triton
import triton.language as tl

from hgrn2.ops.chunk_bwd import logit_gradient, state_gradients
from hgrn2.ops.chunk_common import (
    BLOCK_LIMIT,
    decay,
    finite,
    load_mask,
    locate,
    masked_sum,
    meeting_pairs,
    product,
    rounded,
    row_masks,
    settle,
    to_accumulator,
)
from hgrn2.ops.gates import activate_grad_tile, activate_tile, gate_tile


@triton.jit(do_not_specialize=["T", "NT", "H", "sign", "has_len"])
def chunk_score_kernel(
    q_ptr, f_ptr, lb_ptr, mask_ptr, safe_ptr, a_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_t, q_stride_h, f_stride_b, f_stride_t, f_stride_h,
    T, NT, H, sign, has_len,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, SUB: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Scores `[NC, H, C, C]` of the safe chunks and heads, 0 above the diagonal; from q and f themselves."""
    pid = tl.program_id(0)
    i_h = (pid % H).to(tl.int64)
    c = pid // H
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, sign, has_len, C, VARLEN)
    if (rows <= 0) | (tl.load(safe_ptr + p_ch) == 0):
        return
    t64 = t0.to(tl.int64)
    o_t, _m_in, m_real = row_masks(t0, rows, length, sign, C)
    p_q = q_ptr + b * q_stride_b + t64 * q_stride_t + i_h * q_stride_h + o_t[:, None] * q_stride_t
    p_f = f_ptr + b * f_stride_b + t64 * f_stride_t + i_h * f_stride_h + o_t[:, None] * f_stride_t
    o_c = tl.arange(0, C)
    i = o_c[:, None]
    j = o_c[None, :]
    eye = load_mask(mask_ptr, 0, C)
    zero = tl.zeros([C, BK], dtype=tl.float32)
    none = tl.zeros([C, C], dtype=tl.float32)
    b_a = tl.zeros([C, C], dtype=tl.float32)
    for k0 in range(0, K, BK):
        o_k = k0 + tl.arange(0, BK)
        gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
        b_f = to_accumulator(finite(tl.load(p_f + o_k[None, :], mask=m_real[:, None], other=100.0)), eye)
        b_q = to_accumulator(tl.load(p_q + o_k[None, :], mask=m_real[:, None], other=0.0), eye)
        if Q_ACT != 0:
            b_q = tl.where(m_real[:, None], activate_tile(b_q, Q_ACT), 0.0)
        _sigma, _minus, b_k, _lam, b_g = gate_tile(b_f, gamma, HAS_LB)
        for shift in range(SUB, LOG_C):
            b_e = decay(masked_sum(load_mask(mask_ptr, 3 + shift, C), b_g, zero, SPLIT), PRECISION)
            b_x = tl.where(((i >> shift) & 1) == 1, b_q, b_k) * b_e
            b_level = product(b_x, tl.trans(b_x), none, PRECISION)
            b_a += tl.where(meeting_pairs(shift, C) & (i > j), b_level, 0.0)
        if SUB == 0:
            b_a += tl.where(i == j, tl.sum(b_q * b_k, axis=1)[:, None], 0.0)
        else:
            b_g = tl.maximum(b_g, -BLOCK_LIMIT)
            b_e = masked_sum(load_mask(mask_ptr, 4 + 2 * LOG_C, C), b_g, zero, SPLIT)
            b_block = product(b_q * decay(b_e, PRECISION), tl.trans(b_k * decay(-b_e, PRECISION)), none, PRECISION)
            b_a += tl.where(((i >> SUB) == (j >> SUB)) & (i >= j), b_block, 0.0)
    tl.store(a_ptr + p_ch * C * C + i * C + j, b_a.to(a_ptr.dtype.element_ty))


@triton.jit
def _gated(
    b_qt, b_ft, gamma, m_real, mask_ptr, eye_index, C: tl.constexpr, HAS_LB: tl.constexpr, Q_ACT: tl.constexpr,
):  # fmt: skip
    """q after activation, k and log2 lam of tiles of q and f, laid out as accumulators."""
    eye = load_mask(mask_ptr, eye_index, C)
    b_q = to_accumulator(b_qt, eye)
    if Q_ACT != 0:
        b_q = tl.where(m_real[:, None], activate_tile(b_q, Q_ACT), 0.0)
    _sigma, _minus, b_k, _lam, b_g = gate_tile(to_accumulator(b_ft, eye), gamma, HAS_LB)
    return b_q, b_k, b_g


@triton.jit(do_not_specialize=["T", "NT", "H", "sign", "has_len"])
def chunk_safe_grad_kernel(
    q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, total_ptr, safe_ptr, states_ptr, dstates_ptr,
    da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_t, q_stride_h, f_stride_b, f_stride_t, f_stride_h, v_stride_b, v_stride_t, v_stride_h,
    do_stride_b, do_stride_t, do_stride_h, g_stride_t,
    T, NT, H, sign, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, SUB: tl.constexpr,
    VARLEN: tl.constexpr, HAS_LB: tl.constexpr, LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`chunk_grad_kernel` for the safe chunks and heads."""
    SUM_SPLIT: tl.constexpr = 1 if PRECISION == "bf16" else SPLIT
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    i_h = ((pid // (K // BK)) % H).to(tl.int64)
    c = pid // ((K // BK) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, sign, has_len, C, VARLEN)
    if (rows <= 0) | (tl.load(safe_ptr + p_ch) == 0):
        return
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, sign, C)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    p_v = v_ptr + b * v_stride_b + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_do = do_ptr + b * do_stride_b + t64 * do_stride_t + i_h * do_stride_h + o_t[:, None] * do_stride_t
    p_s = p_ch * K * K + o_k[:, None] * K
    p_f = f_ptr + b * f_stride_b + t64 * f_stride_t + i_h * f_stride_h + o_t[:, None] * f_stride_t + o_k[None, :]
    p_q = q_ptr + b * q_stride_b + t64 * q_stride_t + i_h * q_stride_h + o_t[:, None] * q_stride_t + o_k[None, :]
    b_ft = finite(tl.load(p_f, mask=m_real[:, None], other=100.0))
    b_qt = tl.load(p_q, mask=m_real[:, None], other=0.0)
    b_da = tl.load(da_ptr + p_ch * C * C + o_c[:, None] * C + o_c[None, :])
    b_diag = tl.load(diag_ptr + p_ch * C + o_c)[:, None]
    gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
    zero = tl.zeros([C, BK], dtype=tl.float32)

    eye = load_mask(mask_ptr, 0, C)
    b_f = to_accumulator(b_ft, eye)
    b_q = to_accumulator(b_qt, eye)
    if Q_ACT != 0:
        b_q = tl.where(m_real[:, None], activate_tile(b_q, Q_ACT), 0.0)
    _sigma, _minus, b_k, _lam, b_g = gate_tile(b_f, gamma, HAS_LB)
    b_dq = b_diag * b_k
    b_dk = b_diag * b_q
    b_dg = tl.zeros([C, BK], dtype=tl.float32)
    if SUB > 0:
        b_cut = tl.maximum(b_g, -BLOCK_LIMIT)
        b_e = masked_sum(load_mask(mask_ptr, 4 + 2 * LOG_C, C), b_cut, zero, SPLIT)
        b_back = decay(-b_e, PRECISION)
        b_e = decay(b_e, PRECISION)
        b_pair = tl.where((o_c >> SUB)[:, None] == (o_c >> SUB)[None, :], b_da, 0.0)
        b_qx = rounded(b_q * b_e, PRECISION)
        b_kx = rounded(b_k * b_back, PRECISION)
        b_dx = product(b_pair, b_kx, zero, PRECISION)
        b_dq += b_dx * b_e
        b_cross = b_qx.to(tl.float32) * b_dx
        b_dx = product(tl.trans(b_pair), b_qx, zero, PRECISION)
        b_dk += b_dx * b_back
        b_cross -= b_kx.to(tl.float32) * b_dx
        # every pair that crosses a token has its decay as a factor
        b_dg = masked_sum(load_mask(mask_ptr, 3 + 2 * LOG_C, C), b_cross, zero, SPLIT)
        b_dg *= decay(b_g - b_cut, PRECISION)
    b_pairs = b_da + tl.trans(b_da)
    for shift in range(SUB, LOG_C):
        # one factor a token: q in second halves, k in first ones
        second = ((o_c >> shift) & 1)[:, None] == 1
        b_e = decay(masked_sum(load_mask(mask_ptr, 3 + shift, C), b_g, zero, SPLIT), PRECISION)
        b_x = tl.where(second, b_q, b_k) * b_e
        b_dx = product(tl.where(meeting_pairs(shift, C), b_pairs, 0.0), b_x, zero, PRECISION)
        b_dg = masked_sum(load_mask(mask_ptr, 3 + LOG_C + shift, C), b_x * b_dx, b_dg, SUM_SPLIT)
        b_dx *= b_e
        b_dq += tl.where(second, b_dx, 0.0)
        b_dk += tl.where(second, 0.0, b_dx)
    b_dqx, b_dkx, b_total = state_gradients(
        p_v, p_do, p_s, states_ptr, dstates_ptr, m_real, C, K, BK, BV, V_ACT, PRECISION, STAGES
    )
    later = load_mask(mask_ptr, 1, C)
    b_dqx *= decay(masked_sum(tl.trans(later), b_g, zero, SPLIT), PRECISION)
    b_dg = masked_sum(later, b_q * b_dqx, b_dg, SUM_SPLIT)
    b_dq += b_dqx
    earlier = load_mask(mask_ptr, 2, C)
    b_dkx *= decay(masked_sum(tl.trans(earlier), b_g, zero, SPLIT), PRECISION)
    b_dg = masked_sum(earlier, b_k * b_dkx, b_dg, SUM_SPLIT)
    b_dk += b_dkx
    b_dg += (b_total * decay(tl.load(total_ptr + p_ch * K + o_k), PRECISION))[None, :]
    if Q_ACT != 0:
        b_dq *= activate_grad_tile(tl.load(p_q, mask=m_real[:, None], other=0.0).to(tl.float32), Q_ACT)
    p_out = (b * T + t64) * g_stride_t + i_h * K + o_t[:, None] * g_stride_t + o_k[None, :]
    tl.store(dq_ptr + p_out, settle(b_dq).to(dq_ptr.dtype.element_ty), mask=m_in[:, None])
    b_df = logit_gradient(b_f, gamma, b_dg, b_dk, m_real, dlb_ptr, p_ch * K + o_k, HAS_LB, LB_GRAD)
    tl.store(df_ptr + p_out, settle(b_df).to(df_ptr.dtype.element_ty), mask=m_in[:, None])
