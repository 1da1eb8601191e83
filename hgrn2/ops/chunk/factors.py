"""The decay factors of the chunked Triton scan: gates, activation of q and decay sums, once for all later kernels."""

import triton
import triton.language as tl

from hgrn2.ops.chunk.common import decay, locate, rounded
from hgrn2.ops.gates import activate_tile, gate_tile


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "sign", "has_len", "keep"])
def chunk_factor_kernel(
    q_ptr, f_ptr, lb_ptr, qx_ptr, kx_ptr, ex_ptr, qf_ptr, total_ptr, safe_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h,
    T, NT, P, H, sign, has_len, keep, fast_limit,
    K: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of BH heads, BT tokens at a time: qx, kx, ex = 2^G, total `[NC, H, K]`, safe `[NC, H]` (0 or 1).

    ex is for the backward: left out if keep is 0. EXACT: qx unrounded too, in qf_ptr. Safe chunks get their kx later.
    """
    WHOLE: tl.constexpr = EXACT or PRECISION == "tf32x3" or PRECISION == "ieee"
    n_h = (H + BH - 1) // BH
    i_b = tl.program_id(0) % n_h
    c = tl.program_id(0) // n_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C, VARLEN)
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
        o_t = o_r * sign
        m_real = ((o_r < rows) & (t0 + o_t < length))[:, None] & m_h[None, :]
        # a padded token has k = 0 and lam = 1, which f = 100 gives
        b_f = tl.load(p_f + o_t[:, None] * f_stride_t, mask=m_real, other=100.0).to(tl.float32)
        b_q = tl.load(p_q + o_t[:, None] * q_stride_t, mask=m_real, other=0.0).to(tl.float32)
        _sigma, _minus, b_k, _lam, b_g = gate_tile(b_f, gamma, HAS_LB, WHOLE)
        b_sum = b_total[None, :] + tl.cumsum(b_g, axis=0)
        b_total += tl.sum(b_g, axis=0)
        b_e = decay(b_sum, "ieee" if WHOLE else PRECISION)
        if Q_ACT != 0:
            b_q = tl.where(m_real, activate_tile(b_q, Q_ACT), 0.0)
        b_q = b_q * b_e
        b_k = b_k * decay(-b_sum, PRECISION)
        if EXACT:
            tl.store(qf_ptr + p_x + o_r[:, None] * K, b_q, mask=m_x)
        b_q = rounded(b_q, PRECISION)
        b_k = rounded(b_k, PRECISION)
        tl.store(qx_ptr + p_x + o_r[:, None] * K, b_q.to(qx_ptr.dtype.element_ty), mask=m_x)
        tl.store(kx_ptr + p_x + o_r[:, None] * K, b_k.to(kx_ptr.dtype.element_ty), mask=m_x)
        tl.store(ex_ptr + p_x + o_r[:, None] * K, b_e.to(ex_ptr.dtype.element_ty), mask=m_keep)
    tl.store(total_ptr + p_ch * K + o_k, b_total, mask=m_h)
    lowest = tl.min(tl.reshape(b_total, [BH, K]), axis=1)
    safe = lowest <= -fast_limit
    p_head = i_b * BH + tl.arange(0, BH)
    tl.store(safe_ptr + c.to(tl.int64) * H + p_head, safe.to(tl.int32), mask=p_head < H)
