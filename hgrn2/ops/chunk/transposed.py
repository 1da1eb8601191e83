"""What the kernels on transposed tiles share: channels by tokens, `[BK, M]`, M = 32 tokens.

A tensor core's accumulator is laid out as its first operand is (16-bit products), if warps split channels only: what
one product gave enters the next as it is, where a second operand would go through shared memory. Sums over tokens are
products with constant masks as second operands. Loaded ahead of all loops, these stay in shared memory; Triton reads
one there at each product only if that is its one use, and keeps it in registers all along else: hence the copies.
"""

import triton
import triton.language as tl

from hgrn2.ops.chunk.common import finite
from hgrn2.ops.gates import activate_tile, gate_tile

# indices of `tiles.sum_masks` for 32 tokens, whose rows are what is summed here
EYE, LEVEL, BLOCK_UP_TO, LATER, EARLIER, CENTRED, BLOCK_LATER, BLOCK_AFTER = (
    tl.constexpr(i) for i in (0, 3, 13, 15, 16, 17, 18, 19)
)


@triton.jit
def mask_copy(mask_ptr, index, number: tl.constexpr, zero_, M: tl.constexpr):
    """Copy `number` of mask `index` `[M, M]`; zero_ is a zero that the compiler does not know of."""
    o_m = tl.arange(0, M)
    return tl.load(mask_ptr + zero_ * (16 * number) + index * (M * M) + o_m[:, None] * M + o_m[None, :])


@triton.jit
def mask_parts(mask_ptr, index, zero_, M: tl.constexpr):
    """A mask for each of the parts of `token_sum`."""
    return (
        mask_copy(mask_ptr, index, 0, zero_, M),
        mask_copy(mask_ptr, index, 1, zero_, M),
        mask_copy(mask_ptr, index, 2, zero_, M),
    )


@triton.jit
def token_sum(x, masks, acc, SPLIT: tl.constexpr):
    """x `[BK, M]` times a mask `[M, M]`, plus acc: `masked_sum` for transposed tiles."""
    if SPLIT == 0:
        return tl.dot(x, masks[0].to(tl.float32), acc, input_precision="ieee")
    parts = ()
    for _ in tl.static_range(SPLIT - 1):
        # cut off, not rounded: the part is then also known in fp32 without a conversion back
        part = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        parts = parts + (part,)
        x = x - part
    if SPLIT < 3:
        for i in tl.static_range(SPLIT - 1):
            acc = tl.dot(parts[i].to(tl.bfloat16), masks[i], acc)
        return tl.dot(x.to(tl.bfloat16), masks[SPLIT - 1], acc)
    total = tl.dot(x.to(tl.bfloat16), masks[SPLIT - 1])
    for i in tl.static_range(SPLIT - 2, -1, -1):
        total = tl.dot(parts[i].to(tl.bfloat16), masks[i], total)
    return acc + total


@triton.jit
def transposed(x, eye):
    """x `[M, BK]` in fp32 as `[BK, M]`, laid out as the products' accumulators are (see `to_accumulator`)."""
    if x.dtype == tl.float32:
        y = tl.trans(x)
    else:
        y = tl.dot(tl.trans(x), eye.to(x.dtype))
    return y


@triton.jit
def gated_half(
    p_q, p_f, q_stride_t, f_stride_t, o_r, t0, rows, length, sign, gamma, eyes, HAS_LB: tl.constexpr,
    Q_ACT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """q after activation, k and log2 lam of the tokens o_r of a chunk, transposed."""
    o_t = o_r * sign
    real = (o_r < rows) & (t0 + o_t < length)
    b_f = finite(tl.load(p_f + o_t[:, None] * f_stride_t, mask=real[:, None], other=100.0))
    b_q = tl.load(p_q + o_t[:, None] * q_stride_t, mask=real[:, None], other=0.0)
    _sigma, _minus, b_k, _lam, b_g = gate_tile(transposed(b_f, eyes[0]), gamma, HAS_LB, EXACT)
    b_q = transposed(b_q, eyes[1])
    if Q_ACT != 0:
        b_q = tl.where(real[None, :], activate_tile(b_q, Q_ACT), 0.0)
    return b_q, b_k, b_g
