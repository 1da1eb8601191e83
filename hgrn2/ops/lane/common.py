"""What the Triton kernels for small states share: lanes, their tokens, and K x V states in registers. Head dims 1 to 8.

Shapes: B batch, T time, H heads, V head dim, K key channels a lane, L tokens a segment, NC segments in all.

One thread, a *lane*, owns one head of one segment of a line (a sequence, a document, or a row or column of a grid), or
K of its V key channels: two neighbours share a head of 8. The K x V state is V tiles `[lanes, K]`; tiles of q and f are
`[lanes, K]`, those of v `[lanes, V]`, so that a thread reads its values at once and sums over V never leave it. Lanes
run over heads first: neighbours read neighbouring memory.

Kernels see a segment in the order of the scan ("oriented"): FLIP turns a reverse scan into a forward one. BOTH runs the
opposite scan besides. The gradient of a state runs against its scan.

States between kernels are `[2, NC, H, V, K]` fp32: slot 0 of the oriented scan, slot 1 of the opposite one.
"""

import triton
import triton.language as tl

from hgrn2.ops.gates import activate_tile
from hgrn2.ops.launch import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)

# arguments that no kernel is specialised on: nothing recompiles for other sizes
SIZES = ["N", "T", "P", "NS", "NC", "L", "H"]


def strides_of(names: str) -> list[str]:
    """The stride arguments of tensors: batch, line, token, head."""
    return [f"{name}_stride_{dim}" for name in names.split() for dim in "bpth"]


@triton.jit
def column(x, j, V: tl.constexpr):
    """Column j (a constant) of x `[N, V]` as `[N, 1]`; a thread holds its row: zeros fold away, this costs nothing."""
    if V == 1:
        y = x
    else:
        here = tl.arange(0, V)[None, :] == j
        if _INTERPRET:
            y = tl.sum(tl.where(here, x, 0.0), axis=1)[:, None]
        else:
            bits = tl.where(here, x.to(tl.int32, bitcast=True), 0)
            y = tl.xor_sum(bits, axis=1).to(tl.float32, bitcast=True)[:, None]
    return y


@triton.jit
def empty_state(N: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    return (tl.zeros([N, K], dtype=tl.float32),) * V


@triton.jit
def scaled(state, x, V: tl.constexpr):
    """diag(x) S"""
    new = ()
    for j in tl.static_range(V):
        new = new + (state[j] * x,)
    return new


@triton.jit
def add_outer(state, x, y, V: tl.constexpr):
    """S + x (x) y"""
    new = ()
    for j in tl.static_range(V):
        new = new + (state[j] + x * column(y, j, V),)
    return new


@triton.jit
def dot_values(state, y, V: tl.constexpr):
    """S y, over V: `[N, K]`"""
    total = state[0] * column(y, 0, V)
    for j in tl.static_range(1, V):
        total += state[j] * column(y, j, V)
    return total


@triton.jit
def dot_keys(state, x, V: tl.constexpr):
    """S^T x, over the lane's K: `[N, V]`"""
    out = tl.zeros([x.shape[0], V], dtype=tl.float32)
    for j in tl.static_range(V):
        out = tl.where(tl.arange(0, V)[None, :] == j, tl.sum(state[j] * x, axis=1)[:, None], out)
    return out


@triton.jit
def over_head(x, PARTS: tl.constexpr):
    """Sum of x `[N, V]` over the lanes that share a head, for each of them."""
    if PARTS == 1:
        y = x
    else:
        heads: tl.constexpr = x.shape[0] // PARTS
        total = tl.sum(tl.reshape(x, [heads, PARTS, x.shape[1]]), axis=1, keep_dims=True)
        y = tl.reshape(tl.broadcast_to(total, [heads, PARTS, x.shape[1]]), [x.shape[0], x.shape[1]])
    return y


@triton.jit
def dot_states(a, b, V: tl.constexpr):
    """sum over V of A * B: `[N, K]`"""
    total = a[0] * b[0]
    for j in tl.static_range(1, V):
        total += a[j] * b[j]
    return total


@triton.jit
def load_state(ptr, p_state, mask, V: tl.constexpr):
    """States at offsets p_state `[N, K]` of their first rows, which are V values apart."""
    state = ()
    for j in tl.static_range(V):
        state = state + (tl.load(ptr + p_state + j * V, mask=mask, other=0.0),)
    return state


@triton.jit
def store_state(ptr, p_state, state, mask, V: tl.constexpr):
    for j in tl.static_range(V):
        tl.store(ptr + p_state + j * V, state[j], mask=mask)


@triton.jit
def program(ADD: tl.constexpr):
    """Number of this program; a second axis begins where the first one ended, with what is still in the cache."""
    pid = tl.program_id(0)
    return tl.num_programs(0) - 1 - pid if ADD else pid


@triton.jit
def locate(
    block, N, table_ptr, len_ptr, T, P, NS, L, H, LANES: tl.constexpr, PARTS: tl.constexpr, VARLEN: tl.constexpr,
    HAS_LEN: tl.constexpr,
):  # fmt: skip
    """The lanes of a block: (inside the grid, segment, row, line in it, head, which of its PARTS, first token, stored
    and real tokens).

    All `[LANES]`; a line is number `line` of P in batch row `row`, cut into NS segments.
    """
    n = tl.cast(block, tl.int64) * LANES + tl.arange(0, LANES)
    inside = n < N
    n = tl.where(inside, n, 0)
    part = n % PARTS
    n = n // PARTS
    c = n // H
    head = n - c * H
    if VARLEN:
        row = c * 0
        line = c * 0
        t0 = tl.load(table_ptr + c * 4 + 1)
        stored = tl.load(table_ptr + c * 4 + 2)
    else:
        i_line = c // NS
        t0 = ((c - i_line * NS) * L).to(tl.int32)
        row = i_line // P
        line = i_line - row * P
        stored = tl.minimum(T - t0, L)
    stored = tl.where(inside, stored, 0)
    real = stored
    if HAS_LEN:
        real = tl.minimum(stored, tl.maximum(tl.load(len_ptr + row).to(tl.int32) - t0, 0))
    return inside, c, row, line, head, part, t0, stored, real


@triton.jit
def tile_at(
    row, line, head, part, t0, stride_b, stride_p, stride_t, stride_h, K: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """Offsets `[LANES, K]` of K of V channels at each lane's first token.

    Strides count V values: loads are then known to be wide.
    """
    first = row * stride_b + line * stride_p + t0.to(tl.int64) * stride_t + head * stride_h
    first = first * V + part * K if K < V else first * V
    return first[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def place(i, L, FLIP: tl.constexpr):
    """Token of a segment that is the i-th in the order of the scan."""
    return L - 1 - i if FLIP else i


@triton.jit
def load_rows(ptr, i, stride, rows, L, other, V: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr):
    """Tiles of UNROLL tokens from the i-th on, `other` beyond the segment: all on their way before one is used."""
    tiles = ()
    for u in tl.static_range(UNROLL):
        t = place(i + u, L, FLIP)
        if FLIP:
            t = tl.where(t >= 0, t, L)
        tiles = tiles + (tl.load(ptr + t * stride * V, mask=(t < rows)[:, None], other=other),)
    return tiles


@triton.jit
def activated(x, mask, ACT: tl.constexpr):
    """fp32 tile after its activation; 0 where masked."""
    y = x.to(tl.float32)
    if ACT != 0:
        y = tl.where(mask, activate_tile(y, ACT), 0.0)
    return y


@triton.jit
def scratch_at(block, rows, K: tl.constexpr, LANES: tl.constexpr):
    """Offsets of a block's scratch, `[rows, LANES, K]`."""
    first = tl.cast(block, tl.int64) * rows * LANES + tl.arange(0, LANES)
    return (first * K)[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def store_checkpoint(ptr, index, state, K: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr):
    """Keep all lanes' states in scratch `[., LANES, K]`, V rows of it."""
    for j in tl.static_range(V):
        tl.store(ptr + (index * V + j) * (LANES * K), state[j])


@triton.jit
def load_checkpoint(ptr, index, K: tl.constexpr, V: tl.constexpr, LANES: tl.constexpr):
    """States kept as number `index`; the first ones in the place of any before them."""
    index = tl.maximum(index, 0)
    state = ()
    for j in tl.static_range(V):
        state = state + (tl.load(ptr + (index * V + j) * (LANES * K)),)
    return state


@triton.jit
def load_scratch(ptr, i, L, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr):
    """Scratch of UNROLL tokens from the i-th on; that of the segment's ends in the place of any beyond."""
    tiles = ()
    for u in tl.static_range(UNROLL):
        t = tl.maximum(place(i + u, L, FLIP), 0) if FLIP else tl.minimum(i + u, L - 1)
        tiles = tiles + (tl.load(ptr + t * (K * LANES)),)
    return tiles
