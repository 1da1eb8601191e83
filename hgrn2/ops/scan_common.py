"""What the Triton kernels for small states share: lanes, their tokens, and K x V states in registers. Head dims 1 to 8.

Shapes: B batch, T time, H heads, K = V head dim, L tokens a segment, NC segments in all.

One thread, a *lane*, owns one head of one segment of a line (a sequence, a document, or a row or column of a grid): its
K x V state is V tiles `[lanes, K]`, and every tile of q, f, v is `[lanes, K]`, so that a thread reads a head's K values
at once and sums over K or V never leave it. Lanes run over heads first: neighbours read neighbouring memory.

Kernels see a segment in the order of the scan ("oriented"): FLIP turns a reverse scan into a forward one. BOTH runs the
opposite scan besides. The gradient of a state runs against its scan.

States between kernels are `[2, NC, H, V, K]` fp32: slot 0 of the oriented scan, slot 1 of the opposite one.
"""

import triton
import triton.language as tl

from hgrn2.ops import tiles
from hgrn2.ops.gates import activate_tile

_INTERPRET = tl.constexpr(tiles.INTERPRET)

# arguments that no kernel is specialised on: nothing recompiles for other sizes
SIZES = ["N", "T", "P", "NS", "NC", "L", "H"]


def strides_of(names: str) -> list[str]:
    """The stride arguments of tensors: batch, line, token, head."""
    return [f"{name}_stride_{dim}" for name in names.split() for dim in "bpth"]


@triton.jit
def column(x, j, K: tl.constexpr):
    """Column j (a constant) of x `[N, K]` as `[N, 1]`; a thread holds its row: zeros fold away, this costs nothing."""
    if K == 1:
        y = x
    else:
        here = tl.arange(0, K)[None, :] == j
        if _INTERPRET:
            y = tl.sum(tl.where(here, x, 0.0), axis=1)[:, None]
        else:
            bits = tl.where(here, x.to(tl.int32, bitcast=True), 0)
            y = tl.xor_sum(bits, axis=1).to(tl.float32, bitcast=True)[:, None]
    return y


@triton.jit
def empty_state(N: tl.constexpr, K: tl.constexpr):
    return (tl.zeros([N, K], dtype=tl.float32),) * K


@triton.jit
def scaled(state, x, K: tl.constexpr):
    """diag(x) S"""
    new = ()
    for j in tl.static_range(K):
        new = new + (state[j] * x,)
    return new


@triton.jit
def add_outer(state, x, y, K: tl.constexpr):
    """S + x (x) y"""
    new = ()
    for j in tl.static_range(K):
        new = new + (state[j] + x * column(y, j, K),)
    return new


@triton.jit
def dot_values(state, y, K: tl.constexpr):
    """S y, over V: `[N, K]`"""
    total = state[0] * column(y, 0, K)
    for j in tl.static_range(1, K):
        total += state[j] * column(y, j, K)
    return total


@triton.jit
def dot_keys(state, x, K: tl.constexpr):
    """S^T x, over K: `[N, V]`"""
    out = x
    for j in tl.static_range(K):
        out = tl.where(tl.arange(0, K)[None, :] == j, tl.sum(state[j] * x, axis=1)[:, None], out)
    return out


@triton.jit
def dot_states(a, b, K: tl.constexpr):
    """sum over V of A * B: `[N, K]`"""
    total = a[0] * b[0]
    for j in tl.static_range(1, K):
        total += a[j] * b[j]
    return total


@triton.jit
def load_state(ptr, p_state, mask, K: tl.constexpr):
    """`[..., V, K]` at offsets p_state `[N, K]` of its first row."""
    state = ()
    for j in tl.static_range(K):
        state = state + (tl.load(ptr + p_state + j * K, mask=mask, other=0.0),)
    return state


@triton.jit
def store_state(ptr, p_state, state, mask, K: tl.constexpr):
    for j in tl.static_range(K):
        tl.store(ptr + p_state + j * K, state[j], mask=mask)


@triton.jit
def locate(
    block, N, table_ptr, len_ptr, T, P, NS, L, H, LANES: tl.constexpr, VARLEN: tl.constexpr, HAS_LEN: tl.constexpr
):  # fmt: skip
    """The lanes of a block: (inside the grid, segment, row, line in it, head, first token, stored and real tokens).

    All `[LANES]`; a line is number `line` of P in batch row `row`, cut into NS segments.
    """
    n = tl.cast(block, tl.int64) * LANES + tl.arange(0, LANES)
    inside = n < N
    n = tl.where(inside, n, 0)
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
    return inside, c, row, line, head, t0, stored, real


@triton.jit
def tile_at(
    row, line, head, t0, stride_b, stride_p, stride_t, stride_h, K: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Offsets `[LANES, K]` of each lane's first token; strides count WIDTH values: loads are then known to be wide."""
    first = row * stride_b + line * stride_p + t0.to(tl.int64) * stride_t + head * stride_h
    return (first * WIDTH)[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def place(i, L, FLIP: tl.constexpr):
    """Token of a segment that is the i-th in the order of the scan."""
    return L - 1 - i if FLIP else i


@triton.jit
def load_rows(ptr, i, stride, rows, L, other, K: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr):
    """Tiles of UNROLL tokens from the i-th on: all on their way before the first is used."""
    tiles = ()
    for u in tl.static_range(UNROLL):
        t = place(i + u, L, FLIP)
        tiles = tiles + (tl.load(ptr + t * stride * K, mask=(t < rows)[:, None], other=other),)
    return tiles


@triton.jit
def activated(x, mask, ACT: tl.constexpr):
    """fp32 tile after its activation; 0 where masked."""
    y = x.to(tl.float32)
    if ACT != 0:
        y = tl.where(mask, activate_tile(y, ACT), 0.0)
    return y


@triton.jit
def scratch_at(rows, K: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """Offsets of this program's scratch, `[rows, LANES, WIDTH]`."""
    first = tl.program_id(0).to(tl.int64) * rows * LANES + tl.arange(0, LANES)
    return (first * WIDTH)[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def store_checkpoint(ptr, index, state, K: tl.constexpr, LANES: tl.constexpr):
    """Keep all lanes' states in scratch `[., LANES, K]`, V rows of it."""
    for j in tl.static_range(K):
        tl.store(ptr + (index * K + j) * (LANES * K), state[j])


@triton.jit
def load_checkpoint(ptr, index, K: tl.constexpr, LANES: tl.constexpr):
    state = ()
    for j in tl.static_range(K):
        state = state + (tl.load(ptr + (index * K + j) * (LANES * K)),)
    return state


@triton.jit
def store_scratch(ptr, t, x, K: tl.constexpr, LANES: tl.constexpr):
    """Keep the fp32 tile of token t. One of eight columns is stored in two 16-bit halves, upper and lower: a thread
    stores 16 bytes at most, and a tile spread over more threads would have to be moved between them."""
    if K == 8:
        bits = x.to(tl.int32, bitcast=True)
        tl.store(ptr + t * (2 * K * LANES), (bits >> 16).to(tl.int16))
        tl.store(ptr + t * (2 * K * LANES) + K, bits.to(tl.int16))
    else:
        tl.store(ptr + t * (K * LANES), x)


@triton.jit
def load_scratch(ptr, i, L, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, FLIP: tl.constexpr):
    """What `store_scratch` kept of UNROLL tokens from the i-th on."""
    tiles = ()
    for u in tl.static_range(UNROLL):
        t = place(i + u, L, FLIP)
        if K == 8:
            upper = tl.load(ptr + t * (2 * K * LANES))
            lower = tl.load(ptr + t * (2 * K * LANES) + K)
            x = ((upper.to(tl.int32) << 16) | (lower.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)
        else:
            x = tl.load(ptr + t * (K * LANES))
        tiles = tiles + (x,)
    return tiles
