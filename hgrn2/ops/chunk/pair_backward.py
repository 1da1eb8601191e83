"""The gradients of q and f of both directions of the chunked scan at once, in fast chunks; see `pair_forward`."""

import triton
import triton.language as tl

from hgrn2.ops.chunk.backward import logit_gradient
from hgrn2.ops.chunk.common import finite, load_mask, locate, masked_sum, product, row_masks, to_accumulator
from hgrn2.ops.gates import activate_grad_tile, activate_tile, exact_reciprocal, fast_reciprocal, gate_tile


@triton.jit
def _inverse(x, EXACT: tl.constexpr):
    return exact_reciprocal(x) if EXACT else fast_reciprocal(x)


@triton.jit
def _one(b_qt, b_kt, b_da, b_dq, b_dk, b_diag, eye, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Of one scan, from what states contribute to dqx and dkx and from the scores' gradient: dqx, dkx, and the two
    products with them that its gates' gradients are sums of."""
    b_dq = product(b_da, b_kt, b_dq, PRECISION)
    b_inner = product(tl.trans(b_da), b_qt, tl.zeros([C, BK], dtype=tl.float32), PRECISION)
    b_qx = to_accumulator(b_qt, eye)
    b_kx = to_accumulator(b_kt, eye)
    b_inside = b_qx * b_dq - b_kx * b_inner
    b_across = b_kx * b_dk
    return b_dq + b_diag * b_kx, b_dk + b_inner + b_diag * b_qx, b_inside, b_across


@triton.jit
def _sum(mask, x, acc, SPLIT: tl.constexpr):
    """`masked_sum`; of two parts as a loop, for what the kernel says of loops, the last part cut off, too."""
    if SPLIT != 2:
        return masked_sum(mask, x, acc, SPLIT)
    for _ in tl.range(0, SPLIT, num_stages=1):
        part = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        acc = tl.dot(mask, part.to(tl.bfloat16), acc)
        x = x - part
    return acc


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len"])
def chunk_pair_grad_kernel(
    qx_ptr, kx_ptr, ex_ptr, states_ptr, dstates_ptr, qx2_ptr, kx2_ptr, states2_ptr, dstates2_ptr, da_ptr, diag_ptr,
    safe_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b,
    v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
    g_stride_t,
    T, NT, P, H, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, HAS_LB: tl.constexpr,
    LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `chunk_grad_kernel`, of both scans; dlb_ptr, of the scan ahead, takes both shares."""
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    i_h = ((pid // (K // BK)) % H).to(tl.int64)
    c = pid // ((K // BK) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, 1, has_len, C, VARLEN)
    if (rows <= 0) | (tl.load(safe_ptr + p_ch) != 0):
        return
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
    p_tile = p_ch * C * K + o_c[:, None] * K + o_k[None, :]
    # all loads come first, so that they overlap
    b_f = finite(tl.load(p_f, mask=m_real, other=100.0))
    b_da = tl.load(da_ptr + p_ch * C * C + o_c[:, None] * C + o_c[None, :])
    b_qt = tl.load(qx_ptr + p_tile)
    b_kt = tl.load(kx_ptr + p_tile)
    b_qt2 = tl.load(qx2_ptr + p_tile)
    b_kt2 = tl.load(kx2_ptr + p_tile)
    b_et = tl.load(ex_ptr + p_tile)
    later = load_mask(mask_ptr, 1, C)
    earlier = load_mask(mask_ptr, 2, C)
    b_diag = tl.load(diag_ptr + p_ch * C + o_c)[:, None]
    gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
    eye = load_mask(mask_ptr, 0, C)
    zero = tl.zeros([C, BK], dtype=tl.float32)

    b_dq = tl.zeros([C, BK], dtype=tl.float32)
    b_dk = tl.zeros([C, BK], dtype=tl.float32)
    b_dq2 = tl.zeros([C, BK], dtype=tl.float32)
    b_dk2 = tl.zeros([C, BK], dtype=tl.float32)
    b_cross = tl.zeros([BK], dtype=tl.float32)
    for v0 in tl.range(0, K, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)[None, :]
        p_s = p_ch * K * K + o_k[:, None] * K + o_v
        b_v = tl.load(p_v + o_v, mask=m_real, other=0.0)
        b_do = tl.load(p_do + o_v, mask=m_real, other=0.0)
        if V_ACT != 0:
            b_v = tl.where(m_real, activate_tile(b_v.to(tl.float32), V_ACT), 0.0)
        b_s = tl.load(states_ptr + p_s)
        b_ds = tl.load(dstates_ptr + p_s)
        b_dq = product(b_do, tl.trans(b_s), b_dq, PRECISION)
        b_dk = product(b_v, tl.trans(b_ds), b_dk, PRECISION)
        b_cross += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
        b_s = tl.load(states2_ptr + p_s)
        b_ds = tl.load(dstates2_ptr + p_s)
        b_dq2 = product(b_do, tl.trans(b_s), b_dq2, PRECISION)
        b_dk2 = product(b_v, tl.trans(b_ds), b_dk2, PRECISION)
        b_cross += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)

    i = o_c[:, None]
    j = o_c[None, :]
    # loops of one round: where one product leads to another, the compiler would have each 4 of 8 warps make all of it
    once = tl.minimum(T, 1)
    b_later = zero
    b_earlier = zero
    for _ in tl.range(0, once, num_stages=1, disable_licm=True):
        b_dq, b_dk, b_later, b_earlier = _one(
            b_qt, b_kt, tl.where(i > j, b_da, 0.0), b_dq, b_dk, b_diag, eye, C, BK, PRECISION
        )
    b_dg = zero + b_cross[None, :]
    for _ in tl.range(0, once, num_stages=1, disable_licm=True):
        b_dq2, b_dk2, b_inside, b_across = _one(
            b_qt2, b_kt2, tl.where(i < j, b_da, 0.0), b_dq2, b_dk2, b_diag, eye, C, BK, PRECISION
        )
        # what the scan ahead sums from a token on, the scan back sums up to it
        b_dg += b_inside - b_across
        b_later += b_across
        b_earlier += b_inside
    b_dg = _sum(later, b_later, b_dg, SPLIT)
    b_dg = _sum(earlier, b_earlier, b_dg, SPLIT)
    b_f = to_accumulator(b_f, eye)
    _sigma, _minus, _k, lam, _g = gate_tile(b_f, gamma, HAS_LB, EXACT)
    # 2^G, and 2^-G; 2^E is 2^G / lam
    b_e = to_accumulator(b_et, eye)
    b_inverse = _inverse(b_e, EXACT)
    b_dq = b_dq * b_e + b_dq2 * (b_inverse * lam)
    b_dk = b_dk * b_inverse + b_dk2 * (b_e * _inverse(lam, EXACT))
    if Q_ACT != 0:
        b_dq *= activate_grad_tile(tl.load(p_q, mask=m_real, other=0.0).to(tl.float32), Q_ACT)
    p_out = b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K + o_t[:, None] * g_stride_t + o_k[None, :]
    if ADD:
        b_dq += tl.load(dq_ptr + p_out, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(dq_ptr + p_out, b_dq.to(dq_ptr.dtype.element_ty), mask=m_in[:, None])
    b_df, b_bound = logit_gradient(b_f, gamma, b_dg, b_dk, m_real, HAS_LB, PRECISION)
    if LB_GRAD:
        tl.store(dlb_ptr + p_ch * K + o_k, b_bound)
    if ADD:
        b_df += tl.load(df_ptr + p_out, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(df_ptr + p_out, b_df.to(df_ptr.dtype.element_ty), mask=m_in[:, None])
