"""Decoding's matrix-vector products on Triton, the output norm inside: what a mixer's step is bound by is its weights.

    y_b = W n(x_b) + bias         n: identity, RMS norm or layer norm over the full width N

Legend: B rows of x (few), N width of x, M width of y. A program owns BM rows of W in registers and goes once through x.

On Hopper and later a kernel may start while the one before it still runs (programmatic dependent launch): it may read
what that one does not write, and then waits. No kernel here lets its successor start before its own wait, so whatever
ran two or more kernels ago is complete; the caller vouches for the one before.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgrn2.ops import tiles
from hgrn2.ops.gates import ACTIVATIONS, triton
from hgrn2.ops.launch import kinds, launch
from hgrn2.ops.step import LIMITS, run_step, step_supported

MAX_ROWS = 8
MAX_WIDTH = 8192
_NORMS = {None: 0, "rms": 1, "layer": 2}
# elements of W a program and its warps, by rows of x: in registers, with room for the products
_TILES = {1: (8192, 4), 2: (8192, 4), 4: (8192, 8), 8: (8192, 8)}

if triton is not None:
    import triton.language as tl

    @triton.jit(do_not_specialize=["B", "M"])
    def matvec_kernel(
        x_ptr, w_ptr, bias_ptr, g_ptr, shift_ptr, y_ptr, eps, B, M,
        BB: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
        HAS_BIAS: tl.constexpr, HAS_G: tl.constexpr, HAS_SHIFT: tl.constexpr, START: tl.constexpr,
    ):  # fmt: skip
        """x `[B, N]`, W `[M, N]`, bias `[M]`, g and shift `[N]` (the norm's) -> y `[B, M]`; START as `matvec`."""
        if START == 2:
            tl.extra.cuda.gdc_wait()
        if START == 1 or START == 2:
            tl.extra.cuda.gdc_launch_dependents()
        o_b = tl.arange(0, BB)
        o_m = tl.program_id(0) * BM + tl.arange(0, BM)
        o_n = tl.arange(0, BN)
        m_b = o_b < B
        m_m = o_m < M
        m_n = o_n < N
        p_w = w_ptr + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        w = tl.load(p_w, mask=m_m[:, None] & m_n[None, :], other=0.0, eviction_policy="evict_first")
        if HAS_G:
            g = tl.load(g_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        if HAS_SHIFT:
            shift = tl.load(shift_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)
        if START == 3:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        m_x = m_b[:, None] & m_n[None, :]
        x = tl.load(x_ptr + o_b[:, None] * N + o_n[None, :], mask=m_x, other=0.0).to(tl.float32)
        if NORM == 2:
            x = tl.where(m_x, x - tl.sum(x, axis=1)[:, None] / N, 0.0)
        if NORM > 0:
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)
        if NORM == 2:
            x *= scale[:, None]
        if HAS_G:
            x *= g[None, :]
        if HAS_SHIFT:
            x += shift[None, :]
        y = tl.sum(w.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
        if NORM == 1:  # here, so that neither sum waits for the other
            y *= scale[:, None]
        if HAS_BIAS:
            y += bias[None, :]
        m_y = m_b[:, None] & m_m[None, :]
        tl.store(y_ptr + o_b[:, None] * M + o_m[None, :], y.to(y_ptr.dtype.element_ty), mask=m_y)


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    start: int = 0,
) -> Tensor:
    """`F.linear(n(x), weight, bias)` for x `[B, N]` and weight `[M, N]`, all contiguous; sums in fp32.

    norm: None, "rms" (without `norm_bias`) or "layer".
    start, from compute capability 9.0 on (0 elsewhere): 1 after the kernel before, letting the next start early; 2 the
    same with the launch itself ahead of time; 3 reading the weights early (the kernel before must not write them).
    """
    rows, width = x.shape
    y = torch.empty((rows, weight.shape[0]), dtype=x.dtype, device=x.device)
    padded, n_rows = 1 << (width - 1).bit_length(), 1 << (rows - 1).bit_length()
    elements, warps = _TILES[n_rows]
    tile = max(1, elements // padded)
    args = (x, weight, bias, norm_weight, norm_bias, y, eps, rows, weight.shape[0])
    constants = dict(
        BB=n_rows, N=width, BM=tile, BN=padded, NORM=_NORMS[norm], HAS_BIAS=bias is not None,
        HAS_G=norm_weight is not None, HAS_SHIFT=norm_bias is not None, START=start,
    )  # fmt: skip
    key = kinds((x, weight, bias, norm_weight, norm_bias))
    launch(matvec_kernel, -(-weight.shape[0] // tile), args, constants, warps, key, pdl=start > 1)
    return y


def fused_mixer_step(
    x: Tensor, state: Tensor, lower_bound: Tensor | None, in_proj: nn.Linear, norm: nn.Module, out_proj: nn.Linear,
    q_act: str | None, v_act: str | None,
) -> Tensor:  # fmt: skip
    """A mixer's step `[B, D]` -> `[B, D]` in three launches, `state` `[B, H, K, V]` in place; see `fused_supported`."""
    heads, dim = state.shape[1:3]
    early = not tiles.INTERPRET and _early(x.device.index)
    if lower_bound is not None:
        lower_bound = lower_bound.float().contiguous()
    packed = matvec(x.contiguous(), in_proj.weight, in_proj.bias, start=2 if early else 0)
    v, q, f = packed.unflatten(-1, (3, heads, dim)).unbind(1)
    o = run_step(q, f, v, state, lower_bound, ACTIVATIONS.index(q_act), ACTIVATIONS.index(v_act), overlap=early)
    return matvec(
        o.flatten(1), out_proj.weight, out_proj.bias, _norm_kind(norm), norm.weight, getattr(norm, "bias", None),
        norm.eps, start=3 if early else 0,
    )  # fmt: skip


@functools.cache
def _early(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def _norm_kind(norm: nn.Module) -> str | None:
    return "layer" if isinstance(norm, nn.LayerNorm) else "rms" if isinstance(norm, nn.RMSNorm) else None


def _plain_linear(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `module` is a Linear as torch made it: no hooks, no other kind of weight."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype == dtype and weight.is_contiguous()


def fused_supported(
    x: Tensor, state: Tensor, lower_bound: Tensor | None, in_proj: nn.Module, norm: nn.Module, out_proj: nn.Module,
    q_act: str | None, v_act: str | None,
) -> bool:  # fmt: skip
    """Whether `fused_mixer_step` can run: on CUDA, few rows, no gradients, plain modules of x's dtype."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if x.dim() != 2 or not 0 < x.shape[0] <= MAX_ROWS or x.shape[1] > MAX_WIDTH or x.dtype == torch.float64:
        return False
    if torch.is_autocast_enabled("cuda") or _norm_kind(norm) is None or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    heads, dim = state.shape[1], state.shape[-1]
    if state.shape != (x.shape[0], heads, dim, dim) or heads * dim != x.shape[1] or state.dtype != torch.float32:
        return False
    if not (_plain_linear(in_proj, x.dtype) and _plain_linear(out_proj, x.dtype)):
        return False
    if x.device.index != torch.cuda.current_device() or not in_proj.weight.device == state.device == x.device:
        return False
    q = x.unflatten(-1, (heads, dim))
    return step_supported(q, state, lower_bound, q_act, v_act) is None and _checked(x.device.index, x.shape[1], x.dtype)


@functools.cache
def _checked(index: int, width: int, dtype: torch.dtype) -> bool:
    from hgrn2.ops.selftest import remembered

    reason = remembered(index, ["matvec", width, str(dtype)], lambda: _self_test(index, width, dtype))
    if reason is not None:
        warnings.warn(f"decoding falls back to torch's products: {reason}", RuntimeWarning, stacklevel=2)
    return reason is None


def _self_test(index: int, width: int, dtype: torch.dtype) -> str | None:
    """None if products after each norm agree with torch in fp32, else what is wrong."""
    device = torch.device("cuda", index)
    generator = torch.Generator(device).manual_seed(0)
    x, weight, (bias,), g, shift = (
        torch.randn(shape, device=device, generator=generator).to(dtype)
        for shape in ((3, width), (301, width), (1, 301), (width,), (width,))
    )
    wide = x.float(), g.float(), shift.float()
    normed = {
        None: wide[0],
        "rms": F.rms_norm(wide[0], (width,), wide[1], 1e-5),
        "layer": F.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-5),
    }
    for norm, a in normed.items():
        want = (a.double() @ weight.double().T + bias.double()).float()
        y = matvec(
            x, weight, bias, norm, None if norm is None else g, shift if norm == "layer" else None, 1e-5,
            start=2 if _early(index) else 0,
        )  # fmt: skip
        error = float((y.float() - want).norm() / want.norm())
        if not error < LIMITS[dtype]:
            return f"the product of width {width}, {dtype}, norm {norm} is off by {error:.1e}"
    return None
