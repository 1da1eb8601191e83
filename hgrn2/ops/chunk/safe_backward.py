"""The gradients of q and f of safe chunks in Triton, by halves of 32 tokens (see `safe_forward` and `chunk.backward`).

Tiles are transposed, channels by tokens: see `transposed`. Sums of log2 lam are made within blocks of 16 tokens, up to
each token and after it, and only ever added to: the level where the blocks meet takes them as they are, and over the
half the other block's whole sum comes in addition (as a factor of the decay where 16-bit inputs allow the rounding).
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk.backward import logit_gradient
from hgrn2.ops.chunk.common import (
    BLOCK_LIMIT,
    backwards,
    decay,
    finite,
    locate,
    meeting_pairs,
    product,
    rounded,
    settle,
)
from hgrn2.ops.chunk.safe_forward import any_safe
from hgrn2.ops.chunk.transposed import (
    BLOCK_AFTER,
    BLOCK_LATER,
    BLOCK_UP_TO,
    CENTRED,
    EARLIER,
    EYE,
    LATER,
    LEVEL,
    gated_half,
    mask_copy,
    mask_parts,
    token_sum,
    transposed,
)
from hgrn2.ops.gates import activate_grad_tile, activate_tile


@triton.jit
def _output_state_products(
    p_s, p_do, p_other, p_y, m_real, m_other, act, M: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """S do^T and, if BOTH, the same of the other half's tokens at p_y (activated if `act`) and its state, `[BK, M]`."""
    b_dq = tl.zeros([BK, M], dtype=tl.float32)
    b_other = tl.zeros([BK, M], dtype=tl.float32)
    for v0 in tl.range(0, K, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)[None, :]
        b_dq = product(tl.load(p_s + o_v), tl.trans(tl.load(p_do + o_v, mask=m_real, other=0.0)), b_dq, PRECISION)
        if BOTH:
            b_y = tl.load(p_y + o_v, mask=m_other, other=0.0)
            if V_ACT != 0:
                b_y = b_y.to(tl.float32)
                b_y = tl.where(act, tl.where(m_other, activate_tile(b_y, V_ACT), 0.0), b_y)
            b_other = product(tl.load(p_other + o_v), tl.trans(b_y), b_other, PRECISION)
    return b_dq, b_other


@triton.jit
def _own(x, BK: tl.constexpr):
    """The diagonal of `[BK, BK]`, as `[BK, 1]`."""
    o_k = tl.arange(0, BK)
    return tl.sum(tl.where(o_k[:, None] == o_k[None, :], x, 0.0), axis=1)[:, None]


@triton.jit
def _value_state_product(
    p_s, p_ds, p_v, m_real, M: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    V_ACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dS v^T `[BK, M]` and sum_v S dS `[BK, 1]`: as the diagonal of S dS^T, less work than to add, or exactly."""
    DIAGONAL: tl.constexpr = PRECISION == "bf16" or PRECISION == "tf32"
    b_dk = tl.zeros([BK, M], dtype=tl.float32)
    b_all = tl.zeros([BK, BK], dtype=tl.float32)
    b_cross = tl.zeros([BK], dtype=tl.float32)
    for v0 in tl.range(0, K, BV, num_stages=STAGES):
        o_v = v0 + tl.arange(0, BV)[None, :]
        b_v = tl.load(p_v + o_v, mask=m_real, other=0.0)
        b_s = tl.load(p_s + o_v)
        b_ds = tl.load(p_ds + o_v)
        if V_ACT != 0:
            b_v = tl.where(m_real, activate_tile(b_v.to(tl.float32), V_ACT), 0.0)
        if DIAGONAL:
            b_all = product(b_s, tl.trans(b_ds), b_all, PRECISION)
        else:
            b_cross += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), axis=1)
        b_dk = product(b_ds, tl.trans(b_v), b_dk, PRECISION)
    return b_dk, _own(b_all, BK) if DIAGONAL else b_cross[:, None]


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
    SPLIT: tl.constexpr, ADD: tl.constexpr, PAIR: tl.constexpr, BACK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`chunk_grad_kernel` for half a chunk, of safe ones among GROUP chunks and heads; dlb_ptr has to hold zeros.

    PAIR: of two scans (see `pair_forward`), if BACK the one back.
    """
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    half = (pid // (K // BK)) % (C // 32)
    first = pid // (K // BK * (C // 32)) * GROUP
    until = tl.minimum(first + GROUP, NC * H)
    if not any_safe(safe_ptr, first, until):
        return
    zero_ = tl.minimum(T, 0)
    eyes = (
        mask_copy(mask_ptr, EYE, 0, zero_, 32), mask_copy(mask_ptr, EYE, 1, zero_, 32),
        mask_copy(mask_ptr, EYE, 2, zero_, 32), mask_copy(mask_ptr, EYE, 3, zero_, 32),
    )  # fmt: skip
    masks = (
        mask_parts(mask_ptr, CENTRED, zero_, 32), mask_parts(mask_ptr, BLOCK_LATER, zero_, 32),
        mask_parts(mask_ptr, BLOCK_UP_TO, zero_, 32), mask_parts(mask_ptr, BLOCK_AFTER, zero_, 32),
        mask_parts(mask_ptr, LEVEL + 4, zero_, 32), mask_parts(mask_ptr, LATER, zero_, 32),
        mask_parts(mask_ptr, EARLIER, zero_, 32),
    )  # fmt: skip
    for n in tl.range(first, until, num_stages=1, disable_licm=STAGES > 1):
        flag = tl.load(safe_ptr + n)
        # a branch, but as a loop: masks are kept out of loops, not out of branches
        for once in tl.range(0, flag, num_stages=1, disable_licm=STAGES > 1):
            _safe_gradients(
                qx_ptr, kx_ptr, x_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, total_ptr, states_ptr,
                dstates_ptr, da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr, q_stride_b, q_stride_p,
                q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b, v_stride_p,
                v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
                g_stride_t, T, NT, P, H, sign, has_len, n + once, once, half, i_k, eyes, masks, K, BK, BV, C, SUB,
                VARLEN, HAS_LB, LB_GRAD, Q_ACT, V_ACT, PRECISION, SPLIT, ADD, PAIR, BACK, STAGES,
            )  # fmt: skip


@triton.jit
def _safe_gradients(
    qx_ptr, kx_ptr, x_ptr, q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, mask_ptr, total_ptr, states_ptr, dstates_ptr,
    da_ptr, diag_ptr, dq_ptr, df_ptr, dlb_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h, v_stride_b,
    v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h, g_stride_b, g_stride_p,
    g_stride_t,
    T, NT, P, H, sign, has_len, pid, zero_, half, i_k, eyes, masks,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LB: tl.constexpr, LB_GRAD: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, ADD: tl.constexpr, PAIR: tl.constexpr, BACK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    SUM_SPLIT: tl.constexpr = 1 if PRECISION == "bf16" else SPLIT
    EXACT: tl.constexpr = PRECISION == "tf32x3" or PRECISION == "ieee"
    M: tl.constexpr = 32
    # a zero that the compiler does not know of: what depends on it stays in the loop, where registers are short
    mask_ptr += zero_ * 16
    i_h = (pid % H).to(tl.int64)
    c = pid // H
    p_ch = c.to(tl.int64) * H + i_h
    way = 1 if BACK else sign
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, way, has_len, C, VARLEN)
    t0 += rows - 1 if BACK else 0
    t64 = t0.to(tl.int64)
    o_m = tl.arange(0, M) + zero_
    i = o_m[:, None]
    j = tl.arange(0, M)[None, :] + zero_ * 16
    o_r = half * M + o_m
    o_t = o_r * sign
    m_in = (o_r < rows)[:, None]
    real = (o_r < rows) & (t0 + o_t < length)
    m_real = real[:, None]
    o_k = i_k * BK + tl.arange(0, BK)
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h
    p_do = do_ptr + b * do_stride_b + p * do_stride_p + t64 * do_stride_t + i_h * do_stride_h
    p_s = p_ch * K * K + o_k[:, None] * K
    p_f = f_ptr + b * f_stride_b + p * f_stride_p + t64 * f_stride_t + i_h * f_stride_h + o_k[None, :]
    p_q = q_ptr + b * q_stride_b + p * q_stride_p + t64 * q_stride_t + i_h * q_stride_h + o_k[None, :]
    p_da = da_ptr + p_ch * C * C
    gamma = tl.load(lb_ptr + i_h * K + o_k)[:, None] if HAS_LB else 0.0
    b_total = tl.load(total_ptr + p_ch * K + o_k)[:, None]
    if BACK:
        p_own_da = p_da + backwards(half * M + i, rows, C) * C + backwards(half * M + j, rows, C)
        b_diag = tl.load(diag_ptr + p_ch * C + backwards(o_r, rows, C))[None, :]
    else:
        p_own_da = p_da + half * (M * C + M) + i * C + j
        b_diag = tl.load(diag_ptr + p_ch * C + o_r)[None, :]
    b_da = tl.load(p_own_da)
    if PAIR:
        b_da = tl.where(i > j, b_da, 0.0)
    zero = tl.zeros([BK, M], dtype=tl.float32)
    centred, block_later, block_up_to, block_after, level, later, earlier = masks
    b_q, b_k, b_g = gated_half(
        p_q, p_f, q_stride_t, f_stride_t, o_r, t0, rows, length, sign, gamma, eyes, HAS_LB, Q_ACT, EXACT
    )
    e_m = tl.arange(0, M)

    if SUB > 0:
        b_e = token_sum(tl.maximum(b_g, -BLOCK_LIMIT), centred, zero, SPLIT)
        b_back = decay(-b_e, PRECISION)
        b_e = decay(b_e, PRECISION)
        b_pair = tl.where((e_m[:, None] >> SUB) == (e_m[None, :] >> SUB), b_da, 0.0)
        b_qx = rounded(b_q * b_e, PRECISION)
        b_kx = rounded(b_k * b_back, PRECISION)
        b_dqx = product(b_kx, tl.trans(b_pair), zero, PRECISION)
        b_block = settle(b_qx.to(tl.float32) * b_dqx)
        b_dq = settle(b_diag * b_k + b_dqx * b_e)
        b_dkx = product(b_qx, b_pair, zero, PRECISION)
        b_block = settle(b_block - b_kx.to(tl.float32) * b_dkx)
        b_dk = settle(b_diag * b_q + b_dkx * b_back)
        # every pair that crosses a token has its decay as a factor
        b_dg = token_sum(b_block, block_later, zero, SPLIT) * decay(tl.minimum(b_g + BLOCK_LIMIT, 0.0), PRECISION)
    else:
        b_dq = b_diag * b_k
        b_dk = b_diag * b_q
        b_dg = zero
    b_pairs = b_da + tl.trans(b_da)
    for shift in tl.range(SUB, 4, num_stages=1):
        # one factor a token: q in second halves, k in first ones
        second = ((e_m >> shift) & 1)[None, :] == 1
        mask = mask_copy(mask_ptr, LEVEL + 5 + shift, 0, 0, M)
        b_e = decay(token_sum(b_g, (mask, mask, mask), zero, SPLIT), PRECISION)
        b_x = tl.where(second, b_q, b_k) * b_e
        b_dx = product(b_x, tl.where(meeting_pairs(shift, M), b_pairs, 0.0), zero, PRECISION)
        mask = mask_copy(mask_ptr, LEVEL + shift, 0, 0, M)
        b_dg = token_sum(b_x * b_dx, (mask, mask, mask), b_dg, SUM_SPLIT)
        b_dx *= b_e
        b_dq += tl.where(second, b_dx, 0.0)
        b_dk += tl.where(second, 0.0, b_dx)
    late = e_m[None, :] >= 16
    b_low = tl.sum(tl.where(late, 0.0, b_g), axis=1)[:, None]
    b_high = tl.sum(tl.where(late, b_g, 0.0), axis=1)[:, None]
    b_up_to = token_sum(b_g, block_up_to, zero, SPLIT)
    b_after = token_sum(b_g, block_after, zero, SPLIT)
    if EXACT:
        b_e = decay(tl.where(late, b_up_to, b_after), PRECISION)
        b_up_to = decay(tl.where(late, b_up_to + b_low, b_up_to), PRECISION)
        b_after = decay(tl.where(late, b_after, b_after + b_high), PRECISION)
    else:
        b_up_to = decay(b_up_to, PRECISION)
        b_after = decay(b_after, PRECISION)
        b_e = tl.where(late, b_up_to, b_after)
        b_up_to = tl.where(late, b_up_to * decay(b_low, PRECISION), b_up_to)
        b_after = tl.where(late, b_after, b_after * decay(b_high, PRECISION))
    b_x = tl.where(late, b_q, b_k) * b_e
    # the pairs of both blocks, from either side
    b_pair = tl.where((e_m[:, None] >= 16) & (e_m[None, :] < 16), b_da, 0.0)
    b_dx = product(b_x, b_pair, product(b_x, tl.trans(b_pair), zero, PRECISION), PRECISION)
    b_dg = token_sum(b_x * b_dx, level, b_dg, SUM_SPLIT)
    b_dx *= b_e
    # settled, as all that led to them would else wait in registers for their use below
    b_dq = settle(b_dq + tl.where(late, b_dx, 0.0))
    b_dk = settle(b_dk + tl.where(late, 0.0, b_dx))
    b_up_to = settle(b_up_to)
    b_after = settle(b_after)

    p_own = p_do + o_t[:, None] * do_stride_t
    # what comes after the products with states is asked for ahead of them
    b_raw = tl.load(p_q + o_t[:, None] * q_stride_t, mask=m_real, other=0.0) if Q_ACT != 0 else o_t
    if C > M:
        is_second = half == 1
        o_other = (1 - half) * M + o_m
        t_other = (o_other * sign)[:, None]
        m_other = (o_other < rows)[:, None] & (t0 + t_other < length)
        p_other = p_ch * C * K + o_other[:, None] * K + o_k[None, :]
        p_across = p_da + M * C + i * C + j
        p_factor = x_ptr + p_other
        if BACK:
            p_across = p_da + backwards(M + i, rows, C) * C + backwards(j, rows, C)
            p_other = p_ch * C * K + backwards(o_other, rows, C)[:, None] * K + o_k[None, :]
        b_across = tl.load(p_across)
        b_factor = tl.load(p_factor)
        b_other = tl.load(tl.where(is_second, kx_ptr, qx_ptr) + p_other)
        p_y = tl.where(is_second, p_v, p_do) + t_other * tl.where(is_second, v_stride_t, do_stride_t)
        b_dqx, b_y = _output_state_products(
            states_ptr + p_s, p_own, tl.where(is_second, dstates_ptr, states_ptr) + p_s, p_y, m_real, m_other,
            is_second, M, K, BK, BV, V_ACT, PRECISION, STAGES, True,
        )  # fmt: skip
        # what the other half's tokens pass on through a state: sum_i x_i (S y^T)_i
        b_cross = _own(product(b_y, b_other, tl.zeros([BK, BK], dtype=tl.float32), PRECISION), BK)
        b_pair = tl.where(is_second, tl.trans(b_across), b_across)
        b_dx = product(tl.trans(b_factor), b_pair, zero, PRECISION)
        b_rest = decay(tl.minimum(b_total - (b_low + b_high), 0.0), PRECISION)
        b_dqx = tl.where(is_second, b_dqx * b_rest + b_dx, b_dqx)
    else:
        b_cross = tl.zeros([BK, 1], dtype=tl.float32)
        b_dqx, _b_y = _output_state_products(
            states_ptr + p_s, p_own, p_s, p_own, m_real, m_real, False, M, K, BK, BV, V_ACT, PRECISION, STAGES, False
        )
    b_dqx *= b_up_to
    b_dg = token_sum(b_q * b_dqx, later, b_dg, SUM_SPLIT)
    b_dq += b_dqx
    p_out = b * g_stride_b + p * g_stride_p + t64 * g_stride_t + i_h * K + o_t[:, None] * g_stride_t + o_k[None, :]
    if Q_ACT != 0:
        b_dq *= activate_grad_tile(transposed(b_raw, eyes[2]), Q_ACT)
    b_dq = tl.trans(b_dq)
    if ADD:
        b_dq += tl.load(dq_ptr + p_out, mask=m_in, other=0.0).to(tl.float32)
    tl.store(dq_ptr + p_out, b_dq.to(dq_ptr.dtype.element_ty), mask=m_in)

    # loaded once more: these gates would take registers all along
    b_f = tl.load(p_f + o_t[:, None] * f_stride_t, mask=m_real, other=100.0)
    b_dkx, b_states = _value_state_product(
        states_ptr + p_s, dstates_ptr + p_s, p_v + o_t[:, None] * v_stride_t, m_real, M, K, BK, BV, V_ACT, PRECISION,
        STAGES,
    )  # fmt: skip
    if C > M:
        b_dkx = tl.where(is_second, b_dkx, b_dkx * b_rest + b_dx)
    b_dkx *= b_after
    b_dg = token_sum(b_k * b_dkx, earlier, b_dg, SUM_SPLIT)
    b_dg += b_cross + b_states * decay(b_total, PRECISION)
    b_dk = settle(b_dk + b_dkx)
    b_f = transposed(finite(b_f), eyes[3])
    b_df, b_bound = logit_gradient(b_f, gamma, b_dg, b_dk, real[None, :], HAS_LB, PRECISION, 1)
    if LB_GRAD:  # of two terms, so that their order does not matter
        tl.atomic_add(dlb_ptr + p_ch * K + o_k, b_bound, sem="relaxed")
    b_df = tl.trans(b_df)
    if ADD:
        b_df += tl.load(df_ptr + p_out, mask=m_in, other=0.0).to(tl.float32)
    tl.store(df_ptr + p_out, b_df.to(df_ptr.dtype.element_ty), mask=m_in)
