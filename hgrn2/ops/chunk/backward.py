"""The backward of the chunked scan in Triton: gradients of v, q and f of one chunk from the states on both its sides.

Shapes and the factors qx, kx and scale as in `common`. S is the state entering the chunk, dS the gradient of the
one leaving it; A the scores, dA = do v^T. In terms of the factors, "intra" over pairs i > j:

    dv  = kx (scale dS) + A^T do
    dqx = do S^T + dA kx (intra)                   dq = 2^G dqx + dA_ii k_i
    dkx = v (scale dS)^T + dA^T qx (intra)         dk = 2^-G dkx + dA_jj q_j       (2^R in the place of 2^-G where safe)

The gradient of log lam_t gathers what crosses t: qx dqx through the state from tokens at or after t, kx dkx through the
state from tokens before t, the state that crosses the whole chunk, and every intra pair i >= t > j. Sums that only add
crossing terms lose nothing to cancellation; fast chunks, and safe ones within blocks, take the last kind as a
difference of qx dqx and kx dkx summed from the end, where pairs on one side of t cancel: exactly so only if both are
made of the same rounded factors. The diagonal has no decay and is left out of both.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk.common import finite, load_mask, locate, masked_sum, product, row_masks, to_accumulator
from hgrn2.ops.gates import activate_grad_tile, activate_tile, exact_reciprocal, fast_reciprocal, gate_tile


@triton.jit
def score_gradient(
    p_do, p_v, m_real, C: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr
):
    """do v^T `[C, C]`, and its diagonal `[C]`."""
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    o_c = tl.arange(0, C)
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
        b_diag = tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_da, 0.0), axis=1)
    return b_da, b_diag


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "sign", "has_len"])
def chunk_value_grad_kernel(
    kx_ptr, v_ptr, do_ptr, a_ptr, dstates_ptr, dv_ptr, da_ptr, diag_ptr, dlb_ptr, table_ptr, len_ptr,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b,
    g_stride_p, g_stride_t,
    T, NT, P, H, sign, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, LB_GRAD: tl.constexpr,
    V_ACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv `[B, P, T, H, V]` of one chunk, head and tile of BV value channels.

    da_ptr `[NC, H, C, C]` and diag_ptr `[NC, H, C]` take the scores' gradient below the diagonal and on it.
    dlb_ptr `[NC, H, K]` is set to 0 for the kernels that follow.
    """
    pid = tl.program_id(0)
    i_v = pid % (K // BV)
    i_h = ((pid // (K // BV)) % H).to(tl.int64)
    c = pid // ((K // BV) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C, VARLEN)
    if LB_GRAD:  # noqa: SIM102 (constants and data kept apart)
        if i_v == 0:
            tl.store(dlb_ptr + p_ch * K + tl.arange(0, K), tl.zeros([K], dtype=tl.float32))
    if rows <= 0:
        return
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, sign, C)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_do += o_t[:, None] * do_stride_t
    b_a = tl.load(a_ptr + p_ch * C * C + i * C + j)
    b_do = tl.load(p_do + o_v[None, :], mask=m_real[:, None], other=0.0)
    b_dv = tl.zeros([C, BV], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        b_x = tl.load(kx_ptr + p_ch * C * K + o_c[:, None] * K + o_k[None, :])
        b_s = tl.load(dstates_ptr + p_ch * K * K + o_k[:, None] * K + o_v[None, :])
        b_dv = product(b_x, b_s, b_dv, PRECISION)
    b_dv = product(tl.trans(b_a), b_do, b_dv, PRECISION)
    if V_ACT != 0:
        b_v = tl.load(p_v + o_v[None, :], mask=m_real[:, None], other=0.0).to(tl.float32)
        b_dv *= activate_grad_tile(b_v, V_ACT)
    b_dv = tl.where(m_real[:, None], b_dv, 0.0)
    p_out = dv_ptr + b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K
    p_out += o_t[:, None] * g_stride_t + o_v[None, :]
    tl.store(p_out, b_dv.to(dv_ptr.dtype.element_ty), mask=m_in[:, None])
    if i_v == 0:
        b_da, b_diag = score_gradient(p_do, p_v, m_real, C, K, BV, V_ACT, PRECISION)
        tl.store(da_ptr + p_ch * C * C + i * C + j, tl.where(i > j, b_da, 0.0).to(da_ptr.dtype.element_ty))
        tl.store(diag_ptr + p_ch * C + o_c, b_diag)


@triton.jit
def state_gradients(
    p_v, p_do, p_s, states_ptr, dstates_ptr, m_real, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What crosses the chunk's ends: do S^T and v dS^T `[C, BK]`, and sum_v S dS `[BK]`."""
    b_dq = tl.zeros([C, BK], dtype=tl.float32)
    b_dk = tl.zeros([C, BK], dtype=tl.float32)
    b_cross = tl.zeros([BK], dtype=tl.float32)
    for v0 in tl.range(0, K, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)[None, :]
        b_v = tl.load(p_v + o_v, mask=m_real, other=0.0)
        b_do = tl.load(p_do + o_v, mask=m_real, other=0.0)
        b_s = tl.load(states_ptr + p_s + o_v)
        b_ds = tl.load(dstates_ptr + p_s + o_v)
        if V_ACT != 0:
            b_v = tl.where(m_real, activate_tile(b_v.to(tl.float32), V_ACT), 0.0)
        b_cross += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
        b_dq = product(b_do, tl.trans(b_s), b_dq, PRECISION)
        b_dk = product(b_v, tl.trans(b_ds), b_dk, PRECISION)
    return b_dq, b_dk, b_cross


@triton.jit
def logit_gradient(
    b_f, gamma, b_dg, b_dk, m_real, HAS_LB: tl.constexpr, PRECISION: tl.constexpr, AXIS: tl.constexpr = 0
):
    """df from the gradients of log lam and k, and the tile's share of d lower_bound, summed over tokens' axis."""
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    sigma, minus, _k, lam, _g = gate_tile(b_f, gamma, HAS_LB, EXACT)
    if HAS_LB:
        lam = tl.maximum(lam, 1e-37)
        b_dg = b_dg * (exact_reciprocal(lam) if EXACT else fast_reciprocal(lam)) - b_dk
        b_df = minus * sigma * (1.0 - gamma) * b_dg
    else:
        b_df = minus * (b_dg - sigma * b_dk)
    b_bound = tl.sum(tl.where(m_real, b_dg * minus, 0.0), axis=AXIS)
    return tl.where(m_real, b_df, 0.0), b_bound


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "sign", "has_len"])
def chunk_grad_kernel(
    qx_ptr, kx_ptr, ex_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, safe_ptr, states_ptr, dstates_ptr,
    da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b,
    v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
    g_stride_t,
    T, NT, P, H, sign, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, HAS_LB: tl.constexpr,
    LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dq, df `[B, P, T, H, K]` of one fast chunk, head and tile of BK channels.

    dlb_ptr `[NC, H, K]` takes the chunk's share of d lower_bound.
    """
    # sums that do not cancel need no more bits than the bf16 products in them
    SUM_SPLIT: tl.constexpr = 1 if PRECISION == "bf16" else SPLIT
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    i_h = ((pid // (K // BK)) % H).to(tl.int64)
    c = pid // ((K // BK) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C, VARLEN)
    if (rows <= 0) | (tl.load(safe_ptr + p_ch) != 0):
        return
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, sign, C)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_do += o_t[:, None] * do_stride_t
    p_s = p_ch * K * K + o_k[:, None] * K
    p_f = (
        f_ptr
        + b * f_stride_b
        + p * f_stride_p
        + t64 * f_stride_t
        + i_h * f_stride_h
        + o_t[:, None] * f_stride_t
        + o_k[None, :]
    )
    p_q = (
        q_ptr
        + b * q_stride_b
        + p * q_stride_p
        + t64 * q_stride_t
        + i_h * q_stride_h
        + o_t[:, None] * q_stride_t
        + o_k[None, :]
    )
    p_tile = p_ch * C * K + o_c[:, None] * K + o_k[None, :]
    # all loads come first, so that they overlap
    b_f = finite(tl.load(p_f, mask=m_real[:, None], other=100.0))
    b_da = tl.load(da_ptr + p_ch * C * C + o_c[:, None] * C + o_c[None, :])
    b_diag = tl.load(diag_ptr + p_ch * C + o_c)[:, None]
    gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
    b_qt = tl.load(qx_ptr + p_tile)
    b_kt = tl.load(kx_ptr + p_tile)
    b_et = tl.load(ex_ptr + p_tile)
    eye = load_mask(mask_ptr, 0, C)
    later = load_mask(mask_ptr, 1, C)
    earlier = load_mask(mask_ptr, 2, C)
    zero = tl.zeros([C, BK], dtype=tl.float32)

    b_dq, b_dk, b_cross = state_gradients(
        p_v, p_do, p_s, states_ptr, dstates_ptr, m_real[:, None], C, K, BK, BV, V_ACT, PRECISION, STAGES
    )
    b_dq = product(b_da, b_kt, b_dq, PRECISION)
    b_inner = product(tl.trans(b_da), b_qt, zero, PRECISION)
    b_qx = to_accumulator(b_qt, eye)
    b_kx = to_accumulator(b_kt, eye)
    b_dg = masked_sum(later, b_qx * b_dq - b_kx * b_inner, zero, SPLIT)
    b_dg = masked_sum(earlier, b_kx * b_dk, b_dg, SUM_SPLIT)
    # k = 2^G kx and q = 2^-G qx
    b_e = to_accumulator(b_et, eye)
    b_dq = (b_dq + b_diag * b_kx) * b_e
    b_dk = (b_dk + b_inner + b_diag * b_qx) * (
        exact_reciprocal(b_e) if b_et.dtype == tl.float32 else fast_reciprocal(b_e)
    )
    if Q_ACT != 0:
        b_dq *= activate_grad_tile(tl.load(p_q, mask=m_real[:, None], other=0.0).to(tl.float32), Q_ACT)
    p_out = b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K + o_t[:, None] * g_stride_t + o_k[None, :]
    tl.store(dq_ptr + p_out, b_dq.to(dq_ptr.dtype.element_ty), mask=m_in[:, None])
    b_dg += b_cross[None, :]
    b_f = to_accumulator(b_f, eye)
    b_df, b_bound = logit_gradient(b_f, gamma, b_dg, b_dk, m_real[:, None], HAS_LB, PRECISION)
    if LB_GRAD:
        tl.store(dlb_ptr + p_ch * K + o_k, b_bound)
    tl.store(df_ptr + p_out, b_df.to(df_ptr.dtype.element_ty), mask=m_in[:, None])


@triton.jit(do_not_specialize=["N", "M", "L"])
def row_sum_kernel(shares_ptr, sum_ptr, N, M, L, BM: tl.constexpr, BN: tl.constexpr):
    """Sums of each L rows of `[N, M]` to `[N / L, M]`, fp32; BM columns a program, BN rows at a time."""
    n_m = (M + BM - 1) // BM
    o_m = tl.program_id(0) % n_m * BM + tl.arange(0, BM)
    first = tl.program_id(0) // n_m * L
    until = tl.minimum(first + L, N)
    total = tl.zeros([BM], dtype=tl.float32)
    for n0 in tl.range(first, until, BN):
        o_n = n0 + tl.arange(0, BN)
        inside = (o_n < until)[:, None] & (o_m < M)[None, :]
        total += tl.sum(
            tl.load(shares_ptr + o_n[:, None].to(tl.int64) * M + o_m[None, :], mask=inside, other=0.0), axis=0
        )
    tl.store(sum_ptr + tl.program_id(0) // n_m * M + o_m, total, mask=o_m < M)
