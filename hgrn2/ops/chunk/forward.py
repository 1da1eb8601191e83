"""The chunked scan in Triton: chunk states (forward and backward in time) and outputs.

Shapes, the factors qx, kx and scale as in `common`. Per chunk, with S_0 entering it:

    S_C = 2^total S_0 + scale kx^T v                  `chunk_state_kernel`: sequential, one tile of the state a program
    o   = qx S_0 + A v,  A = mask(qx kx^T) or safe    `chunk_out_kernel`: all chunks in parallel

The gradient dS of the state goes the same way backwards in time, dS_0 = 2^total dS_C + qx^T do, in the same kernel.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk.common import decay, locate, product, row_masks
from hgrn2.ops.gates import activate_tile


@triton.jit(do_not_specialize=["T", "NT", "P", "NC", "H", "L", "sign", "has_len"])
def chunk_state_kernel(
    x_ptr, y_ptr, total_ptr, safe_ptr, init_ptr, final_ptr, states_ptr, seg_ptr, decay_ptr, table_ptr, len_ptr,
    y_stride_b, y_stride_p, y_stride_t, y_stride_h,
    T, NT, P, NC, H, L, sign, has_len,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    BACKWARD: tl.constexpr, MODE: tl.constexpr, VARLEN: tl.constexpr, HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr,
    ACT: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state entering each chunk of a segment of L chunks; BACKWARD: its gradient times scale, leaving each chunk.

    x_ptr: factors kx (BACKWARD: qx, unrounded if EXACT); y_ptr: v, which ACT is applied to (BACKWARD: do).
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
        n, b, p, t0, rows, first, last, length = locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C, VARLEN)
        p_ch = c.to(tl.int64) * H + i_h
        # from a chunk's last token on where EXACT: of its terms those that have decayed most are summed first
        o_r = C - 1 - o_c if EXACT else o_c
        o_t = o_r * sign
        m_real = (o_r < rows) & (t0 + o_t < length)
        p_y = y_ptr + b * y_stride_b + p * y_stride_p + t0.to(tl.int64) * y_stride_t + i_h * y_stride_h
        b_x = tl.load(x_ptr + p_ch * C * K + o_r[:, None] * K + o_k[None, :])
        b_y = tl.load(p_y + o_t[:, None] * y_stride_t + o_v[None, :], mask=m_real[:, None], other=0.0)
        b_total = tl.load(total_ptr + p_ch * K + o_k)
        safe = tl.load(safe_ptr + p_ch) != 0
        b_whole = decay(b_total, "tf32x3" if EXACT else PRECISION)[:, None]
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
        if EXACT:
            b_s = product(tl.trans(b_x), b_y, b_s * b_whole, "ieee")
        elif BACKWARD:
            b_s = product(tl.trans(b_x), b_y, b_s * b_whole, PRECISION)
        else:
            # scale (2^total / scale S_0 + kx^T v): of 16-bit inputs one accumulator
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
            tl.store(decay_ptr + (i_s * H + i_h) * K + o_k, decay(b_decay, "tf32x3" if EXACT else PRECISION) * carried)


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


@triton.jit(do_not_specialize=["T", "NT", "P", "H", "sign", "has_len", "keep"])
def chunk_out_kernel(
    qx_ptr, kx_ptr, v_ptr, safe_ptr, states_ptr, a_ptr, o_ptr, table_ptr, len_ptr,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, o_stride_b, o_stride_p, o_stride_t,
    T, NT, P, H, sign, has_len, keep,
    K: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, VARLEN: tl.constexpr, V_ACT: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs `[B, P, T, H, V]` of one chunk, head and tile of BV value channels.

    Scores a_ptr `[NC, H, C, C]`: read where safe, else written for the backward, unless keep is 0.
    """
    pid = tl.program_id(0)
    i_v = pid % (K // BV)
    i_h = ((pid // (K // BV)) % H).to(tl.int64)
    c = pid // ((K // BV) * H)
    p_ch = c.to(tl.int64) * H + i_h
    _n, b, p, t0, rows, _first, _last, length = locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C, VARLEN)
    if rows <= 0:
        return
    safe = tl.load(safe_ptr + p_ch) != 0
    t64 = t0.to(tl.int64)
    o_t, m_in, m_real = row_masks(t0, rows, length, sign, C)
    o_c = tl.arange(0, C)
    o_v = i_v * BV + tl.arange(0, BV)
    i = o_c[:, None]
    j = o_c[None, :]
    p_tile = p_ch * C * K + o_c[:, None] * K
    p_v = v_ptr + b * v_stride_b + p * v_stride_p + t64 * v_stride_t + i_h * v_stride_h + o_t[:, None] * v_stride_t
    b_o = tl.zeros([C, BV], dtype=tl.float32)
    b_a = tl.zeros([C, C], dtype=tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        o_k = k0 + tl.arange(0, BK)
        b_x = tl.load(qx_ptr + p_tile + o_k[None, :])
        b_s = tl.load(states_ptr + p_ch * K * K + o_k[:, None] * K + o_v[None, :])
        b_z = tl.load(kx_ptr + p_tile + o_k[None, :])
        b_a = product(b_x, tl.trans(b_z), b_a, PRECISION)
        b_o = product(b_x, b_s, b_o, PRECISION)
    p_a = a_ptr + p_ch * C * C + i * C + j
    b_a = tl.where(i >= j, b_a, 0.0)
    if safe:
        b_a = tl.load(p_a).to(tl.float32)
    elif (keep != 0) & (i_v == 0):
        tl.store(p_a, b_a.to(a_ptr.dtype.element_ty))
    b_v = tl.load(p_v + o_v[None, :], mask=m_real[:, None], other=0.0)
    if V_ACT != 0:
        b_v = tl.where(m_real[:, None], activate_tile(b_v.to(tl.float32), V_ACT), 0.0)
    b_o = product(b_a, b_v, b_o, PRECISION)
    p_o = o_ptr + b * o_stride_b + p * o_stride_p + t64 * o_stride_t + i_h * K
    p_o += o_t[:, None] * o_stride_t + o_v[None, :]
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_in[:, None])
