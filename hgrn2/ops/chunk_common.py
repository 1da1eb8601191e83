"""What the chunked Triton kernels share: where a chunk's tokens lie, products and decay sums. Head dims 16 to 256.

Shapes: B batch, T time, H heads, K = V head dim, N sequences, C tokens a chunk, NC chunks in all.

Time is cut into chunks of C tokens. Within one, with g = log2 lam, let `G_i` be the sum of g from the chunk's start up
to token i, `R_j` the sum after token j to the chunk's end, and total = G_j + R_j. The score of tokens i >= j is
`A_ij = sum_d q_id k_jd 2^(G_id - G_jd)`. Per chunk and head the data choose one of two ways to form it:

- fast: every channel's total is above -`FAST_LIMIT` (log2). Then the factors `qx = q 2^G` and `kx = k 2^-G` are finite,
  and their one product gives all scores.
- safe: pairs are grouped by halving. At level s, blocks of 2s tokens split in halves; i in the second half and j in the
  first meet at the boundary b, `2^(G_i - G_b) 2^(G_b - G_j)`, where both exponents are sums of g, never positive:
  nothing can overflow, and what underflows is negligible. log2 C levels and the diagonal cover each pair once. kx is
  `k 2^R` here.

The same factors serve the chunk's state, S_C = 2^total S_0 + scale kx^T v with scale = 2^total (fast) or 1 (safe). So
they are formed once, by `chunk_factor_kernel`, and the later kernels are little but products. Buffers of factors are
`[NC, H, C, K]`, zero where a chunk has no token.

Reverse scans run the same kernels with the token order flipped at loads and stores of tokens.
"""

import triton
import triton.language as tl

from hgrn2.ops.gates import round_tf32

# the factors then stay inside the range of fp32 and bf16, with room for q; fp32 inputs keep more digits of the exponent
FAST_LIMIT = 110.0
FAST_LIMIT_FP32 = 12.0


@triton.jit
def locate(c, table_ptr, T, NT, C: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr):
    """Chunk c: (sequence, batch row, first token, valid rows, opens its sequence, ends it)."""
    if VARLEN:
        n = tl.load(table_ptr + c * 4)
        t0 = tl.load(table_ptr + c * 4 + 1)
        rows = tl.load(table_ptr + c * 4 + 2)
        flags = tl.load(table_ptr + c * 4 + 3)
        b = n * 0
        first = (flags & 1) != 0
        last = (flags & 2) != 0
    else:
        n = c // NT
        i_t = c - n * NT
        b = n
        rows = tl.minimum(T - i_t * C, C)
        t0 = T - 1 - i_t * C if REVERSE else i_t * C
        first = i_t == 0
        last = i_t == NT - 1
    return n, b.to(tl.int64), t0, rows, first, last


@triton.jit
def row_masks(t0, rows, n, len_ptr, C: tl.constexpr, REVERSE: tl.constexpr, HAS_LEN: tl.constexpr):
    """(signed row offsets, rows inside the sequence's storage, rows that are real tokens), each `[C]`."""
    o_c = tl.arange(0, C)
    m_in = o_c < rows
    o_t = -o_c if REVERSE else o_c
    m_real = m_in
    if HAS_LEN:
        m_real = m_in & (t0 + o_t < tl.load(len_ptr + n))
    return o_t, m_in, m_real


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in fp32: operands in bf16 ("bf16"), rounded to tf32 ("tf32"), or fp32 in tf32 parts or exactly."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "tf32":
        return tl.dot(round_tf32(a.to(tl.float32)), round_tf32(b.to(tl.float32)), acc, input_precision="tf32")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def load_mask(mask_ptr, index, C: tl.constexpr):
    """Mask `index` of `[n, C, C]` (see `tiles.sum_masks`): built in registers, it would cost more than its product."""
    o_c = tl.arange(0, C)
    return tl.load(mask_ptr + index * (C * C) + o_c[:, None] * C + o_c[None, :])


@triton.jit
def finite(f):
    """Logits in [-10000, 10000], NaN kept: a product with the identity would spread an infinity over its column."""
    f = tl.maximum(f, -10000.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(f, 10000.0, propagate_nan=tl.PropagateNan.ALL).to(f.dtype)


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
def masked_sum(mask, x, acc, SPLIT: tl.constexpr):
    """mask `[C, C]` of 0 and 1 times x `[C, K]`: sums of rows on the tensor cores.

    x is split into SPLIT bf16 parts (8 bits each; the mask is exact), so 3 keeps fp32 precision and 2 keeps 16 bits.
    SPLIT 0 is a plain fp32 product, for the interpreter.
    """
    if SPLIT == 0:
        return tl.dot(mask.to(tl.float32), x, acc, input_precision="ieee")
    for _ in tl.static_range(SPLIT - 1):
        # cut off, not rounded: the part is then also known in fp32 without a conversion back
        part = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        acc = tl.dot(mask, part.to(tl.bfloat16), acc)
        x = x - part
    return tl.dot(mask, x.to(tl.bfloat16), acc)


@triton.jit
def meeting_pairs(shift, C: tl.constexpr, TRANSPOSE: tl.constexpr):
    """`[C, C]`: the pairs i > j (TRANSPOSE: j > i) that meet at halving level s = 2^shift."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    half_i = i >> shift
    half_j = j >> shift
    same = (half_i >> 1) == (half_j >> 1)
    return same & ((half_i - half_j) == (-1 if TRANSPOSE else 1))
