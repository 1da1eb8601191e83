"""The gradients of q and f of fast chunks for both directions of the scan at once (see `chunk_pair` and `chunk_bwd`).

All tiles lie in the order of the scan ahead. What is later in it is earlier in the scan back, whose sums over tokens
take the transposed masks.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk_bwd import logit_gradient, state_gradients
from hgrn2.ops.chunk_common import (
    finite,
    load_mask,
    locate,
    masked_sum,
    opposite,
    product,
    row_masks,
    to_accumulator,
)
from hgrn2.ops.gates import activate_grad_tile, exact_reciprocal, fast_reciprocal


@triton.jit
def _one(
    qx_ptr, kx_ptr, ex_ptr, da_ptr, p_tile, p_da, b_dq, b_dk, b_diag, eye, later, earlier, b_dg, C: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, SUM_SPLIT: tl.constexpr,
):  # fmt: skip
    """One scan's dq, dk and, added to b_dg, gradient of log lam, from what its states contribute to dq and dk."""
    zero = tl.zeros([C, BK], dtype=tl.float32)
    b_qt = tl.load(qx_ptr + p_tile)
    b_kt = tl.load(kx_ptr + p_tile)
    b_da = tl.load(da_ptr + p_da)
    b_dq = product(b_da, b_kt, b_dq, PRECISION)
    b_inner = product(tl.trans(b_da), b_qt, zero, PRECISION)
    b_qx = to_accumulator(b_qt, eye)
    b_kx = to_accumulator(b_kt, eye)
    b_dg = masked_sum(later, b_qx * b_dq - b_kx * b_inner, b_dg, SPLIT)
    b_dg = masked_sum(earlier, b_kx * b_dk, b_dg, SUM_SPLIT)
    b_et = tl.load(ex_ptr + p_tile)
    b_e = to_accumulator(b_et, eye)
    b_dq = (b_dq + b_diag * b_kx) * b_e
    b_dk = (b_dk + b_inner + b_diag * b_qx) * (
        exact_reciprocal(b_e) if b_et.dtype == tl.float32 else fast_reciprocal(b_e)
    )
    return b_dq, b_dk, b_dg


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len"])
def chunk_pair_grad_kernel(
    qx_ptr, kx_ptr, ex_ptr, states_ptr, dstates_ptr, da_ptr, qx2_ptr, kx2_ptr, ex2_ptr, states2_ptr, dstates2_ptr,
    da2_ptr, diag_ptr, safe_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr,
    len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b,
    v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
    g_stride_t,
    T, NT, P, H, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, HAS_LB: tl.constexpr,
    LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `chunk_grad_kernel`, of both scans; dlb_ptr, of the scan ahead, takes both shares."""
    SUM_SPLIT: tl.constexpr = 1 if PRECISION == "bf16" else SPLIT
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    i_h = ((pid // (K // BK)) % H).to(tl.int64)
    c = pid // ((K // BK) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, 1, has_len, C, VARLEN)
    if (rows <= 0) | (tl.load(safe_ptr + p_ch) != 0):
        return
    c2, o_r = opposite(c, table_ptr, rows, NT, C, VARLEN)
    p_ch2 = c2.to(tl.int64) * H + i_h
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, 1, C)
    m_real = m_real[:, None]
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_do += o_t[:, None] * do_stride_t
    p_f = f_ptr + b * f_stride_b + p * f_stride_p + t64 * f_stride_t + i_h * f_stride_h
    p_f += o_t[:, None] * f_stride_t + o_k[None, :]
    p_q = q_ptr + b * q_stride_b + p * q_stride_p + t64 * q_stride_t + i_h * q_stride_h
    p_q += o_t[:, None] * q_stride_t + o_k[None, :]
    p_s = p_ch * K * K + o_k[:, None] * K
    p_s2 = p_ch2 * K * K + o_k[:, None] * K
    b_f = finite(tl.load(p_f, mask=m_real, other=100.0))
    b_diag = tl.load(diag_ptr + p_ch * C + o_c)[:, None]
    gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
    eye = load_mask(mask_ptr, 0, C)
    zero = tl.zeros([C, BK], dtype=tl.float32)

    p_mask = o_c[None, :] * C + o_c[:, None]
    b_dq, b_dk, b_cross = state_gradients(
        p_v, p_do, p_s, states_ptr, dstates_ptr, m_real, C, K, BK, BV, V_ACT, PRECISION, STAGES
    )
    b_dq, b_dk, b_dg = _one(
        qx_ptr, kx_ptr, ex_ptr, da_ptr, p_ch * C * K + o_c[:, None] * K + o_k[None, :],
        p_ch * C * C + o_c[:, None] * C + o_c[None, :], b_dq, b_dk, b_diag, eye, load_mask(mask_ptr, 1, C),
        load_mask(mask_ptr, 2, C), zero, C, BK, PRECISION, SPLIT, SUM_SPLIT,
    )  # fmt: skip
    b_dq2, b_dk2, b_cross2 = state_gradients(
        p_v, p_do, p_s2, states2_ptr, dstates2_ptr, m_real, C, K, BK, BV, V_ACT, PRECISION, STAGES
    )
    b_cross += b_cross2
    b_dq2, b_dk2, b_dg = _one(
        qx2_ptr, kx2_ptr, ex2_ptr, da2_ptr, p_ch2 * C * K + o_r[:, None] * K + o_k[None, :],
        p_ch2 * C * C + o_r[:, None] * C + o_r[None, :], b_dq2, b_dk2, b_diag, eye,
        tl.load(mask_ptr + C * C + p_mask), tl.load(mask_ptr + 2 * C * C + p_mask), b_dg, C, BK, PRECISION, SPLIT,
        SUM_SPLIT,
    )  # fmt: skip
    b_dq += b_dq2
    b_dk += b_dk2
    if Q_ACT != 0:
        b_dq *= activate_grad_tile(tl.load(p_q, mask=m_real, other=0.0).to(tl.float32), Q_ACT)
    p_out = b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K + o_t[:, None] * g_stride_t + o_k[None, :]
    if ADD:
        b_dq += tl.load(dq_ptr + p_out, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(dq_ptr + p_out, b_dq.to(dq_ptr.dtype.element_ty), mask=m_in[:, None])
    b_dg += b_cross[None, :]
    b_df, b_bound = logit_gradient(to_accumulator(b_f, eye), gamma, b_dg, b_dk, m_real, HAS_LB, PRECISION)
    if LB_GRAD:
        tl.store(dlb_ptr + p_ch * K + o_k, b_bound)
    if ADD:
        b_df += tl.load(df_ptr + p_out, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(df_ptr + p_out, b_df.to(df_ptr.dtype.element_ty), mask=m_in[:, None])
