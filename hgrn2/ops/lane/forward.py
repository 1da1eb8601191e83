"""The scan of small states in Triton, forward: what each segment adds to the state, the states between them, outputs.

Shapes and lanes as in `common`. Sequences of one segment run `scan_out_kernel` alone.
"""

import triton
import triton.language as tl

from hgrn2.ops.gates import decay_tile
from hgrn2.ops.lane.common import (
    SIZES,
    activated,
    add_outer,
    dot_keys,
    empty_state,
    load_checkpoint,
    load_rows,
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


@triton.jit(do_not_specialize=SIZES + strides_of("f x y"))
def scan_segment_kernel(
    f_ptr, x_ptr, y_ptr, lb_ptr, own_ptr, decay_ptr, table_ptr, len_ptr,
    f_stride_b, f_stride_p, f_stride_t, f_stride_h, x_stride_b, x_stride_p, x_stride_t, x_stride_h,
    y_stride_b, y_stride_p, y_stride_t, y_stride_h,
    N, T, P, NS, NC, L, H,
    K: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, GRAD: tl.constexpr,
    FLIP: tl.constexpr, BOTH: tl.constexpr, VARLEN: tl.constexpr, HAS_LEN: tl.constexpr, HAS_LB: tl.constexpr,
    X_ACT: tl.constexpr, Y_ACT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Each segment's own contribution to the state that leaves it, and its total decay `[NC, H, V]`.

    y is v and x is not read (GRAD: do and q: contributions to the states' gradients). What leaves against the order of
    the loop is summed under the product P of the decays so far. Where EXACT and not BOTH, the gradients' loop runs the
    other way instead, so that what has decayed most is summed first.
    """
    TURN: tl.constexpr = GRAD and EXACT and not BOTH
    BACK: tl.constexpr = FLIP != TURN
    inside, c, row, line, head, part, t0, _stored, real = locate(
        tl.program_id(0), N, table_ptr, len_ptr, T, P, NS, L, H, LANES, V // K, VARLEN, HAS_LEN
    )
    m_lane = inside[:, None]
    o_k = part[:, None] * K + tl.arange(0, K)[None, :]
    gamma = tl.load(lb_ptr + head[:, None] * V + o_k) if HAS_LB else 0.0
    p_f = f_ptr + tile_at(row, line, head, part, t0, f_stride_b, f_stride_p, f_stride_t, f_stride_h, K, V)
    p_y = y_ptr + tile_at(row, line, head, part, t0, y_stride_b, y_stride_p, y_stride_t, y_stride_h, V, V)
    if GRAD:
        p_x = x_ptr + tile_at(row, line, head, part, t0, x_stride_b, x_stride_p, x_stride_t, x_stride_h, K, V)
    along = empty_state(LANES, K, V)
    against = empty_state(LANES, K, V)
    decay = tl.zeros([LANES, K], dtype=tl.float32) + 1.0
    f = load_rows(p_f, 0, f_stride_t, real, L, 100.0, V, UNROLL, BACK)
    y = load_rows(p_y, 0, y_stride_t, real, L, 0.0, V, UNROLL, BACK)
    x = load_rows(p_x, 0, x_stride_t, real, L, 0.0, V, UNROLL, BACK) if GRAD else f
    for i in tl.range(0, L, UNROLL):
        # the next tokens are on their way while these are worked on
        next_f = load_rows(p_f, i + UNROLL, f_stride_t, real, L, 100.0, V, UNROLL, BACK)
        next_y = load_rows(p_y, i + UNROLL, y_stride_t, real, L, 0.0, V, UNROLL, BACK)
        next_x = load_rows(p_x, i + UNROLL, x_stride_t, real, L, 0.0, V, UNROLL, BACK) if GRAD else next_f
        for u in tl.static_range(UNROLL):
            m = (place(i + u, L, BACK) < real)[:, None]
            _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            lam = tl.where(m, lam, 1.0)
            b_y = activated(y[u], m, Y_ACT)
            if GRAD:
                b_x = activated(x[u], m, X_ACT)
                decay = decay * lam
                if not TURN:
                    against = add_outer(against, decay * b_x, b_y, V)
                if BOTH or TURN:
                    along = scaled(add_outer(along, b_x, b_y, V), lam, V)
            else:
                along = add_outer(scaled(along, lam, V), b_k, b_y, V)
                if BOTH:
                    against = add_outer(against, decay * b_k, b_y, V)
                decay = decay * lam
        f = next_f
        y = next_y
        x = next_x
    p_head = (c * H + head)[:, None] * V + o_k
    p_state = (c * H + head)[:, None] * V * V + o_k
    tl.store(decay_ptr + p_head, decay, mask=m_lane)
    second = own_ptr + NC.to(tl.int64) * H * V * V
    store_state(own_ptr, p_state, against if GRAD and not TURN else along, m_lane, V)
    if BOTH:
        store_state(second, p_state, along if GRAD else against, m_lane, V)


@triton.jit(do_not_specialize=["N", "NS", "NC", "H"])
def scan_carry_kernel(
    own_ptr, decay_ptr, init_ptr, final_ptr, table_ptr,
    N, NS, NC, H,
    K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, GRAD: tl.constexpr, FLIP: tl.constexpr,
    BOTH: tl.constexpr, VARLEN: tl.constexpr, HAS_INIT: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Turn the segments' own contributions `[2, NC, H, V, K]` into the states that enter them, in place.

    One thread owns one row of a line's state. init, final: `[lines, H, V, K]`, or of documents, with one slot only.
    """
    slots: tl.constexpr = 2 if BOTH else 1
    slot = tl.program_id(0) % slots
    down = (slot ^ (1 if GRAD else 0) ^ (1 if FLIP else 0)) != 0
    n = (tl.program_id(0) // slots).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = n < N
    m_lane = inside[:, None]
    n = tl.where(inside, n, 0)
    o_k = tl.arange(0, K)[None, :]
    count = tl.where(inside, NS, 0)
    i_line = n // (H * K)
    rest = n - i_line * (H * K)  # head and value channel
    own_ptr += slot * NC.to(tl.int64) * H * K * K
    b_s = tl.zeros([LANES, K], dtype=tl.float32)
    if HAS_INIT and not VARLEN:
        b_s = tl.load(init_ptr + n[:, None] * K + o_k, mask=m_lane, other=0.0)
    for first in tl.range(0, NS, UNROLL):
        own = ()
        decay = ()
        for u in tl.static_range(UNROLL):
            s = first + u
            m = (s < count)[:, None]
            c = i_line * NS + tl.where(down, NS - 1 - s, s)
            own = own + (tl.load(own_ptr + (c * (H * K) + rest)[:, None] * K + o_k, mask=m, other=0.0),)
            decay = decay + (tl.load(decay_ptr + (c * H + rest // K)[:, None] * K + o_k, mask=m, other=1.0),)
        for u in tl.static_range(UNROLL):
            s = first + u
            m = (s < count)[:, None]
            c = i_line * NS + tl.where(down, NS - 1 - s, s)
            if VARLEN:
                flags = tl.load(table_ptr + c * 4 + 3, mask=s < count, other=0)
                document = tl.load(table_ptr + c * 4, mask=s < count, other=0).to(tl.int64)
                p_state = (document * (H * K) + rest)[:, None] * K + o_k
                opens = ((flags & tl.where(down, 2, 1)) != 0)[:, None]
                b_init = tl.zeros([LANES, K], dtype=tl.float32)
                if HAS_INIT:
                    b_init = tl.load(init_ptr + p_state, mask=m & opens, other=0.0)
                b_s = tl.where(opens, b_init, b_s)
            tl.store(own_ptr + (c * (H * K) + rest)[:, None] * K + o_k, b_s, mask=m)
            b_s = b_s * decay[u] + own[u]
            if VARLEN and HAS_FINAL:
                closes = ((flags & tl.where(down, 1, 2)) != 0)[:, None]
                tl.store(final_ptr + p_state, b_s, mask=m & closes)
    if HAS_FINAL and not VARLEN:
        tl.store(final_ptr + n[:, None] * K + o_k, b_s, mask=m_lane)


@triton.jit
def _out_pass(
    state, p_q, p_f, p_v, p_o, m_own, gamma, q_stride_t, f_stride_t, v_stride_t, o_stride_t, stored, real, L,
    K: tl.constexpr, V: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr, ADD: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Run one scan over the lanes' segments; ADD: on top of what o holds. Returns the states that leave."""
    q = load_rows(p_q, 0, q_stride_t, real, L, 0.0, V, UNROLL, FLIP)
    f = load_rows(p_f, 0, f_stride_t, real, L, 100.0, V, UNROLL, FLIP)
    v = load_rows(p_v, 0, v_stride_t, real, L, 0.0, V, UNROLL, FLIP)
    before = load_rows(p_o, 0, o_stride_t, real, L, 0.0, V, UNROLL, FLIP) if ADD else v
    for i in tl.range(0, L, UNROLL):
        # the next tokens are on their way while these are worked on
        next_q = load_rows(p_q, i + UNROLL, q_stride_t, real, L, 0.0, V, UNROLL, FLIP)
        next_f = load_rows(p_f, i + UNROLL, f_stride_t, real, L, 100.0, V, UNROLL, FLIP)
        next_v = load_rows(p_v, i + UNROLL, v_stride_t, real, L, 0.0, V, UNROLL, FLIP)
        next_before = load_rows(p_o, i + UNROLL, o_stride_t, real, L, 0.0, V, UNROLL, FLIP) if ADD else next_v
        for u in tl.static_range(UNROLL):
            t = place(i + u, L, FLIP)
            m = (t < real)[:, None]
            b_q = activated(q[u], m, Q_ACT)
            b_v = activated(v[u], m, V_ACT)
            _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            state = add_outer(scaled(state, tl.where(m, lam, 1.0), V), b_k, b_v, V)
            b_o = over_head(dot_keys(state, b_q, V), V // K)
            if ADD:
                b_o += before[u].to(tl.float32)
            tl.store(p_o + t * o_stride_t * V, b_o.to(p_o.dtype.element_ty), mask=(t < stored)[:, None] & m_own)
        q = next_q
        f = next_f
        v = next_v
        before = next_before
    return state


@triton.jit
def _out_both(
    state, state2, p_q, p_f, p_v, p_o, p_scratch, gamma, q_stride_t, f_stride_t, v_stride_t, o_stride_t, stored, real,
    L, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr, ADD: tl.constexpr,
    HAS_LB: tl.constexpr, Q_ACT: tl.constexpr, V_ACT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Both scans: the opposite one leaves its states at every UNROLL tokens, from which the second loop takes it up."""
    f = load_rows(p_f, 0, f_stride_t, real, L, 100.0, K, UNROLL, not FLIP)
    v = load_rows(p_v, 0, v_stride_t, real, L, 0.0, K, UNROLL, not FLIP)
    for i in tl.range(0, L, UNROLL):
        next_f = load_rows(p_f, i + UNROLL, f_stride_t, real, L, 100.0, K, UNROLL, not FLIP)
        next_v = load_rows(p_v, i + UNROLL, v_stride_t, real, L, 0.0, K, UNROLL, not FLIP)
        store_checkpoint(p_scratch, i // UNROLL, state2, K, K, LANES)
        for u in tl.static_range(UNROLL):
            m = (place(i + u, L, not FLIP) < real)[:, None]
            _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            state2 = add_outer(scaled(state2, tl.where(m, lam, 1.0), K), b_k, activated(v[u], m, V_ACT), K)
        f = next_f
        v = next_v
    tl.debug_barrier()
    q = load_rows(p_q, 0, q_stride_t, real, L, 0.0, K, UNROLL, FLIP)
    f = load_rows(p_f, 0, f_stride_t, real, L, 100.0, K, UNROLL, FLIP)
    v = load_rows(p_v, 0, v_stride_t, real, L, 0.0, K, UNROLL, FLIP)
    before = load_rows(p_o, 0, o_stride_t, real, L, 0.0, K, UNROLL, FLIP) if ADD else v
    state2 = load_checkpoint(p_scratch, L // UNROLL - 1, K, K, LANES)
    for i in tl.range(0, L, UNROLL):
        next_q = load_rows(p_q, i + UNROLL, q_stride_t, real, L, 0.0, K, UNROLL, FLIP)
        next_f = load_rows(p_f, i + UNROLL, f_stride_t, real, L, 100.0, K, UNROLL, FLIP)
        next_v = load_rows(p_v, i + UNROLL, v_stride_t, real, L, 0.0, K, UNROLL, FLIP)
        next_before = load_rows(p_o, i + UNROLL, o_stride_t, real, L, 0.0, K, UNROLL, FLIP) if ADD else next_v
        next_state2 = load_checkpoint(p_scratch, (L - i) // UNROLL - 2, K, K, LANES)
        opposite = ()
        for u in tl.static_range(UNROLL - 1, -1, -1):
            m = (place(i + u, L, FLIP) < real)[:, None]
            _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            state2 = add_outer(scaled(state2, tl.where(m, lam, 1.0), K), b_k, activated(v[u], m, V_ACT), K)
            opposite = (dot_keys(state2, activated(q[u], m, Q_ACT), K),) + opposite
        for u in tl.static_range(UNROLL):
            t = place(i + u, L, FLIP)
            m = (t < real)[:, None]
            _sigma, _minus, b_k, lam = decay_tile(f[u].to(tl.float32), gamma, HAS_LB, EXACT)
            state = add_outer(scaled(state, tl.where(m, lam, 1.0), K), b_k, activated(v[u], m, V_ACT), K)
            b_o = dot_keys(state, activated(q[u], m, Q_ACT), K) + opposite[u]
            if ADD:
                b_o += before[u].to(tl.float32)
            tl.store(p_o + t * o_stride_t * K, b_o.to(p_o.dtype.element_ty), mask=(t < stored)[:, None])
        q = next_q
        f = next_f
        v = next_v
        before = next_before
        state2 = next_state2


@triton.jit(do_not_specialize=SIZES + strides_of("q f v o"))
def scan_out_kernel(
    q_ptr, f_ptr, v_ptr, lb_ptr, o_ptr, enter_ptr, leave_ptr, scratch_ptr, table_ptr, len_ptr,
    q_stride_b, q_stride_p, q_stride_t, q_stride_h, f_stride_b, f_stride_p, f_stride_t, f_stride_h,
    v_stride_b, v_stride_p, v_stride_t, v_stride_h, o_stride_b, o_stride_p, o_stride_t, o_stride_h,
    N, T, P, NS, NC, L, H,
    K: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr,
    BOTH: tl.constexpr, VARLEN: tl.constexpr, HAS_LEN: tl.constexpr, HAS_LB: tl.constexpr, Q_ACT: tl.constexpr,
    V_ACT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, HAS_ENTER: tl.constexpr, HAS_LEAVE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Outputs of each segment from the states that enter it; ADD: on top of what o holds.

    BLOCK (with BOTH, V = K): the opposite scan runs twice, so that outputs are written once.
    """
    inside, c, row, line, head, part, t0, stored, real = locate(
        program(ADD), N, table_ptr, len_ptr, T, P, NS, L, H, LANES, V // K, VARLEN, HAS_LEN
    )
    m_lane = inside[:, None]
    m_own = (part == 0)[:, None]  # one lane of a head writes its outputs
    o_k = part[:, None] * K + tl.arange(0, K)[None, :]
    gamma = tl.load(lb_ptr + head[:, None] * V + o_k) if HAS_LB else 0.0
    p_q = q_ptr + tile_at(row, line, head, part, t0, q_stride_b, q_stride_p, q_stride_t, q_stride_h, K, V)
    p_f = f_ptr + tile_at(row, line, head, part, t0, f_stride_b, f_stride_p, f_stride_t, f_stride_h, K, V)
    p_v = v_ptr + tile_at(row, line, head, part, t0, v_stride_b, v_stride_p, v_stride_t, v_stride_h, V, V)
    p_o = o_ptr + tile_at(row, line, head, part, t0, o_stride_b, o_stride_p, o_stride_t, o_stride_h, V, V)
    p_state = (c * H + head)[:, None] * V * V + o_k
    state = load_state(enter_ptr, p_state, m_lane, V) if HAS_ENTER else empty_state(LANES, K, V)
    p_second = p_state + NC.to(tl.int64) * H * V * V
    if BLOCK:
        state2 = load_state(enter_ptr, p_second, m_lane, K) if HAS_ENTER else empty_state(LANES, K, K)
        p_scratch = scratch_ptr + scratch_at(program(ADD), L // UNROLL * K, K, LANES)
        _out_both(
            state, state2, p_q, p_f, p_v, p_o, p_scratch, gamma, q_stride_t, f_stride_t, v_stride_t, o_stride_t,
            stored, real, L, K, LANES, UNROLL, FLIP, ADD, HAS_LB, Q_ACT, V_ACT, EXACT,
        )  # fmt: skip
    else:
        state = _out_pass(
            state, p_q, p_f, p_v, p_o, m_own, gamma, q_stride_t, f_stride_t, v_stride_t, o_stride_t, stored, real, L,
            K, V, UNROLL, FLIP, ADD, HAS_LB, Q_ACT, V_ACT, EXACT,
        )  # fmt: skip
        if HAS_LEAVE:
            store_state(leave_ptr, p_state, state, m_lane, V)
        if BOTH:
            # a token's sum may be written and read by different threads
            tl.debug_barrier()
            state = load_state(enter_ptr, p_second, m_lane, V) if HAS_ENTER else empty_state(LANES, K, V)
            _out_pass(
                state, p_q, p_f, p_v, p_o, m_own, gamma, q_stride_t, f_stride_t, v_stride_t, o_stride_t, stored, real,
                L, K, V, UNROLL, not FLIP, True, HAS_LB, Q_ACT, V_ACT, EXACT,
            )  # fmt: skip
