"""The forget gate of HGRN2: the one definition of lam, k and log lam, and of their derivatives.

    k   = (1 - gamma) sigmoid(-f)          gamma: the layer's lower bound in [0, 1); None means 0
    lam = 1 - k = gamma + (1 - gamma) sigmoid(f)

`k` is never computed as `1 - lam`: in fp32 that is 17% wrong at f = 15 and 0 from f = 17 on. `log lam` is
`log1p(-k)` where k < 1/2 and the logarithm of the sum elsewhere, so both ends keep full precision.
Source: HGRN2 (arXiv 2404.07904), section 3; lower bounds from HGRN (arXiv 2311.04823), equation 5.
"""

import contextlib
import os

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (None, "silu", "sigmoid")

# exp of these is finite with room for a factor: guards dg / lam where lam underflows (then dg is 0 as well)
_MAX_NEG_LOG = {torch.float32: 80.0, torch.float64: 700.0}


def without_autocast(x: Tensor):
    """A context in which dtypes are those of the tensors on x's device; meta has no autocast to be without."""
    kind = x.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def activate(x: Tensor, name: str | None) -> Tensor:
    """Apply one of `ACTIVATIONS` to x, elementwise."""
    if name is None:
        return x
    if name == "silu":
        return F.silu(x)
    if name == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"activation {name!r} is unknown; valid: {', '.join(map(repr, ACTIVATIONS))}")


def activation_code(index: int, dtype: torch.dtype) -> int:
    """What kernels call one of `ACTIVATIONS`: 0 (None), 1 (silu), 2 (sigmoid); 3 and 4 exactly, for fp32 inputs."""
    return index + 2 if index and dtype == torch.float32 else index


class _ForgetGate(torch.autograd.Function):
    """(f, gamma) -> (k, log lam), with a backward that never divides by lam where that could overflow."""

    @staticmethod
    def forward(ctx, f: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(f, gamma)
        if gamma is None:
            return torch.sigmoid(-f), F.logsigmoid(f)
        k = (1 - gamma) * torch.sigmoid(-f)
        large = torch.log(gamma + (1 - gamma) * torch.sigmoid(f))
        g = torch.where(k < 0.5, torch.log1p(-k), large)
        return k, torch.where(gamma == 0, F.logsigmoid(f), g)

    @staticmethod
    def backward(ctx, dk: Tensor, dg: Tensor) -> tuple[Tensor, Tensor | None]:
        f, gamma = ctx.saved_tensors
        sigma, one_minus_sigma = torch.sigmoid(f), torch.sigmoid(-f)
        if gamma is None:
            return one_minus_sigma * (dg - sigma * dk), None
        _, g = _ForgetGate.apply(f, gamma)
        # r = (1 - gamma) sigma / lam <= 1
        r = torch.exp(torch.log1p(-gamma) + F.logsigmoid(f) - g)
        r = torch.where(gamma == 0, torch.ones_like(r), r)
        df = one_minus_sigma * (dg * r - (1 - gamma) * sigma * dk)
        dgamma = None
        if ctx.needs_input_grad[1]:
            dg_over_lam = dg * torch.exp((-g).clamp(max=_MAX_NEG_LOG[g.dtype]))
            dgamma = ((dg_over_lam - dk) * one_minus_sigma).sum_to_size(gamma.shape)
        return df, dgamma


def forget_gate(f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forget logits to the input gate k and the log-decay log lam.

    Args:
        f: raw forget logits `[..., H, K]`, fp32 or fp64 (finite or +-inf).
        lower_bound: gamma `[H, K]` of the same dtype, each in [0, 1), or None for 0.

    Returns:
        k in [0, 1] and log lam <= 0, both shaped and typed like f.
    """
    return _ForgetGate.apply(f, lower_bound)


try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and other platforms without Triton run the torch forms
    triton = None

if triton is not None:
    _INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

    @triton.jit
    def fast_exp2(x):
        """2^x in one hardware instruction (relative error 2^-22, subnormal results are 0)."""
        if _INTERPRET:
            y = tl.exp2(x)
        else:
            y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return y

    @triton.jit
    def fast_log2(x):
        """log2 x in one hardware instruction (absolute error 2^-22 near 1, relative 2^-22 far from it)."""
        if _INTERPRET:
            y = tl.log2(x)
        else:
            y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return y

    @triton.jit
    def fast_reciprocal(x):
        """1 / x in one hardware instruction (1 ulp)."""
        if _INTERPRET:
            y = 1.0 / x
        else:
            y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return y

    @triton.jit
    def exact_reciprocal(x):
        """1 / x to its last place, by one step of Newton's."""
        y = fast_reciprocal(x)
        return y + y * tl.fma(-x, y, 1.0)

    @triton.jit
    def round_tf32(x):
        """x rounded to the 10 mantissa bits that tf32 products read; unrounded operands would be truncated."""
        if _INTERPRET:
            y = x
        else:
            y = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return y

    @triton.jit
    def exact_exp2(x):
        """2^x with a relative error of 1e-7, three times less than the hardware's."""
        x = tl.maximum(x, -16384.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(x + 0.5)
        r = x - n
        p = 0.000153707048 * r + 0.00133998483
        p = p * r + 0.00961837325
        p = p * r + 0.0555032904
        p = p * r + 0.240226485
        p = p * r + 0.693147206
        # 2^n is exact in hardware
        return fast_exp2(n) * (p * r + 1.0)

    @triton.jit
    def exact_log2(x):
        """log2 x of normal positive numbers, with a relative error of 2e-7 and an absolute one of 1e-7 near 1."""
        bits = x.to(tl.int32, bitcast=True)
        # x = 2^n (1 + t), 1 + t in [0.707, 1.414]
        n = (bits - 0x3F3504F3) >> 23
        t = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
        p = 0.122805282 * t - 0.205705613
        p = p * t + 0.216119125
        p = p * t - 0.2391949
        p = p * t + 0.287901759
        p = p * t - 0.360692114
        p = p * t + 0.480910778
        p = p * t - 0.721347511
        p = p * t + 1.44269502
        return n.to(tl.float32) + p * t

    @triton.jit
    def exact_sigmoids(f):
        """(sigmoid(f), sigmoid(-f), u = exp(-|f|), log2 u and what rounds off it), each to about its last place."""
        a = tl.minimum(tl.abs(f), 10000.0, propagate_nan=tl.PropagateNan.ALL)
        y = -1.44269502 * a
        rest = tl.fma(a, -1.44269502, -y) - 1.92596299e-8 * a
        u = exact_exp2(y)
        u += u * (0.693147206 * rest)
        whole = 1.0 + u
        inverse = fast_reciprocal(whole)
        # one step of Newton's, with what the sum rounded off
        inverse += inverse * (tl.fma(-whole, inverse, 1.0) - (u - (whole - 1.0)) * inverse)
        small = u * inverse
        return tl.where(f > 0, inverse, small), tl.where(f > 0, small, inverse), u, y, rest

    @triton.jit
    def gate_tile(f, gamma, HAS_LB: tl.constexpr, EXACT: tl.constexpr = False):
        """`forget_gate` for a tile of fp32 logits: (sigmoid(f), sigmoid(-f), k, lam, log2 lam).

        f is broadcast against gamma (`[1, K]`, ignored without HAS_LB). Near lam = 1, where the hardware logarithm is
        only accurate to 2^-22 absolute, log2 lam is a polynomial (relative error under 3e-7; EXACT: to 1.2e-7 with a
        lower bound).
        """
        if EXACT:
            sigma, minus, u, y, rest = exact_sigmoids(f)
        else:
            x = tl.maximum(f * 1.4426950408889634, -16384.0, propagate_nan=tl.PropagateNan.ALL)
            u = fast_exp2(-tl.abs(x))
            inverse = fast_reciprocal(1.0 + u)
            small = u * inverse
            sigma = tl.where(x > 0, inverse, small)
            minus = tl.where(x > 0, small, inverse)
        if HAS_LB:
            k = (1.0 - gamma) * minus
            lam = gamma + (1.0 - gamma) * sigma
            # log2(1 - k) / -k on [0, 1/2]
            if EXACT:
                p = 2.5615694 * k - 3.68235822
                p = p * k + 2.95255014
                p = p * k - 0.91377966
                p = p * k + 0.509744957
                p = p * k + 0.250015349
                p = p * k + 0.363791955
                p = p * k + 0.480771504
                p = p * k + 0.721349507
                p = p * k + 1.44269504
                large = exact_log2(tl.maximum(lam, 1e-37))
            else:
                p = 1.67152671 * k - 1.49468831
                p = p * k + 1.08864097
                p = p * k + 0.0697659293
                p = p * k + 0.390215876
                p = p * k + 0.478984607
                p = p * k + 0.721393935
                p = p * k + 1.44269486
                large = fast_log2(tl.maximum(lam, 1e-37))
            g = tl.where(k < 0.5, -k * p, large)
        else:
            k = minus
            lam = sigma
            # log2(1 + u) / u on [0, 1]
            p = 0.00739540214 * u - 0.0419450089
            p = p * u + 0.111832074
            p = p * u - 0.196238952
            p = p * u + 0.275221212
            p = p * u - 0.35829907
            p = p * u + 0.48067889
            p = p * u - 0.721339513
            p = p * u + 1.44269499
            if EXACT:
                g = tl.where(f > 0, 0.0, y) - (u * p - tl.where(f > 0, 0.0, rest))
            else:
                g = tl.minimum(x, 0.0) - u * p
        return sigma, minus, k, lam, g

    @triton.jit
    def decay_tile(f, gamma, HAS_LB: tl.constexpr, EXACT: tl.constexpr = False):
        """`gate_tile` for scans that multiply by lam itself, without log lam: (sigmoid(f), sigmoid(-f), k, lam)."""
        if EXACT:
            sigma, minus, _u, _y, _rest = exact_sigmoids(f)
        else:
            # 2^126 is the largest whose reciprocal is no denormal
            e = fast_exp2(tl.minimum(f * 1.4426950408889634, 126.0, propagate_nan=tl.PropagateNan.ALL))
            minus = fast_reciprocal(1.0 + e)
            sigma = e * minus
        if HAS_LB:
            k = (1.0 - gamma) * minus
            lam = gamma + (1.0 - gamma) * sigma
        else:
            k = minus
            lam = sigma
        return sigma, minus, k, lam

    @triton.jit
    def _act_sigmoids(x, ACT: tl.constexpr):
        """sigmoid(x) and sigmoid(-x)"""
        if ACT > 2:
            s, minus, _u, _y, _rest = exact_sigmoids(x)
        else:
            s = fast_reciprocal(1.0 + fast_exp2(-1.4426950408889634 * x))
            minus = 1.0 - s
        return s, minus

    @triton.jit
    def activate_tile(x, ACT: tl.constexpr):
        """`activate` for a tile of fp32 values; ACT is an `activation_code`."""
        if ACT == 0:
            y = x
        elif ACT % 2 == 1:
            y = x * _act_sigmoids(x, ACT)[0]
        else:
            y = _act_sigmoids(x, ACT)[0]
        return y

    @triton.jit
    def activate_grad_tile(x, ACT: tl.constexpr):
        """The derivative of `activate_tile` at x."""
        if ACT == 0:
            d = x * 0.0 + 1.0
        else:
            s, minus = _act_sigmoids(x, ACT)
            if ACT % 2 == 1:
                d = s * (1.0 + x * minus)
            else:
                d = s * minus
        return d
