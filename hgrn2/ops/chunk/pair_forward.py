"""Both directions of the chunked scan at once, as they share tokens, gates, and the sums of their outputs.

Names that end in 2 are of the scan back, which runs from the last token to the first. Its chunks, rows and tables are
those of the scan ahead; total and safe serve both. Where `common` has the sum G up to a token, here is the one
before it, E = G - g, and fast chunks have their factors relative to the chunk's start, which that scan comes to last:

    qx2 = q 2^-E,  kx2 = k 2^E        (safe: q 2^(total - E), k 2^E)

Then S2_0 = 2^total S2_C + kx2^T v: as for the gradient of a state of the scan ahead, and the gradient of S2 goes as a
state does there. `chunk_state_kernel` makes each in the other's place, so that states2, the states that enter from the
right, are the ones that carry scale. The scores A of both lie in one matrix, whose diagonal sums theirs:

    o  = qx S_0 + qx2 S2_C + A v        dv = kx dS_C + kx2 dS2_0 + A^T do        dA = do v^T, on either side

Shapes as in `common`.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk.backward import score_gradient
from hgrn2.ops.chunk.common import decay, locate, product, rounded, row_masks
from hgrn2.ops.gates import activate_grad_tile, activate_tile, gate_tile


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len", "keep"])
def chunk_pair_factor_kernel(
    q_ptr, f_ptr, lb_ptr, qx_ptr, kx_ptr, ex_ptr, qx2_ptr, kx2_ptr, total_ptr, safe_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h,
    T, NT, P, H, has_len, keep, fast_limit,
    K: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `chunk_factor_kernel`, of both scans."""
    WHOLE: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    n_h = (H + BH - 1) // BH
    i_b = tl.program_id(0) % n_h
    c = tl.program_id(0) // n_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, 1, has_len, C, VARLEN)
    o_n = tl.arange(0, BH * K)
    o_h = (i_b * BH + o_n // K).to(tl.int64)
    o_k = o_n % K
    m_h = o_h < H
    o_c = tl.arange(0, BT)
    p_q = q_ptr + b * q_stride_b + p * q_stride_p + t0.to(tl.int64) * q_stride_t + (o_h * q_stride_h + o_k)[None, :]
    p_f = f_ptr + b * f_stride_b + p * f_stride_p + t0.to(tl.int64) * f_stride_t + (o_h * f_stride_h + o_k)[None, :]
    p_ch = c.to(tl.int64) * H + o_h
    p_x = (p_ch * C * K + o_k)[None, :]
    gamma = tl.load(lb_ptr + o_h * K + o_k, mask=m_h, other=0.0)[None, :] if HAS_LB else 0.0
    m_x = m_h[None, :]
    m_keep = (m_h & (o_k < keep * K))[None, :]

    b_total = tl.zeros([BH * K], dtype=tl.float32)
    for r0 in tl.range(0, C, BT, num_stages=STAGES):
        o_r = r0 + o_c
        m_real = ((o_r < rows) & (t0 + o_r < length))[:, None] & m_h[None, :]
        # a padded token has k = 0 and lam = 1, which f = 100 gives
        b_f = tl.load(p_f + o_r[:, None] * f_stride_t, mask=m_real, other=100.0).to(tl.float32)
        b_q = tl.load(p_q + o_r[:, None] * q_stride_t, mask=m_real, other=0.0).to(tl.float32)
        _sigma, _minus, b_k, _lam, b_g = gate_tile(b_f, gamma, HAS_LB, WHOLE)
        b_sum = b_total[None, :] + tl.cumsum(b_g, axis=0)
        b_before = b_sum - b_g
        b_total += tl.sum(b_g, axis=0)
        b_e = decay(b_sum, PRECISION)
        if Q_ACT != 0:
            b_q = tl.where(m_real, activate_tile(b_q, Q_ACT), 0.0)
        p_r = p_x + o_r[:, None] * K
        b_x = rounded(b_q * b_e, PRECISION)
        tl.store(qx_ptr + p_r, b_x.to(qx_ptr.dtype.element_ty), mask=m_x)
        b_x = rounded(b_k * decay(-b_sum, PRECISION), PRECISION)
        tl.store(kx_ptr + p_r, b_x.to(kx_ptr.dtype.element_ty), mask=m_x)
        b_x = rounded(b_q * decay(-b_before, PRECISION), PRECISION)
        tl.store(qx2_ptr + p_r, b_x.to(qx_ptr.dtype.element_ty), mask=m_x)
        b_x = rounded(b_k * decay(b_before, PRECISION), PRECISION)
        tl.store(kx2_ptr + p_r, b_x.to(kx_ptr.dtype.element_ty), mask=m_x)
        tl.store(ex_ptr + p_r, b_e.to(ex_ptr.dtype.element_ty), mask=m_keep)
    tl.store(total_ptr + p_ch * K + o_k, b_total, mask=m_h)
    safe = tl.min(tl.reshape(b_total, [BH, K]), axis=1) <= -fast_limit
    p_head = i_b * BH + tl.arange(0, BH)
    tl.store(safe_ptr + c.to(tl.int64) * H + p_head, safe.to(tl.int32), mask=p_head < H)
    if tl.max(safe.to(tl.int32)) > 0:
        # summed anew: a difference of large sums would not do
        m_safe = tl.reshape(tl.broadcast_to(safe[:, None], [BH, K]), [BH * K]) & m_h
        b_after = tl.zeros([BH * K], dtype=tl.float32)
        for r0 in tl.range(0, C, BT):
            o_r = C - BT - r0 + o_c
            m_real = ((o_r < rows) & (t0 + o_r < length))[:, None] & m_safe[None, :]
            b_f = tl.load(p_f + o_r[:, None] * f_stride_t, mask=m_real, other=100.0).to(tl.float32)
            b_q = tl.load(p_q + o_r[:, None] * q_stride_t, mask=m_real, other=0.0).to(tl.float32)
            _sigma, _minus, _k, _lam, b_g = gate_tile(b_f, gamma, HAS_LB, WHOLE)
            b_sum = b_after[None, :] + tl.cumsum(b_g, axis=0, reverse=True)
            b_after += tl.sum(b_g, axis=0)
            if Q_ACT != 0:
                b_q = tl.where(m_real, activate_tile(b_q, Q_ACT), 0.0)
            b_x = rounded(b_q * decay(b_sum, PRECISION), PRECISION)
            tl.store(qx2_ptr + p_x + o_r[:, None] * K, b_x.to(qx_ptr.dtype.element_ty), mask=m_safe[None, :])


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len", "keep"])
def chunk_pair_out_kernel(
    qx_ptr, kx_ptr, states_ptr, qx2_ptr, kx2_ptr, states2_ptr, safe_ptr, a_ptr, v_ptr, o_ptr, table_ptr, len_ptr,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, o_stride_b, o_stride_p, o_stride_t,
    T, NT, P, H, has_len, keep,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, V_ACT: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs as `chunk_out_kernel`'s, of both scans."""
    pid = tl.program_id(0)
    i_v = pid % (K // BV)
    i_h = ((pid // (K // BV)) % H).to(tl.int64)
    c = pid // ((K // BV) * H)
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, 1, has_len, C, VARLEN)
    if rows <= 0:
        return
    p_ch = c.to(tl.int64) * H + i_h
    safe = tl.load(safe_ptr + p_ch) != 0
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, 1, C)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_tile = p_ch * C * K + o_c[:, None] * K
    p_s = p_ch * K * K + o_v[None, :]
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    b_o = tl.zeros([C, BV], dtype=tl.float32)
    b_a = tl.zeros([C, C], dtype=tl.float32)
    b_a2 = tl.zeros([C, C], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        b_x = tl.load(qx_ptr + p_tile + o_k[None, :])
        b_a = product(b_x, tl.trans(tl.load(kx_ptr + p_tile + o_k[None, :])), b_a, PRECISION)
        b_o = product(b_x, tl.load(states_ptr + p_s + o_k[:, None] * K), b_o, PRECISION)
        b_x = tl.load(qx2_ptr + p_tile + o_k[None, :])
        b_a2 = product(b_x, tl.trans(tl.load(kx2_ptr + p_tile + o_k[None, :])), b_a2, PRECISION)
        b_o = product(b_x, tl.load(states2_ptr + p_s + o_k[:, None] * K), b_o, PRECISION)
    p_a = a_ptr + p_ch * C * C + i * C + j
    b_a = tl.where(i >= j, b_a, 0.0) + tl.where(i <= j, b_a2, 0.0)
    if safe:
        b_a = tl.load(p_a).to(tl.float32)
    elif (keep != 0) & (i_v == 0):
        tl.store(p_a, b_a.to(a_ptr.dtype.element_ty))
    b_v = tl.load(p_v + o_v[None, :], mask=m_real[:, None], other=0.0)
    if V_ACT != 0:
        b_v = tl.where(m_real[:, None], activate_tile(b_v.to(tl.float32), V_ACT), 0.0)
    if PRECISION == "ieee":
        # apart: the terms of later tokens, ever smaller, would each round off the sum of all before
        b_o = product(tl.where(i >= j, b_a, 0.0), b_v, b_o, PRECISION)
        b_a = tl.where(i < j, b_a, 0.0)
    b_o = product(b_a, b_v, b_o, PRECISION)
    p_o = o_ptr + b * o_stride_b + p * o_stride_p + t64 * o_stride_t + i_h * K
    p_o += o_t[:, None] * o_stride_t + o_v[None, :]
    if ADD:
        b_o += tl.load(p_o, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_in[:, None])


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len"])
def chunk_pair_value_grad_kernel(
    kx_ptr, dstates_ptr, kx2_ptr, dstates2_ptr, a_ptr, da_ptr, diag_ptr, dlb_ptr, dlb2_ptr, v_ptr, do_ptr, dv_ptr,
    table_ptr, len_ptr,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b,
    g_stride_p, g_stride_t,
    T, NT, P, H, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, LB_GRAD: tl.constexpr,
    V_ACT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `chunk_value_grad_kernel`, of both scans; da_ptr takes the gradient of all scores."""
    pid = tl.program_id(0)
    i_v = pid % (K // BV)
    i_h = ((pid // (K // BV)) % H).to(tl.int64)
    c = pid // ((K // BV) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, 1, has_len, C, VARLEN)
    if LB_GRAD:  # noqa: SIM102 (constants and data kept apart)
        if i_v == 0:
            tl.store(dlb_ptr + p_ch * K + tl.arange(0, K), tl.zeros([K], dtype=tl.float32))
            tl.store(dlb2_ptr + p_ch * K + tl.arange(0, K), tl.zeros([K], dtype=tl.float32))
    if rows <= 0:
        return
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, 1, C)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_a = p_ch * C * C + i * C + j
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_do += o_t[:, None] * do_stride_t
    b_a = tl.load(a_ptr + p_a)
    b_do = tl.load(p_do + o_v[None, :], mask=m_real[:, None], other=0.0)
    b_dv = tl.zeros([C, BV], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        p_x = p_ch * C * K + o_c[:, None] * K + o_k[None, :]
        p_s = p_ch * K * K + o_k[:, None] * K + o_v[None, :]
        b_dv = product(tl.load(kx_ptr + p_x), tl.load(dstates_ptr + p_s), b_dv, PRECISION)
        b_dv = product(tl.load(kx2_ptr + p_x), tl.load(dstates2_ptr + p_s), b_dv, PRECISION)
    b_dv = product(tl.trans(b_a), b_do, b_dv, PRECISION)
    if V_ACT != 0:
        b_v = tl.load(p_v + o_v[None, :], mask=m_real[:, None], other=0.0).to(tl.float32)
        b_dv *= activate_grad_tile(b_v, V_ACT)
    b_dv = tl.where(m_real[:, None], b_dv, 0.0)
    p_out = dv_ptr + b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K
    p_out += o_t[:, None] * g_stride_t + o_v[None, :]
    if ADD:
        b_dv += tl.load(p_out, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(p_out, b_dv.to(dv_ptr.dtype.element_ty), mask=m_in[:, None])
    if i_v == 0:
        b_da, b_diag = score_gradient(p_do, p_v, m_real, C, K, BV, V_ACT, PRECISION)
        tl.store(da_ptr + p_a, b_da.to(da_ptr.dtype.element_ty))
        tl.store(diag_ptr + p_ch * C + o_c, b_diag)
