"""The chunked scan in Triton: chunk states (forward and backward in time) and outputs.

Shapes, the factors qx, kx and scale as in `chunk_common`. Per chunk, with S_0 entering it:

    S_C = 2^total S_0 + scale kx^T v                  `chunk_state_kernel`: sequential, one tile of the state a program
    o   = qx S_0 + mask(A) v,  A = qx kx^T or safe    `chunk_out_kernel`: all chunks in parallel

The gradient dS of the state goes the same way backwards in time, dS_0 = 2^total dS_C + qx^T do, in the same kernel. The
gradient of v is the second line once more, dv = kx (scale dS_C) + mask(A)^T do.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk_common import (
    finite,
    load_mask,
    locate,
    masked_sum,
    meeting_pairs,
    product,
    row_masks,
    to_accumulator,
)
from hgrn2.ops.gates import activate_grad_tile, activate_tile, fast_exp2, gate_tile


@triton.jit(do_not_specialize=["T", "NT", "NC", "H", "L"])
def chunk_state_kernel(
    x_ptr, y_ptr, total_ptr, safe_ptr, init_ptr, final_ptr, states_ptr, seg_ptr, decay_ptr, table_ptr, len_ptr,
    y_stride_b, y_stride_t, y_stride_h,
    T, NT, NC, H, L,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BACKWARD: tl.constexpr, MODE: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, HAS_LEN: tl.constexpr,
    HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state entering each chunk of a segment of L chunks; BACKWARD: its gradient times scale, leaving each chunk.

    x_ptr: factors kx (BACKWARD: qx); y_ptr: v, which ACT is applied to (BACKWARD: do).
    MODE 0: a segment is one sequence. MODE 1: only the segment's own contribution and total decay, from a zero state.
    MODE 2: as 0, for segments that start from the state carried in `seg_ptr`.
    """
    n_k: tl.constexpr = K // BK
    n_v: tl.constexpr = K // BV
    pid = tl.program_id(0)
    i_v = pid % n_v
    i_k = (pid // n_v) % n_k
    i_h = ((pid // (n_v * n_k)) % H).to(tl.int64)
    i_s = pid // (n_v * n_k * H)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    o_s = o_k[:, None] * K + o_v[None, :]
    o_c = tl.arange(0, C)
    c_first = i_s * L
    c_end = tl.minimum(c_first + L, NC)
    p_seg = (i_s.to(tl.int64) * H + i_h) * K * K + o_s

    b_s = tl.zeros([BK, BV], dtype=tl.float32)
    b_decay = tl.zeros([BK], dtype=tl.float32)
    carried = 1.0
    if MODE == 0 and HAS_INIT:
        b_s = tl.load(init_ptr + p_seg)
    if MODE == 2:
        b_s = tl.load(seg_ptr + p_seg)
    for step in tl.range(0, c_end - c_first, num_stages=STAGES):
        c = c_end - 1 - step if BACKWARD else c_first + step
        n, b, t0, rows, first, last = locate(c, table_ptr, T, NT, C, REVERSE, VARLEN)
        p_ch = c.to(tl.int64) * H + i_h
        o_t, _m_in, m_real = row_masks(t0, rows, n, len_ptr, C, REVERSE, HAS_LEN)
        p_y = y_ptr + b * y_stride_b + t0.to(tl.int64) * y_stride_t + i_h * y_stride_h
        b_x = tl.load(x_ptr + p_ch * C * K + o_c[:, None] * K + o_k[None, :])
        b_y = tl.load(p_y + o_t[:, None] * y_stride_t + o_v[None, :], mask=m_real[:, None], other=0.0)
        b_total = tl.load(total_ptr + p_ch * K + o_k)
        safe = tl.load(safe_ptr + p_ch) != 0
        b_whole = fast_exp2(b_total)[:, None]
        b_scale = tl.where(safe, 1.0, b_whole)
        if MODE != 0:  # noqa: SIM102 (constants and data kept apart)
            if last if BACKWARD else first:
                carried = 0.0
                if HAS_INIT:
                    b_s = tl.load(init_ptr + (n.to(tl.int64) * H + i_h) * K * K + o_s)
                else:
                    b_s = tl.zeros([BK, BV], dtype=tl.float32)
        if MODE != 1:
            b_kept = b_s * b_scale if BACKWARD else b_s
            tl.store(states_ptr + p_ch * K * K + o_s, b_kept.to(states_ptr.dtype.element_ty))
        if ACT != 0:
            b_y = tl.where(m_real[:, None], activate_tile(b_y.to(tl.float32), ACT), 0.0)
        if BACKWARD:
            b_s = product(tl.trans(b_x), b_y, b_s * b_whole, PRECISION)
        else:
            # scale (2^total / scale S_0 + kx^T v): one accumulator
            b_s = b_scale * product(tl.trans(b_x), b_y, b_s * tl.where(safe, b_whole, 1.0), PRECISION)
        if MODE == 1:
            b_decay += b_total
        if MODE == 2 and HAS_FINAL:  # noqa: SIM102
            if first if BACKWARD else last:
                tl.store(final_ptr + (n.to(tl.int64) * H + i_h) * K * K + o_s, b_s)
    if MODE == 0 and HAS_FINAL:
        tl.store(final_ptr + p_seg, b_s)
    if MODE == 1:
        tl.store(seg_ptr + p_seg, b_s)
        if i_v == 0:
            tl.store(decay_ptr + (i_s * H + i_h) * K + o_k, fast_exp2(b_decay) * carried)


@triton.jit(do_not_specialize=["H", "N_SEG"])
def carry_kernel(seg_ptr, decay_ptr, H, N_SEG, K: tl.constexpr, BK: tl.constexpr, BACKWARD: tl.constexpr):
    """Turn each segment's own contribution `[N_SEG, H, K, V]` into the state carried into it, in place."""
    pid = tl.program_id(0)
    i_k = pid % (K // BK)
    i_h = (pid // (K // BK)).to(tl.int64)
    o_k = i_k * BK + tl.arange(0, BK)
    o_s = o_k[:, None] * K + tl.arange(0, K)[None, :]
    b_s = tl.zeros([BK, K], dtype=tl.float32)
    i_s = i_k * 0 + (N_SEG - 1 if BACKWARD else 0)
    step = -1 if BACKWARD else 1
    b_own = tl.load(seg_ptr + (i_s.to(tl.int64) * H + i_h) * K * K + o_s)
    b_decay = tl.load(decay_ptr + (i_s * H + i_h) * K + o_k)
    for left in range(0, N_SEG):
        # the next segment is on its way before this one is overwritten
        i_n = i_s + step
        more = o_k < tl.where(i_k * 0 + left < N_SEG - 1, K, 0)
        b_next = tl.load(seg_ptr + (i_n.to(tl.int64) * H + i_h) * K * K + o_s, mask=more[:, None], other=0.0)
        b_next_decay = tl.load(decay_ptr + (i_n * H + i_h) * K + o_k, mask=more, other=0.0)
        tl.store(seg_ptr + (i_s.to(tl.int64) * H + i_h) * K * K + o_s, b_s)
        b_s = b_s * b_decay[:, None] + b_own
        b_own = b_next
        b_decay = b_next_decay
        i_s = i_n


@triton.jit
def safe_scores(
    p_q, p_f, lb_ptr, mask_ptr, i_h, m_real, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Scores `[C, C]` (GRAD: transposed) by halving, from q and f themselves; entries outside i >= j are 0."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    eye = load_mask(mask_ptr, 0, C)
    b_a = tl.zeros([C, C], dtype=tl.float32)
    for k0 in range(0, K, BK):
        o_k = k0 + tl.arange(0, BK)
        gamma = tl.load(lb_ptr + i_h * K + o_k)[None, :] if HAS_LB else 0.0
        b_f = to_accumulator(finite(tl.load(p_f + o_k[None, :], mask=m_real[:, None], other=100.0)), eye)
        b_q = to_accumulator(tl.load(p_q + o_k[None, :], mask=m_real[:, None], other=0.0), eye)
        if Q_ACT != 0:
            b_q = tl.where(m_real[:, None], activate_tile(b_q, Q_ACT), 0.0)
        _sigma, _minus, b_k, _lam, b_g = gate_tile(b_f, gamma, HAS_LB)
        b_a += tl.where(i == j, tl.sum(b_q * b_k, axis=1)[:, None], 0.0)
        for shift in range(0, LOG_C):
            b_e = masked_sum(load_mask(mask_ptr, 3 + shift, C), b_g, tl.zeros([C, BK], dtype=tl.float32), SPLIT)
            b_e = fast_exp2(b_e)
            b_row = b_k * b_e if GRAD else b_q * b_e
            b_col = b_q * b_e if GRAD else b_k * b_e
            b_level = product(b_row, tl.trans(b_col), tl.zeros([C, C], dtype=tl.float32), PRECISION)
            b_a += tl.where(meeting_pairs(shift, C, GRAD), b_level, 0.0)
    return b_a


@triton.jit(do_not_specialize=["T", "NT", "H"])
def chunk_out_kernel(
    qx_ptr, kx_ptr, q_ptr, f_ptr, v_ptr, y_ptr, lb_ptr, mask_ptr, safe_ptr, states_ptr, o_ptr, da_ptr, diag_ptr,
    table_ptr, len_ptr,
    q_stride_b, q_stride_t, q_stride_h, f_stride_b, f_stride_t, f_stride_h, v_stride_b, v_stride_t, v_stride_h,
    y_stride_b, y_stride_t, y_stride_h,
    T, NT, H,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    SAFE: tl.constexpr, GRAD: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr, HAS_LEN: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs `[B, T, H, V]` (contiguous) of one chunk, head and tile of BV value channels; y is v.

    SAFE: run only the safe chunks and heads, else only the others. GRAD: the gradient of v in the place of the output,
    y is do, the states are their gradient; da_ptr `[NC, H, C, C]` and diag_ptr `[NC, H, C]` take the scores' gradient
    do v^T for the gradient kernel, below the diagonal and on it.
    """
    pid = tl.program_id(0)
    i_v = pid % (K // BV)
    i_h = ((pid // (K // BV)) % H).to(tl.int64)
    c = pid // ((K // BV) * H)
    p_ch = c.to(tl.int64) * H + i_h
    n, b, t0, rows, _first, _last = locate(c, table_ptr, T, NT, C, REVERSE, VARLEN)
    if (rows <= 0) | ((tl.load(safe_ptr + p_ch) != 0) != SAFE):
        return
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, n, len_ptr, C, REVERSE, HAS_LEN)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_tile = p_ch * C * K + o_c[:, None] * K
    p_v = v_ptr + b * v_stride_b + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    p_y = y_ptr + b * y_stride_b + t64 * y_stride_t + i_h * y_stride_h + o_t[:, None] * y_stride_t
    b_o = tl.zeros([C, BV], dtype=tl.float32)
    b_a = tl.zeros([C, C], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        b_x = tl.load((kx_ptr if GRAD else qx_ptr) + p_tile + o_k[None, :])
        b_s = tl.load(states_ptr + p_ch * K * K + o_k[:, None] * K + o_v[None, :])
        if not SAFE:
            b_z = tl.load((qx_ptr if GRAD else kx_ptr) + p_tile + o_k[None, :])
            b_a = product(b_x, tl.trans(b_z), b_a, PRECISION)
        b_o = product(b_x, b_s, b_o, PRECISION)
    if SAFE:
        p_q = q_ptr + b * q_stride_b + t64 * q_stride_t + i_h * q_stride_h + o_t[:, None] * q_stride_t
        p_f = f_ptr + b * f_stride_b + t64 * f_stride_t + i_h * f_stride_h + o_t[:, None] * f_stride_t
        b_a = safe_scores(
            p_q, p_f, lb_ptr, mask_ptr, i_h, m_real, K, BK, C, LOG_C, HAS_LB, Q_ACT, GRAD, PRECISION, SPLIT
        )
    b_a = tl.where((j >= i) if GRAD else (i >= j), b_a, 0.0)
    b_y = tl.load(p_y + o_v[None, :], mask=m_real[:, None], other=0.0)
    if V_ACT != 0 and not GRAD:
        b_y = tl.where(m_real[:, None], activate_tile(b_y.to(tl.float32), V_ACT), 0.0)
    b_o = product(b_a, b_y, b_o, PRECISION)
    if GRAD:
        if V_ACT != 0:
            b_raw = tl.load(p_v + o_v[None, :], mask=m_real[:, None], other=0.0).to(tl.float32)
            b_o *= activate_grad_tile(b_raw, V_ACT)
        b_o = tl.where(m_real[:, None], b_o, 0.0)
    p_o = o_ptr + ((b * T + t64) * H + i_h) * K + o_t[:, None] * (H * K) + o_v[None, :]
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_in[:, None])
    if GRAD:  # noqa: SIM102 (a constant: the other kernel has no da_ptr)
        if i_v == 0:
            b_da = tl.zeros([C, C], dtype=tl.float32)
            for v0 in range(0, K, BV):
                o_w = v0 + tl.arange(0, BV)[None, :]
                b_y = tl.load(p_y + o_w, mask=m_real[:, None], other=0.0)
                b_w = tl.load(p_v + o_w, mask=m_real[:, None], other=0.0)
                if V_ACT != 0:
                    b_w = tl.where(m_real[:, None], activate_tile(b_w.to(tl.float32), V_ACT), 0.0)
                b_da = product(b_y, tl.trans(b_w), b_da, PRECISION)
            tl.store(da_ptr + p_ch * C * C + i * C + j, tl.where(i > j, b_da, 0.0).to(da_ptr.dtype.element_ty))
            tl.store(diag_ptr + p_ch * C + o_c, tl.sum(tl.where(i == j, b_da, 0.0), axis=1))
