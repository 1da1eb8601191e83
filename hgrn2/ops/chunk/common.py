"""What the chunked Triton kernels share: where a chunk's tokens lie, products and decay sums. Head dims 16 to 256.

Shapes: B batch, T time, H heads, K = V head dim, N sequences, C tokens a chunk, NC chunks in all.

Time is cut into chunks of C tokens. Within one, with g = log2 lam, let `G_i` be the sum of g from the chunk's start up
to token i, `R_j` the sum after token j to the chunk's end, and total = G_j + R_j. The score of tokens i >= j is
`A_ij = sum_d q_id k_jd 2^(G_id - G_jd)`. Per chunk and head the data choose one of two ways to form it:

- fast: every channel's total is above -`FAST_LIMIT` (log2; two scans at once: -`FAST_LIMIT_PAIR`). Then the factors `qx
  = q 2^G` and `kx = k 2^-G` are finite, and their one product gives all scores.
- safe: pairs are grouped by halving. At level s, blocks of 2s tokens split in halves; i in the second half and j in the
  first meet at the boundary b, `2^(G_i - G_b) 2^(G_b - G_j)`, where both exponents are sums of g, never positive:
  nothing can overflow, and what underflows is negligible. Each token needs one factor a level, of q or of k. kx is
  `k 2^R` here.
  With 16-bit inputs halving stops at blocks of 2^SUB = 16 tokens, which take one product as fast chunks do, of factors
  centred on each block's middle and with g cut off at `BLOCK_LIMIT` a token: the pairs that cross such a token are
  under their rounding anyway, only the gradient of its own g has to be put right. fp32 inputs (SUB 0) halve to the end.

The same factors serve the chunk's state, S_C = 2^total S_0 + scale kx^T v with scale = 2^total (fast) or 1 (safe). So
they are formed once, by `chunk_factor_kernel`, and the later kernels are little but products. Buffers of factors are
`[NC, H, C, K]`, zero where a chunk has no token.

Reverse scans run the same kernels with the token order flipped at loads and stores of tokens.
"""

import triton
import triton.language as tl

from hgrn2.ops.gates import _INTERPRET, exact_exp2, fast_exp2, round_tf32

# the factors then stay inside the range of fp32 and bf16, with room for q; fp32 inputs keep more digits of the exponent
FAST_LIMIT = 110.0
FAST_LIMIT_FP32 = 12.0
# of two scans at once the one back has its large factors in q 2^-E (see `pair_forward`), and q has no bound as k has
FAST_LIMIT_PAIR = 100.0
# half a block of 16 tokens then sums to at most 110 either way
BLOCK_LIMIT = tl.constexpr(13.75)


@triton.jit
def locate(c, table_ptr, len_ptr, T, NT, P, sign, has_len, C: tl.constexpr, VARLEN: tl.constexpr):
    """Chunk c: (sequence, its b and p, first token, valid rows, opens its sequence, ends it, first token not real).

    Sequences are numbered through `[B, P]`, whose strides are any (a grid's columns: P = X); 1-D batches have P = 1.
    sign is -1 for reverse scans; len_ptr holds the real lengths if has_len is not 0.
    """
    if VARLEN:
        n = tl.load(table_ptr + c * 4)
        t0 = tl.load(table_ptr + c * 4 + 1)
        rows = tl.load(table_ptr + c * 4 + 2)
        flags = tl.load(table_ptr + c * 4 + 3)
        b = n * 0
        p = b
        first = (flags & 1) != 0
        last = (flags & 2) != 0
    else:
        n = c // NT
        i_t = c - n * NT
        b = c // (NT * P)  # not n // P: divisions side by side take fewer registers
        p = n - b * P
        rows = tl.minimum(T - i_t * C, C)
        t0 = tl.where(sign < 0, T - 1 - i_t * C, i_t * C)
        first = i_t == 0
        last = i_t == NT - 1
    length = tl.load(len_ptr + n, mask=has_len != 0, other=2147483647)
    return n, b.to(tl.int64), p.to(tl.int64), t0, rows, first, last, length


@triton.jit
def row_masks(t0, rows, length, sign, C: tl.constexpr):
    """(signed row offsets, rows inside the sequence's storage, rows that are real tokens), each `[C]`."""
    o_c = tl.arange(0, C)
    m_in = o_c < rows
    o_t = o_c * sign
    return o_t, m_in, m_in & (t0 + o_t < length)


@triton.jit
def backwards(o_r, rows, C: tl.constexpr):
    """The places in a chunk that its tokens o_r, counted from the last, have from the first; of no token, elsewhere."""
    return (rows - 1 - o_r) & (C - 1)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in fp32: operands in bf16 ("bf16"), rounded to tf32 ("tf32"), or fp32 in tf32 parts or exactly.

    Of fp32 operands the product is summed on its own first: acc is then rounded once a product, not once a term.
    """
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "tf32":
        return tl.dot(round_tf32(a.to(tl.float32)), round_tf32(b.to(tl.float32)), acc, input_precision="tf32")
    else:
        # settled, or the compiler would sum into acc
        return acc + settle(tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION))


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """x as `product` reads it."""
    if PRECISION == "bf16":
        y = x.to(tl.bfloat16)
    elif PRECISION == "tf32":
        y = round_tf32(x)
    else:
        y = x
    return y


@triton.jit
def decay(x, PRECISION: tl.constexpr):
    """2^x; a relative error of 1e-7 for fp32 inputs, else the hardware's 2^-22."""
    if PRECISION == "tf32x3" or PRECISION == "ieee":
        y = exact_exp2(x)
    else:
        y = fast_exp2(x)
    return y


@triton.jit
def load_mask(mask_ptr, index, C: tl.constexpr):
    """Mask `index` of `[n, C, C]` (see `tiles.sum_masks`): built in registers, it would cost more than its product."""
    o_c = tl.arange(0, C)
    return tl.load(mask_ptr + index * (C * C) + o_c[:, None] * C + o_c[None, :])


@triton.jit
def finite(f):
    """Logits in [-10000, 10000], NaN kept: a product with the identity would spread an infinity over its column."""
    x = tl.maximum(f.to(tl.float32), -10000.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, 10000.0, propagate_nan=tl.PropagateNan.ALL).to(f.dtype)


@triton.jit
def to_accumulator(x, eye):
    """x `[C, K]` in fp32, laid out as the products' accumulators are.

    Multiplying 16-bit tiles by the identity is exact and does this on the tensor cores, straight from shared memory.
    Left to itself the compiler computes the gates once for every layout that a later product asks for.
    """
    if x.dtype == tl.float32:
        y = x
    else:
        y = tl.dot(eye.to(x.dtype), x)
    return y


@triton.jit
def settle(x):
    """x, in an instruction that the compiler may neither repeat nor see through.

    Where a product reads a tile in another layout, it would else compute all that led to the tile once more.
    """
    if _INTERPRET:
        y = x
    else:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], tl.float32, is_pure=False, pack=1)
    return y


@triton.jit
def masked_sum(mask, x, acc, SPLIT: tl.constexpr):
    """mask `[C, C]` of 0 and 1 times x `[C, K]`: sums of rows on the tensor cores.

    x is split into SPLIT bf16 parts (8 bits each; the mask is exact), so 3 keeps fp32 precision and 2 keeps 16 bits.
    SPLIT 0 is a plain fp32 product, for the interpreter.
    """
    if SPLIT == 0:
        return tl.dot(mask.to(tl.float32), x, acc, input_precision="ieee")
    parts = ()
    for _ in tl.static_range(SPLIT - 1):
        # cut off, not rounded: the part is then also known in fp32 without a conversion back
        part = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        parts = parts + (part,)
        x = x - part
    if SPLIT < 3:
        for i in tl.static_range(SPLIT - 1):
            acc = tl.dot(mask, parts[i].to(tl.bfloat16), acc)
        return tl.dot(mask, x.to(tl.bfloat16), acc)
    # tensor cores cut sums off: the smallest first
    total = tl.dot(mask, x.to(tl.bfloat16))
    for i in tl.static_range(SPLIT - 2, -1, -1):
        total = tl.dot(mask, parts[i].to(tl.bfloat16), total)
    return acc + total


@triton.jit
def meeting_pairs(shift, C: tl.constexpr):
    """`[C, C]`: the pairs that meet at halving level s = 2^shift, in either order."""
    i = tl.arange(0, C)[:, None] >> shift
    j = tl.arange(0, C)[None, :] >> shift
    return (i ^ j) == 1
