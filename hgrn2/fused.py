"""Decoding steps of whole modules in few launches, for few rows on CUDA; the modules' plain code is the definition.

A mixer is three launches (in_proj; the recurrence; norm and out_proj), and a block with a GLU five, its pre-norms,
residuals and gating inside. From Hopper on each starts while the one before still runs.
"""

import torch
from timm.layers import GluMlp
from torch import Tensor, nn

from hgrn2.ops import tiles
from hgrn2.ops.gates import ACTIVATIONS
from hgrn2.ops.matvec import early_start, matvec, matvec_supported
from hgrn2.ops.step import run_step, step_supported

_GATES = {nn.Identity: None, nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}


def fused_mixer_step(
    mixer: nn.Module,
    x: Tensor,
    state: Tensor,
    lower_bound: Tensor | None,
    pre_norm: nn.Module | None = None,
) -> Tensor:
    """`mixer.step(x, state, lower_bound)`; with `pre_norm`, `x + mixer.step(pre_norm(x), state, lower_bound)`."""
    early = _early(x)
    x = x.contiguous()
    if lower_bound is not None:
        lower_bound = lower_bound.float().contiguous()
    # what ran before is unknown: it may have written these weights
    packed = _linear(mixer.in_proj, x, norm=pre_norm, start=2 if early else 0)
    v, q, f = packed.unflatten(-1, (3, *state.shape[1:3])).unbind(1)
    q_act, v_act = ACTIVATIONS.index(mixer.config.q_act), ACTIVATIONS.index(mixer.config.v_act)
    o = run_step(q, f, v, state, lower_bound, q_act, v_act, overlap=early)
    residual = None if pre_norm is None else x
    return _linear(mixer.out_proj, o.flatten(1), norm=mixer.norm, residual=residual, start=3 if early else 0)


def fused_glu_step(glu: GluMlp, x: Tensor, pre_norm: nn.Module) -> Tensor:
    """`x + glu(pre_norm(x))`, right after `fused_mixer_step`."""
    start = 3 if _early(x) else 0
    hidden = _linear(glu.fc1, x, norm=pre_norm, start=start)
    return _linear(glu.fc2, hidden, gate=_GATES[type(glu.act)], residual=x, start=start)


def mixer_supported(mixer: nn.Module, x: Tensor, state: Tensor, lower_bound: Tensor | None) -> bool:
    """Whether `fused_mixer_step` can run: CUDA, few rows, no gradients, plain modules of x's dtype."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    heads, dim, c = state.shape[1], state.shape[-1], mixer.config
    if x.dim() != 2 or state.dtype != torch.float32 or c.impl not in ("auto", "triton"):
        return False
    if torch.is_autocast_enabled("cuda") or x.device.index != torch.cuda.current_device():
        return False
    if state.shape != (x.shape[0], heads, dim, dim) or heads * dim != x.shape[1] or state.device != x.device:
        return False
    if not (_plain(mixer.in_proj, x) and _plain(mixer.out_proj, x) and _norm(mixer.norm)):
        return False
    q = x.unflatten(-1, (heads, dim))
    return step_supported(q, state, lower_bound, c.q_act, c.v_act) is None


def glu_supported(glu: nn.Module, x: Tensor) -> bool:
    """Whether `fused_glu_step` can run where `mixer_supported` holds."""
    if type(glu) is not GluMlp or glu.gate_last or glu.drop1.p or glu.drop2.p or type(glu.norm) is not nn.Identity:
        return False
    return type(glu.act) in _GATES and _plain(glu.fc1, x) and _plain(glu.fc2, x)


def norm_supported(norm: nn.Module) -> bool:
    """Whether `norm` can enter a product."""
    return _norm(norm) is not None


def _linear(module: nn.Linear, x: Tensor, norm: nn.Module | None = None, **options) -> Tensor:
    return matvec(x, module.weight, module.bias, norm=None if norm is None else _norm(norm), **options)


def _early(x: Tensor) -> bool:
    return not tiles.INTERPRET and early_start(x.device.index)


def _norm(norm: nn.Module) -> tuple | None:
    """A norm as `matvec` takes it, or None for other kinds and for modules with hooks."""
    if not isinstance(norm, (nn.RMSNorm, nn.LayerNorm)) or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    return kind, norm.weight, getattr(norm, "bias", None), norm.eps


def _plain(module: nn.Module, x: Tensor) -> bool:
    """Whether `module` is a Linear as torch made it, of x's dtype and device: no hooks, no other kind of weight."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.device != x.device:
        return False
    return weight.is_contiguous() and matvec_supported(x.device.index, x.shape[0], weight.shape[1], x.dtype)
