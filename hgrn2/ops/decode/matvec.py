"""Decoding's matrix-vector products on Triton, with what surrounds them: a step is bound by reading its weights once.

    y_b = W n(x_b) + bias + residual_b        n: nothing, RMS or layer norm over the full width N, or a GLU's gating

Legend: B rows of x (few), N width of x, M width of y. A program owns BM rows of W in registers and goes once through x.

On Hopper and later a kernel may start while the one before it still runs (programmatic dependent launch): it may read
what that one does not write, and then waits. No kernel here lets its successor start before its own wait, so whatever
ran two or more kernels ago is complete; the caller vouches for the one before.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2.ops.decode.step import LIMITS
from hgrn2.ops.gates import ACTIVATIONS, triton
from hgrn2.ops.launch import kinds, launch

MAX_ROWS = 2  # measured on an H200: torch's products (tensor cores) are as fast from 4 rows on
MAX_WIDTH = 8192
_NORMS = {None: 0, "rms": 1, "layer": 2}
_ELEMENTS = 8192  # of W a program, in registers
_WARPS = 4

if triton is not None:
    import triton.language as tl

    from hgrn2.ops.gates import activate_tile

    @triton.jit(do_not_specialize=["B", "M"])
    def matvec_kernel(
        x_ptr, w_ptr, bias_ptr, g_ptr, shift_ptr, res_ptr, y_ptr, eps, B, M,
        BB: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
        HAS_BIAS: tl.constexpr, HAS_G: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RES: tl.constexpr,
        START: tl.constexpr,
    ):  # fmt: skip
        """x `[B, N]` (`[B, 2N]` if gated), W `[M, N]`, bias `[M]`, g and shift `[N]` of the norm, residual `[B, M]` ->
        y `[B, M]`. GATE: the gating's activation, or -1; START as `matvec`."""
        if START == 2:
            tl.extra.cuda.gdc_wait()
        if START == 1 or START == 2:
            tl.extra.cuda.gdc_launch_dependents()
        # all tiles are [B, M, N], loaded so: their layouts agree, and none goes through shared memory to meet another
        o_b = tl.arange(0, BB)[:, None, None]
        o_m = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :, None]
        o_n = tl.arange(0, BN)[None, None, :]
        m_n = o_n < N
        p_w = w_ptr + o_m.to(tl.int64) * N + o_n
        w = tl.load(p_w, mask=(o_m < M) & m_n, other=0.0, eviction_policy="evict_first")
        if HAS_G:
            g = tl.load(g_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        # also where nothing is left to wait for: no load moves past it, so that all of W is under way before the sums
        if START > 0:
            tl.extra.cuda.gdc_wait()
        if START == 3:
            tl.extra.cuda.gdc_launch_dependents()
        m_x = (o_b < B) & m_n
        p_x = x_ptr + o_b * (N if GATE < 0 else 2 * N) + o_n
        x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        if GATE >= 0:
            x = activate_tile(x, GATE) * tl.load(p_x + N, mask=m_x, other=0.0).to(tl.float32)
        if NORM == 2:
            x = tl.where(m_x, x - tl.sum(x, axis=2, keep_dims=True) / N, 0.0)
        if NORM > 0:
            scale = tl.rsqrt(tl.sum(x * x, axis=2) / N + eps)
        if NORM == 2:
            x *= scale[:, :, None]
        if HAS_G:
            x *= g
        if HAS_SHIFT:
            x += shift
        y = tl.sum(w.to(tl.float32) * x, axis=2)
        if NORM == 1:  # here, so that neither sum waits for the other
            y *= scale
        o_b = tl.arange(0, BB)[:, None]
        o_m = (tl.program_id(0) * BM + tl.arange(0, BM))[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + o_m, mask=o_m < M, other=0.0).to(tl.float32)
        o_y = o_b * M + o_m
        m_y = (o_b < B) & (o_m < M)
        if HAS_RES:
            y += tl.load(res_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)
        tl.store(y_ptr + o_y, y.to(y_ptr.dtype.element_ty), mask=m_y)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[str, Tensor | None, Tensor | None, float] | None = None,
    gate: str | None = "no",
    residual: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """`F.linear(n(x), weight, bias) + residual` for contiguous x `[B, N]` and weight `[M, N]`; sums in fp32.

    norm: ("rms" | "layer", weight, bias, eps); an RMS norm has no bias.
    gate: the activation of a GLU: x is `[B, 2N]` and n(x) = act(first half) * second half; "no" for no GLU.
    start, from compute capability 9.0 on (0 elsewhere): 1 after the kernel before, letting the next start early; 2 the
    same with the launch itself ahead of time; 3 besides reading the weights early, which the kernel before must not
    have written.
    """
    rows, (out, width) = x.shape[0], weight.shape
    y = torch.empty((rows, out), dtype=x.dtype, device=x.device)
    kind, g, shift, eps = (None, None, None, 0.0) if norm is None else norm
    padded, n_rows = 1 << (width - 1).bit_length(), 1 << (rows - 1).bit_length()
    wide = 2 if padded > 4096 else 1  # two rows of W at least for each pass over x
    tile = max(1, wide * _ELEMENTS // padded)
    args = (x, weight, bias, g, shift, residual, y, eps, rows, out)
    constants = dict(
        BB=n_rows, N=width, BM=tile, BN=padded, NORM=_NORMS[kind], GATE=-1 if gate == "no" else ACTIVATIONS.index(gate),
        HAS_BIAS=bias is not None, HAS_G=g is not None, HAS_SHIFT=shift is not None, HAS_RES=residual is not None,
        START=start,
    )  # fmt: skip
    key = kinds((x, weight, bias, g, shift, residual))
    launch(matvec_kernel, -(-out // tile), args, constants, wide * _WARPS, key, pdl=start > 1)
    return y


@functools.cache
def early_start(index: int) -> bool:
    """Whether the device can start a kernel before its predecessor ends."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


def matvec_supported(index: int, rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `matvec` runs and is right on CUDA device `index`, and is worth it; tests it at first use."""
    return 0 < rows <= MAX_ROWS and _checked(index, width, dtype)


@functools.cache
def _checked(index: int, width: int, dtype: torch.dtype) -> bool:
    if triton is None or torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    if width > MAX_WIDTH or width % 8 or dtype not in LIMITS:  # rows of W in steps of 16 bytes
        return False
    from hgrn2.ops.selftest import remembered

    reason = remembered(index, ["matvec", width, str(dtype)], lambda: _self_test(index, width, dtype))
    if reason is not None:
        warnings.warn(f"decoding falls back to torch's products: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


def _self_test(index: int, width: int, dtype: torch.dtype) -> str | None:
    """None if products after each norm agree with torch in fp32, else what is wrong."""
    device = torch.device("cuda", index)
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((2, width), (301, width), (2, 301), (width,), (width,))
    x, weight, residual, g, shift = (
        torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes
    )
    wide = x.float(), g.float(), shift.float()
    cases = (
        (None, wide[0]),
        (("rms", g, None, 1e-5), F.rms_norm(wide[0], (width,), wide[1], 1e-5)),
        (("layer", g, shift, 1e-5), F.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-5)),
    )
    for norm, a in cases:
        want = (a.double() @ weight.double().T + residual.double()).float()
        y = matvec(x, weight, norm=norm, residual=residual, start=2 if early_start(index) else 0)
        error = float((y.float() - want).norm() / want.norm())
        if not error < LIMITS[dtype]:
            return f"the product of width {width}, {dtype}, norm {norm and norm[0]} is off by {error:.1e}"
    return None
