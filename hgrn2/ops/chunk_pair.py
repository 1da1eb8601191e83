"""Both directions of the chunked scan at once: outputs and gradients of v, whose tokens both read and write.

A chunk and the one of the reverse scan that has the same tokens share a program. Names that end in 2 are the reverse
scan's, whose chunks hold their rows in its order (see `chunk_common.opposite`). With its scores A2 above the diagonal,

    o  = qx S_0 + qx2 S2_0 + (A + A2) v        dv = kx dS + kx2 dS2 + (A + A2)^T do        dA = do v^T, for both

Shapes as in `chunk_common`.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk_common import locate, opposite, product, row_masks
from hgrn2.ops.gates import activate_grad_tile, activate_tile


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len", "keep"])
def chunk_pair_out_kernel(
    qx_ptr, kx_ptr, safe_ptr, states_ptr, a_ptr, qx2_ptr, kx2_ptr, safe2_ptr, states2_ptr, a2_ptr, v_ptr, o_ptr,
    table_ptr, len_ptr,
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
    c2, o_r = opposite(c, table_ptr, rows, NT, C, VARLEN)
    p_ch = c.to(tl.int64) * H + i_h
    p_ch2 = c2.to(tl.int64) * H + i_h
    safe = tl.load(safe_ptr + p_ch) != 0
    safe2 = tl.load(safe2_ptr + p_ch2) != 0
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, 1, C)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_tile = p_ch * C * K + o_c[:, None] * K
    p_tile2 = p_ch2 * C * K + o_r[:, None] * K
    p_s = p_ch * K * K + o_v[None, :]
    p_s2 = p_ch2 * K * K + o_v[None, :]
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    b_o = tl.zeros([C, BV], dtype=tl.float32)
    b_a = tl.zeros([C, C], dtype=tl.float32)
    b_a2 = tl.zeros([C, C], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        b_x = tl.load(qx_ptr + p_tile + o_k[None, :])
        b_a = product(b_x, tl.trans(tl.load(kx_ptr + p_tile + o_k[None, :])), b_a, PRECISION)
        b_o = product(b_x, tl.load(states_ptr + p_s + o_k[:, None] * K), b_o, PRECISION)
        b_x = tl.load(qx2_ptr + p_tile2 + o_k[None, :])
        b_a2 = product(b_x, tl.trans(tl.load(kx2_ptr + p_tile2 + o_k[None, :])), b_a2, PRECISION)
        b_o = product(b_x, tl.load(states2_ptr + p_s2 + o_k[:, None] * K), b_o, PRECISION)
    p_a = a_ptr + p_ch * C * C + i * C + j
    p_a2 = a2_ptr + p_ch2 * C * C + o_r[:, None] * C + o_r[None, :]
    b_a = tl.where(i >= j, b_a, 0.0)
    if safe:
        b_a = tl.load(p_a).to(tl.float32)
    elif (keep != 0) & (i_v == 0):
        tl.store(p_a, b_a.to(a_ptr.dtype.element_ty))
    b_a2 = tl.where(i <= j, b_a2, 0.0)
    if safe2:
        b_a2 = tl.load(p_a2).to(tl.float32)
    elif (keep != 0) & (i_v == 0):
        tl.store(p_a2, b_a2.to(a_ptr.dtype.element_ty))
    b_v = tl.load(p_v + o_v[None, :], mask=m_real[:, None], other=0.0)
    if V_ACT != 0:
        b_v = tl.where(m_real[:, None], activate_tile(b_v.to(tl.float32), V_ACT), 0.0)
    b_o = product(b_a + b_a2, b_v, b_o, PRECISION)
    p_o = o_ptr + b * o_stride_b + p * o_stride_p + t64 * o_stride_t + i_h * K
    p_o += o_t[:, None] * o_stride_t + o_v[None, :]
    if ADD:
        b_o += tl.load(p_o, mask=m_in[:, None], other=0.0).to(tl.float32)
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_in[:, None])


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "has_len"])
def chunk_pair_value_grad_kernel(
    kx_ptr, a_ptr, dstates_ptr, da_ptr, diag_ptr, dlb_ptr, kx2_ptr, a2_ptr, dstates2_ptr, da2_ptr, diag2_ptr, dlb2_ptr,
    v_ptr, do_ptr, dv_ptr, table_ptr, len_ptr,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b,
    g_stride_p, g_stride_t,
    T, NT, P, H, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, LB_GRAD: tl.constexpr,
    V_ACT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `chunk_value_grad_kernel`, of both scans."""
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    pid = tl.program_id(0)
    i_v = pid % (K // BV)
    i_h = ((pid // (K // BV)) % H).to(tl.int64)
    c = pid // ((K // BV) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, 1, has_len, C, VARLEN)
    if LB_GRAD:  # noqa: SIM102 (constants and data kept apart)
        if i_v == 0:
            # of chunks, not of pairs: unused ones have no opposite
            tl.store(dlb_ptr + p_ch * K + tl.arange(0, K), tl.zeros([K], dtype=tl.float32))
            tl.store(dlb2_ptr + p_ch * K + tl.arange(0, K), tl.zeros([K], dtype=tl.float32))
    if rows <= 0:
        return
    c2, o_r = opposite(c, table_ptr, rows, NT, C, VARLEN)
    p_ch2 = c2.to(tl.int64) * H + i_h
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, 1, C)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_a = p_ch * C * C + i * C + j
    p_a2 = p_ch2 * C * C + o_r[:, None] * C + o_r[None, :]
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_do += o_t[:, None] * do_stride_t
    b_a = tl.load(a_ptr + p_a).to(tl.float32) + tl.load(a2_ptr + p_a2).to(tl.float32)
    b_do = tl.load(p_do + o_v[None, :], mask=m_real[:, None], other=0.0)
    b_dv = tl.zeros([C, BV], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        p_s = o_k[:, None] * K + o_v[None, :]
        b_x = tl.load(kx_ptr + p_ch * C * K + o_c[:, None] * K + o_k[None, :])
        b_dv = product(b_x, tl.load(dstates_ptr + p_ch * K * K + p_s), b_dv, PRECISION)
        b_x = tl.load(kx2_ptr + p_ch2 * C * K + o_r[:, None] * K + o_k[None, :])
        b_dv = product(b_x, tl.load(dstates2_ptr + p_ch2 * K * K + p_s), b_dv, PRECISION)
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
        b_da = tl.zeros([C, C], dtype=tl.float32)
        b_diag = tl.zeros([C], dtype=tl.float32)
        for v0 in range(0, K, BV):
            o_w = v0 + tl.arange(0, BV)[None, :]
            b_y = tl.load(p_do + o_w, mask=m_real[:, None], other=0.0)
            b_w = tl.load(p_v + o_w, mask=m_real[:, None], other=0.0)
            if V_ACT != 0:
                b_w = tl.where(m_real[:, None], activate_tile(b_w.to(tl.float32), V_ACT), 0.0)
            b_da = product(b_y, tl.trans(b_w), b_da, PRECISION)
            if EXACT:  # a sum rounds less than a product does
                b_diag += tl.sum(b_y * b_w, axis=1)
        if not EXACT:
            b_diag = tl.sum(tl.where(i == j, b_da, 0.0), axis=1)
        # rows without a token hold zeros, here as in the other order
        tl.store(da_ptr + p_a, tl.where(i > j, b_da, 0.0).to(da_ptr.dtype.element_ty))
        tl.store(da2_ptr + p_a2, tl.where(i < j, b_da, 0.0).to(da_ptr.dtype.element_ty))
        tl.store(diag_ptr + p_ch * C + o_c, b_diag)
        tl.store(diag2_ptr + p_ch2 * C + o_r, b_diag)
