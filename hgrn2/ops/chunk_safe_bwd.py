"""The gradients of q and f of safe chunks in Triton, by halves of 32 tokens (see `chunk_safe` and `chunk_bwd`)."""

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
    to_accumulator,
)
from hgrn2.ops.chunk_safe import (
    MASK_AFTER,
    MASK_BLOCK,
    MASK_CENTRED,
    MASK_EARLIER,
    MASK_LATER,
    MASK_LEVEL,
    MASK_UP_TO,
    any_safe,
    gated_half,
)
from hgrn2.ops.gates import activate_grad_tile, activate_tile


@triton.jit
def _share_of_other_half(
    p_y, p_s, p_x, m_real, M: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the other half's tokens pass to the gradient of log lam through a state: sum_i x_i (y S^T)_i `[BK]`."""
    b_acc = tl.zeros([M, BK], dtype=tl.float32)
    for v0 in range(0, K, BV):
        o_v = v0 + tl.arange(0, BV)[None, :]
        b_y = tl.load(p_y + o_v, mask=m_real, other=0.0)
        if ACT != 0:
            b_y = tl.where(m_real, activate_tile(b_y.to(tl.float32), ACT), 0.0)
        b_acc = product(b_y, tl.trans(tl.load(p_s + o_v)), b_acc, PRECISION)
    return tl.sum(tl.load(p_x).to(tl.float32) * b_acc, axis=0)


@triton.jit(do_not_specialize=["T", "NT", "P", "NC", "H", "GROUP", "sign", "has_len"])
def chunk_safe_grad_kernel(
    qx_ptr, kx_ptr, x_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, total_ptr, safe_ptr, states_ptr, dstates_ptr,
    da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b,
    v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
    g_stride_t,
    T, NT, P, NC, H, GROUP, sign, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LB: tl.constexpr, LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`chunk_grad_kernel` for half a chunk, of safe ones among GROUP chunks and heads; dlb_ptr has to hold zeros."""
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    half = (pid // (K // BK)) % (C // 32)
    first = pid // (K // BK * (C // 32)) * GROUP
    until = tl.minimum(first + GROUP, NC * H)
    if not any_safe(safe_ptr, first, until):
        return
    for n in tl.range(first, until, num_stages=1):
        flag = tl.load(safe_ptr + n)
        if flag != 0:
            _safe_gradients(
                qx_ptr, kx_ptr, x_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, total_ptr, states_ptr,
                dstates_ptr, da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr, q_stride_b, q_stride_p,
                q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b, v_stride_p,
                v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
                g_stride_t, T, NT, P, H, sign, has_len, n, flag - 1, half, i_k, K, BK, BV, C, SUB, VARLEN, HAS_LB,
                LB_GRAD, Q_ACT, V_ACT, PRECISION, SPLIT, ADD, STAGES,
            )  # fmt: skip


@triton.jit
def _safe_gradients(
    qx_ptr, kx_ptr, x_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, total_ptr, states_ptr, dstates_ptr,
    da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b,
    v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
    g_stride_t,
    T, NT, P, H, sign, has_len, pid, zero_, half, i_k,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LB: tl.constexpr, LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    SUM_SPLIT: tl.constexpr = 1 if PRECISION == "bf16" else SPLIT
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    M: tl.constexpr = 32
    # a zero that the compiler does not know of: what depends on it stays in the loop, where registers are short
    mask_ptr += zero_ * 16
    i_h = (pid % H).to(tl.int64)
    c = pid // H
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C, VARLEN)
    t64 = t0.to(tl.int64)
    o_m = tl.arange(0, M) + zero_
    i = o_m[:, None]
    j = tl.arange(0, M)[None, :] + zero_ * 16
    o_r = half * M + o_m
    o_t = o_r * sign
    m_in = (o_r < rows)[:, None]
    m_real = m_in & (t0 + o_t < length)[:, None]
    o_k = i_k * BK + tl.arange(0, BK)
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_s = p_ch * K * K + o_k[:, None] * K
    p_f = f_ptr + b * f_stride_b + p * f_stride_p + t64 * f_stride_t + i_h * f_stride_h + o_k[None, :]
    p_q = q_ptr + b * q_stride_b + p * q_stride_p + t64 * q_stride_t + i_h * q_stride_h + o_k[None, :]
    p_da = da_ptr + p_ch * C * C
    gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
    b_da = tl.load(p_da + half * (M * C + M) + i * C + j)
    b_diag = tl.load(diag_ptr + p_ch * C + o_r)[:, None]
    eye = load_mask(mask_ptr, 0, M)
    zero = tl.zeros([M, BK], dtype=tl.float32)
    b_q, b_k, b_g = gated_half(
        p_q, p_f, q_stride_t, f_stride_t, o_r, t0, rows, length, sign, gamma, eye, HAS_LB, Q_ACT, EXACT
    )

    b_dq = b_diag * b_k
    b_dk = b_diag * b_q
    b_dg = zero
    if SUB > 0:
        b_cut = tl.maximum(b_g, -BLOCK_LIMIT)
        b_e = masked_sum(load_mask(mask_ptr, MASK_CENTRED, M), b_cut, zero, SPLIT)
        b_back = decay(-b_e, PRECISION)
        b_e = decay(b_e, PRECISION)
        b_pair = tl.where((i >> SUB) == (j >> SUB), b_da, 0.0)
        b_qx = rounded(b_q * b_e, PRECISION)
        b_kx = rounded(b_k * b_back, PRECISION)
        b_dqx = product(b_pair, b_kx, zero, PRECISION)
        b_dkx = product(tl.trans(b_pair), b_qx, zero, PRECISION)
        b_dq += b_dqx * b_e
        b_dk += b_dkx * b_back
        b_block = b_qx.to(tl.float32) * b_dqx - b_kx.to(tl.float32) * b_dkx
        # every pair that crosses a token has its decay as a factor
        b_dg = masked_sum(load_mask(mask_ptr, MASK_BLOCK, M), b_block, zero, SPLIT) * decay(b_g - b_cut, PRECISION)
    b_pairs = b_da + tl.trans(b_da)
    for shift in tl.range(SUB, 5, num_stages=1):
        # one factor a token: q in second halves, k in first ones
        second = ((o_m >> shift) & 1)[:, None] == 1
        b_e = decay(masked_sum(load_mask(mask_ptr, MASK_LEVEL + shift, M), b_g, zero, SPLIT), PRECISION)
        b_x = tl.where(second, b_q, b_k) * b_e
        b_dx = product(tl.where(meeting_pairs(shift, M), b_pairs, 0.0), b_x, zero, PRECISION)
        b_dg = masked_sum(load_mask(mask_ptr, MASK_LEVEL + 5 + shift, M), b_x * b_dx, b_dg, SUM_SPLIT)
        b_dx *= b_e
        b_dq += tl.where(second, b_dx, 0.0)
        b_dk += tl.where(second, 0.0, b_dx)
    b_up_to = masked_sum(load_mask(mask_ptr, MASK_UP_TO, M), b_g, zero, SPLIT)
    b_after = masked_sum(load_mask(mask_ptr, MASK_AFTER, M), b_g, zero, SPLIT)
    b_total = tl.load(total_ptr + p_ch * K + o_k)
    if C > M:
        o_other = (1 - half) * M + o_m
        p_other = p_ch * C * K + o_other[:, None] * K + o_k[None, :]
        t_other = (o_other * sign)[:, None]
        m_other = (o_other < rows)[:, None] & (t0 + t_other < length)
        is_second = half == 1
        b_e = decay(tl.where(is_second, b_up_to, b_after), PRECISION)
        b_x = tl.where(is_second, b_q, b_k) * b_e
        b_pair = tl.load(p_da + M * C + i * tl.where(is_second, C, 1) + j * tl.where(is_second, 1, C))
        b_dx = product(b_pair, tl.load(x_ptr + p_other), zero, PRECISION)
        b_dg = masked_sum(load_mask(mask_ptr, MASK_EARLIER - half, M), b_x * b_dx, b_dg, SUM_SPLIT)
        b_dx *= b_e
        b_dq += tl.where(is_second, b_dx, 0.0)
        b_dk += tl.where(is_second, 0.0, b_dx)
        b_rest = tl.minimum(b_total - tl.sum(b_g, axis=0), 0.0)[None, :]
        if is_second:
            b_up_to += b_rest
            b_cross = _share_of_other_half(
                p_v + t_other * v_stride_t, dstates_ptr + p_s, kx_ptr + p_other, m_other, M, K, BK, BV, V_ACT, PRECISION
            )
        else:
            b_after += b_rest
            b_cross = _share_of_other_half(
                p_do + t_other * do_stride_t, states_ptr + p_s, qx_ptr + p_other, m_other, M, K, BK, BV, 0, PRECISION
            )
        b_dg += b_cross[None, :]
    b_dqx, b_dkx, b_cross = state_gradients(
        p_v + o_t[:, None] * v_stride_t, p_do + o_t[:, None] * do_stride_t, p_s, states_ptr, dstates_ptr, m_real,
        M, K, BK, BV, V_ACT, PRECISION, STAGES,
    )  # fmt: skip
    b_dqx *= decay(b_up_to, PRECISION)
    b_dkx *= decay(b_after, PRECISION)
    b_dg = masked_sum(load_mask(mask_ptr, MASK_LATER, M), b_q * b_dqx, b_dg, SUM_SPLIT)
    b_dg = masked_sum(load_mask(mask_ptr, MASK_EARLIER, M), b_k * b_dkx, b_dg, SUM_SPLIT)
    b_dg += (b_cross * decay(b_total, PRECISION))[None, :]
    b_dq += b_dqx
    b_dk += b_dkx
    if Q_ACT != 0:
        b_raw = tl.load(p_q + o_t[:, None] * q_stride_t, mask=m_real, other=0.0)
        b_dq *= activate_grad_tile(b_raw.to(tl.float32), Q_ACT)
    p_out = b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K + o_t[:, None] * g_stride_t + o_k[None, :]
    if ADD:
        b_dq += tl.load(dq_ptr + p_out, mask=m_in, other=0.0).to(tl.float32)
    tl.store(dq_ptr + p_out, b_dq.to(dq_ptr.dtype.element_ty), mask=m_in)
    # loaded once more: these gates would take registers all along
    b_f = finite(tl.load(p_f + o_t[:, None] * f_stride_t, mask=m_real, other=100.0))
    b_df, b_bound = logit_gradient(to_accumulator(b_f, eye), gamma, b_dg, b_dk, m_real, HAS_LB)
    if LB_GRAD:  # of two terms, so that their order does not matter
        tl.atomic_add(dlb_ptr + p_ch * K + o_k, b_bound, sem="relaxed")
    if ADD:
        b_df += tl.load(df_ptr + p_out, mask=m_in, other=0.0).to(tl.float32)
    tl.store(df_ptr + p_out, b_df.to(df_ptr.dtype.element_ty), mask=m_in)
