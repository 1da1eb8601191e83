"""The scan of small states in Triton, backward. Shapes and lanes as in `common`.

In the order of the scan, with S_t the states, C_t the gradient that reaches S_t from later tokens, and D_t that of S_t:

    D_t = C_t + q_t (x) do_t       C_{t-1} = lam_t D_t          d lam_t = x_t / lam_t,  x_t = sum_v lam_t S_{t-1} D_t
    dq_t = dq'_t + k_t (v_t . do_t)         dq'_t = lam_t S_{t-1} do_t
    dk_t = dk'_t + q_t (v_t . do_t)         dk'_t = C_t v_t                 dv_t = D_t^T k_t

S runs forwards and D backwards, so no thread has both at one token. But x_{t+1} = x_t + k_t dk'_t - q_t dq'_t, from
x_0 = S_{-1} C_{-1} where the segment starts: the first loop runs D and leaves dk' in scratch, the second runs S and x.
The dashed terms leave out a token's score with itself, which cancels. The opposite scan of BOTH shares the loops: its S
runs in the first, which leaves its dq', and its D and x in the second.

BLOCK: the first loop leaves its states at every UNROLL tokens, and the second runs them once more from there. For head
dims 1 and 2 that is far less than dk' and dq' of all tokens.

EXACT (needs BLOCK), for fp32 inputs and the initial state's gradient: run so, every token has both S and D, and x is
their product; the running sum's errors would stay with it where x itself decays. Head dims 4 and 8 take more scratch.
"""

import triton
import triton.language as tl

from hgrn2.ops.gates import activate_grad_tile, decay_tile, exact_reciprocal, fast_reciprocal
from hgrn2.ops.lane.common import (
    SIZES,
    activated,
    add_outer,
    dot_keys,
    dot_states,
    dot_values,
    empty_state,
    load_checkpoint,
    load_rows,
    load_scratch,
    load_state,
    locate,
    over_head,
    place,
    program,
    scaled,
    scratch_at,
    store_checkpoint,
    store_state,
    strides_of,
    tile_at,
)


@triton.jit(do_not_specialize=SIZES + strides_of("q f v do g"))
def scan_grad_kernel(
    q_ptr, f_ptr, v_ptr, do_ptr, lb_ptr, dq_ptr, df_ptr, dv_ptr, dlb_ptr,
    dk_ptr, dq2_ptr, enter_ptr, d_enter_ptr, d_leave_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, do_stride_b, do_stride_p, do_stride_t, do_stride_h,
    g_stride_b, g_stride_p, g_stride_t, g_stride_h,
    N, T, P, NS, NC, L, H,
    K: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr,
    BOTH: tl.constexpr, VARLEN: tl.constexpr, HAS_LEN: tl.constexpr, HAS_LB: tl.constexpr, Q_ACT: tl.constexpr,
    V_ACT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, LB_GRAD: tl.constexpr, HAS_ENTER: tl.constexpr,
    HAS_D_ENTER: tl.constexpr, HAS_D_LEAVE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq, df, dv of each segment (strides g) from the states and gradients that enter it; ADD: added to what they hold.

    dk_ptr, dq2_ptr: scratch. dlb_ptr `[NC, H, V]`: each segment's share of d lower_bound.
    """
    PARTS: tl.constexpr = V // K
    p_scratch = scratch_at(program(ADD), L // UNROLL * V if BLOCK else L, K, LANES)
    inside, c, row, line, head, part, t0, stored, real = locate(
        program(ADD), N, table_ptr, len_ptr, T, P, NS, L, H, LANES, PARTS, VARLEN, HAS_LEN
    )
    m_lane = inside[:, None]
    m_own = (part == 0)[:, None]  # one lane of a head writes dv
    o_k = part[:, None] * K + tl.arange(0, K)[None, :]
    gamma = tl.load(lb_ptr + head[:, None] * V + o_k) if HAS_LB else 0.0
    p_q = q_ptr + tile_at(row, line, head, part, t0, q_stride_b, q_stride_p, q_stride_t, q_stride_h, K, V)
    p_f = f_ptr + tile_at(row, line, head, part, t0, f_stride_b, f_stride_p, f_stride_t, f_stride_h, K, V)
    p_v = v_ptr + tile_at(row, line, head, part, t0, v_stride_b, v_stride_p, v_stride_t, v_stride_h, V, V)
    p_do = do_ptr + tile_at(row, line, head, part, t0, do_stride_b, do_stride_p, do_stride_t, do_stride_h, V, V)
    p_grad = tile_at(row, line, head, part, t0, g_stride_b, g_stride_p, g_stride_t, g_stride_h, K, V)
    p_dv = dv_ptr + tile_at(row, line, head, part, t0, g_stride_b, g_stride_p, g_stride_t, g_stride_h, V, V)
    p_state = (c * H + head)[:, None] * V * V + o_k
    p_second = p_state + NC.to(tl.int64) * H * V * V

    grad = load_state(d_enter_ptr, p_state, m_lane, V) if HAS_D_ENTER else empty_state(LANES, K, V)
    state2 = load_state(enter_ptr, p_second, m_lane, V) if HAS_ENTER and BOTH else empty_state(LANES, K, V)
    q = load_rows(p_q, 0, q_stride_t, real, L, 0.0, V, UNROLL, not FLIP)
    f = load_rows(p_f, 0, f_stride_t, real, L, 100.0, V, UNROLL, not FLIP)
    v = load_rows(p_v, 0, v_stride_t, real, L, 0.0, V, UNROLL, not FLIP)
    do = load_rows(p_do, 0, do_stride_t, real, L, 0.0, V, UNROLL, not FLIP)
    for i in tl.range(0, L, UNROLL):
        # the next tokens are on their way while these are worked on
        next_q = load_rows(p_q, i + UNROLL, q_stride_t, real, L, 0.0, V, UNROLL, not FLIP)
        next_f = load_rows(p_f, i + UNROLL, f_stride_t, real, L, 100.0, V, UNROLL, not FLIP)
        next_v = load_rows(p_v, i + UNROLL, v_stride_t, real, L, 0.0, V, UNROLL, not FLIP)
        next_do = load_rows(p_do, i + UNROLL, do_stride_t, real, L, 0.0, V, UNROLL, not FLIP)
        held = load_rows(p_dv, i, g_stride_t, real, L, 0.0, V, UNROLL, not FLIP) if ADD and not BLOCK else v
        if BLOCK:
            store_checkpoint(dk_ptr + p_scratch, i // UNROLL, grad, K, V, LANES)
            if BOTH:
                store_checkpoint(dq2_ptr + p_scratch, i // UNROLL, state2, K, V, LANES)
        for u in tl.static_range(UNROLL):
            t = place(i + u, L, not FLIP)
            m = (t < real)[:, None]
            b_q = activated(q[u], m, Q_ACT)
            b_v = activated(v[u], m, V_ACT)
            b_do = do[u].to(tl.float32)
            _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            lam = tl.where(m, lam, 1.0)
            if not BLOCK:
                tl.store(dk_ptr + p_scratch + t * (K * LANES), dot_values(grad, b_v, V))
            grad = add_outer(grad, b_q, b_do, V)
            if not BLOCK:
                b_dv = over_head(dot_keys(grad, b_k, V), PARTS)
                if V_ACT != 0:
                    b_dv = tl.where(m, b_dv * activate_grad_tile(v[u].to(tl.float32), V_ACT), 0.0)
                if ADD:
                    b_dv += held[u].to(tl.float32)
                m_out = (t < stored)[:, None] & m_own
                tl.store(p_dv + t * g_stride_t * V, b_dv.to(dv_ptr.dtype.element_ty), mask=m_out)
            grad = scaled(grad, lam, V)
            if BOTH:
                state2 = scaled(state2, lam, V)
                if not BLOCK:
                    tl.store(dq2_ptr + p_scratch + t * (K * LANES), dot_values(state2, b_do, V))
                state2 = add_outer(state2, b_k, b_v, V)
        q = next_q
        f = next_f
        v = next_v
        do = next_do
    if HAS_D_LEAVE:
        store_state(d_leave_ptr, p_state, grad, m_lane, V)
    tl.debug_barrier()

    state = load_state(enter_ptr, p_state, m_lane, V) if HAS_ENTER else empty_state(LANES, K, V)
    b_x = dot_states(state, grad, V)
    grad2 = load_state(d_enter_ptr, p_second, m_lane, V) if HAS_D_ENTER and BOTH else empty_state(LANES, K, V)
    b_x2 = dot_states(state2, grad2, V)
    b_dlb = tl.zeros([LANES, K], dtype=tl.float32)
    q = load_rows(p_q, 0, q_stride_t, real, L, 0.0, V, UNROLL, FLIP)
    f = load_rows(p_f, 0, f_stride_t, real, L, 100.0, V, UNROLL, FLIP)
    v = load_rows(p_v, 0, v_stride_t, real, L, 0.0, V, UNROLL, FLIP)
    do = load_rows(p_do, 0, do_stride_t, real, L, 0.0, V, UNROLL, FLIP)
    if BLOCK:
        grad = load_checkpoint(dk_ptr + p_scratch, L // UNROLL - 1, K, V, LANES)
        state2 = load_checkpoint(dq2_ptr + p_scratch, L // UNROLL - 1, K, V, LANES) if BOTH else grad
        dk = q
        dq2 = q
    else:
        dk = load_scratch(dk_ptr + p_scratch, 0, L, K, LANES, UNROLL, FLIP)
        dq2 = load_scratch(dq2_ptr + p_scratch, 0, L, K, LANES, UNROLL, FLIP) if BOTH else dk
    for i in tl.range(0, L, UNROLL):
        next_q = load_rows(p_q, i + UNROLL, q_stride_t, real, L, 0.0, V, UNROLL, FLIP)
        next_f = load_rows(p_f, i + UNROLL, f_stride_t, real, L, 100.0, V, UNROLL, FLIP)
        next_v = load_rows(p_v, i + UNROLL, v_stride_t, real, L, 0.0, V, UNROLL, FLIP)
        next_do = load_rows(p_do, i + UNROLL, do_stride_t, real, L, 0.0, V, UNROLL, FLIP)
        held = load_rows(p_dv, i, g_stride_t, real, L, 0.0, V, UNROLL, FLIP) if ADD or (BOTH and not BLOCK) else v
        dq = load_rows(dq_ptr + p_grad, i, g_stride_t, real, L, 0.0, V, UNROLL, FLIP) if ADD else q
        df = load_rows(df_ptr + p_grad, i, g_stride_t, real, L, 0.0, V, UNROLL, FLIP) if ADD else q
        if BLOCK:
            next_grad = load_checkpoint(dk_ptr + p_scratch, (L - i) // UNROLL - 2, K, V, LANES)
            next_state2 = (
                load_checkpoint(dq2_ptr + p_scratch, (L - i) // UNROLL - 2, K, V, LANES) if BOTH else next_grad
            )
            # the first loop's tokens once more, from where it passed
            before_dk = ()
            before_dq2 = ()
            before_dv = ()
            before_grad = ()
            before_state2 = ()
            for u in tl.static_range(UNROLL - 1, -1, -1):
                m = (place(i + u, L, FLIP) < real)[:, None]
                b_v = activated(v[u], m, V_ACT)
                b_do = do[u].to(tl.float32)
                _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
                lam = tl.where(m, lam, 1.0)
                before_dk = (dot_values(grad, b_v, V),) + before_dk
                grad = add_outer(grad, activated(q[u], m, Q_ACT), b_do, V)
                if EXACT:
                    before_grad = (grad,) + before_grad
                before_dv = (over_head(dot_keys(grad, b_k, V), PARTS),) + before_dv
                grad = scaled(grad, lam, V)
                if BOTH:
                    state2 = scaled(state2, lam, V)
                    if EXACT:
                        before_state2 = (state2,) + before_state2
                    before_dq2 = (dot_values(state2, b_do, V),) + before_dq2
                    state2 = add_outer(state2, b_k, b_v, V)
        else:
            next_dk = load_scratch(dk_ptr + p_scratch, i + UNROLL, L, K, LANES, UNROLL, FLIP)
            next_dq2 = load_scratch(dq2_ptr + p_scratch, i + UNROLL, L, K, LANES, UNROLL, FLIP) if BOTH else next_dk
            before_dk = dk
            before_dq2 = dq2
        for u in tl.static_range(UNROLL):
            t = place(i + u, L, FLIP)
            m = (t < real)[:, None]
            m_out = (t < stored)[:, None]
            b_dk = before_dk[u]
            b_q = activated(q[u], m, Q_ACT)
            b_v = activated(v[u], m, V_ACT)
            b_do = do[u].to(tl.float32)
            sigma, minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            lam = tl.where(m, lam, 1.0)
            state = scaled(state, lam, V)
            b_dq = dot_values(state, b_do, V)
            if EXACT:
                b_dlog = dot_states(state, before_grad[u], V)
            state = add_outer(state, b_k, b_v, V)
            if not EXACT:
                b_dlog = b_x
                b_x += b_k * b_dk - b_q * b_dq
            b_diag = tl.sum(b_v * b_do, axis=1)[:, None]
            if BOTH:
                b_dq2 = before_dq2[u]
                b_dk2 = dot_values(grad2, b_v, V)
                if not EXACT:
                    b_x2 += b_q * b_dq2 - b_k * b_dk2
                    b_dlog += b_x2
                b_dq += b_dq2
                b_dk += b_dk2
                b_diag = 2.0 * b_diag
                grad2 = add_outer(grad2, b_q, b_do, V)
                if EXACT:
                    b_dlog += dot_states(before_state2[u], grad2, V)
                b_dv = over_head(dot_keys(grad2, b_k, V), PARTS)
                grad2 = scaled(grad2, lam, V)
            if BOTH or BLOCK:
                if BLOCK:
                    b_dv = before_dv[u] + b_dv if BOTH else before_dv[u]
                if V_ACT != 0:
                    b_dv = tl.where(m, b_dv * activate_grad_tile(v[u].to(tl.float32), V_ACT), 0.0)
                if ADD or not BLOCK:
                    b_dv += held[u].to(tl.float32)
                tl.store(p_dv + t * g_stride_t * V, b_dv.to(dv_ptr.dtype.element_ty), mask=m_out & m_own)
            b_dq += b_diag * b_k
            b_dk += b_diag * b_q
            if Q_ACT != 0:
                b_dq = tl.where(m, b_dq * activate_grad_tile(q[u].to(tl.float32), Q_ACT), 0.0)
            if HAS_LB:
                lam = tl.maximum(lam, 1e-37)
                b_dlog = b_dlog * (exact_reciprocal(lam) if EXACT else fast_reciprocal(lam)) - b_dk
                if LB_GRAD:
                    b_dlb += tl.where(m, b_dlog * minus, 0.0)
                b_df = minus * sigma * (1.0 - gamma) * b_dlog
            else:
                b_df = minus * (b_dlog - sigma * b_dk)
            b_df = tl.where(m, b_df, 0.0)
            if ADD:
                b_dq += dq[u].to(tl.float32)
                b_df += df[u].to(tl.float32)
            tl.store(dq_ptr + p_grad + t * g_stride_t * V, b_dq.to(dq_ptr.dtype.element_ty), mask=m_out)
            tl.store(df_ptr + p_grad + t * g_stride_t * V, b_df.to(df_ptr.dtype.element_ty), mask=m_out)
        q = next_q
        f = next_f
        v = next_v
        do = next_do
        if BLOCK:
            grad = next_grad
            state2 = next_state2
        else:
            dk = next_dk
            dq2 = next_dq2
    if LB_GRAD:
        tl.store(dlb_ptr + (c * H + head)[:, None] * V + o_k, b_dlb, mask=m_lane)
