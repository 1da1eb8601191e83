"""The forget gate of HGRN2: the one definition of lam, k and log lam, and of their derivatives.

    k   = (1 - gamma) sigmoid(-f)          gamma: the layer's lower bound in [0, 1); None means 0
    lam = 1 - k = gamma + (1 - gamma) sigmoid(f)

`k` is never computed as `1 - lam`: in fp32 that is 17% wrong at f = 15 and 0 from f = 17 on. `log lam` is
`log1p(-k)` where k < 1/2 and the logarithm of the sum elsewhere, so both ends keep full precision.
Source: HGRN2 (arXiv 2404.07904), section 3; lower bounds from HGRN (arXiv 2311.04823), equation 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (None, "silu", "sigmoid")

# exp(80) is finite in fp32 with room for a factor: guards dg / lam where lam underflows (then dg is 0 as well)
_MAX_NEG_LOG = 80.0


def activate(x: Tensor, name: str | None) -> Tensor:
    """Apply one of `ACTIVATIONS` to x, elementwise."""
    if name is None:
        return x
    if name == "silu":
        return F.silu(x)
    if name == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"activation {name!r} is unknown; valid: {', '.join(map(repr, ACTIVATIONS))}")


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
            dg_over_lam = dg * torch.exp((-g).clamp(max=_MAX_NEG_LOG))
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

    @triton.jit
    def gate_tile(f, gamma, HAS_LB: tl.constexpr):
        """`forget_gate` for a tile of fp32 logits: (sigmoid(f), sigmoid(-f), k, lam, log2 lam).

        f is broadcast against gamma (`[1, K]`, ignored without HAS_LB). log2(1 - k) is k times a polynomial where k < 1/2
        (relative error 2.6e-7): the hardware logarithm is only accurate to 2^-22 absolute near 1.
        """
        x = tl.maximum(f * 1.4426950408889634, -16384.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 126.0, propagate_nan=tl.PropagateNan.ALL)
        u = tl.exp2(x)
        minus = 1.0 / (1.0 + u)
        sigma = u * minus
        if HAS_LB:
            k = (1.0 - gamma) * minus
            lam = gamma + (1.0 - gamma) * sigma
            large = tl.log2(tl.maximum(lam, 1e-37))
        else:
            k = minus
            lam = sigma
            large = x + tl.log2(minus)
        p = 1.67152671 * k - 1.49468831
        p = p * k + 1.08864097
        p = p * k + 0.0697659293
        p = p * k + 0.390215876
        p = p * k + 0.478984607
        p = p * k + 0.721393935
        p = p * k + 1.44269486
        return sigma, minus, k, lam, tl.where(k < 0.5, -k * p, large)

    @triton.jit
    def activate_tile(x, ACT: tl.constexpr):
        """`activate` for a tile of fp32 values; ACT is 0 (None), 1 ("silu") or 2 ("sigmoid")."""
        if ACT == 0:
            y = x
        elif ACT == 1:
            y = x / (1.0 + tl.exp2(-1.4426950408889634 * x))
        else:
            y = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))
        return y

    @triton.jit
    def activate_grad_tile(x, ACT: tl.constexpr):
        """The derivative of `activate_tile` at x."""
        if ACT == 0:
            d = x * 0.0 + 1.0
        else:
            s = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))
            if ACT == 1:
                d = s * (1.0 + x * (1.0 - s))
            else:
                d = s * (1.0 - s)
        return d
