"""Decoding steps of whole modules in few launches, for few rows on CUDA; the modules' plain code is the definition.

A mixer is three launches (in_proj; the recurrence; norm and out_proj), and a block with a GLU five, its pre-norms,
residuals and gating inside. From Hopper on each starts while the one before still runs.

This is a second definition of what the modules compute, so it takes only modules that consist of exactly what it
consumes: whoever adds a parameter, a buffer, a child or a hook to one gets its plain code, in fused decoding's place.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hgrn2.layers import GLU, DropPath, RMSNorm
from hgrn2.ops.decode.matvec import early_start, matvec, matvec_supported
from hgrn2.ops.decode.step import run_step, step_supported
from hgrn2.ops.gates import ACTIVATIONS
from hgrn2.ops.launch import INTERPRET

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


def fused_glu_step(glu: GLU, x: Tensor, pre_norm: nn.Module) -> Tensor:
    """`x + glu(pre_norm(x))`, right after `fused_mixer_step`."""
    start = 3 if _early(x) else 0
    hidden = _linear(glu.fc1, x, norm=pre_norm, start=start)
    return _linear(glu.fc2, hidden, gate=_GATES[type(glu.act)], residual=x, start=start)


def consists_of(
    module: nn.Module,
    kind: type,
    parameters: Iterable[str] = (),
    children: Iterable[str] = (),
    buffers: Iterable[str] = (),
) -> bool:
    """Whether `module` is of `kind` itself and has these parameters, children and buffers, and no hooks.

    Parameters and children may be None.
    """
    own = vars(module)
    return (
        type(module) is kind
        and own["_parameters"].keys() == set(parameters)
        and own["_modules"].keys() == set(children)
        and own["_buffers"].keys() == set(buffers)
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
    )


def mixer_consists(mixer: nn.Module, kind: type) -> bool:
    """Whether the mixer, of class `kind`, is made of what `fused_mixer_step` consumes, and of nothing else."""
    if _has_any_global_hook() or not consists_of(mixer, kind, (), ("in_proj", "norm", "out_proj")):
        return False
    return _is_linear(mixer.in_proj) and _is_linear(mixer.out_proj) and _norm(mixer.norm) is not None


def block_consists(block: nn.Module, kind: type) -> bool:
    """Whether the block adds nothing to its mixer and GLU but the pre-norms and residuals that go with them."""
    if not consists_of(block, kind, (), ("mixer_norm", "mixer", "glu_norm", "glu", "dropout", "drop_path")):
        return False
    drops = consists_of(block.drop_path, DropPath, buffers=("keep",)) or consists_of(block.drop_path, nn.Identity)
    drops = drops and consists_of(block.dropout, nn.Dropout)
    training = block.training or block.drop_path.training or block.dropout.training
    return drops and not training and norm_consists(block.mixer_norm)


def glu_consists(glu: nn.Module) -> bool:
    """Whether the GLU is made of what `fused_glu_step` consumes, and of nothing else."""
    if not consists_of(glu, GLU, (), ("fc1", "act", "drop1", "norm", "fc2", "drop2")) or glu.gate_last:
        return False
    drops = all(consists_of(drop, nn.Dropout) and not drop.p for drop in (glu.drop1, glu.drop2))
    act = type(glu.act) in _GATES and consists_of(glu.act, type(glu.act))
    return drops and act and consists_of(glu.norm, nn.Identity) and _is_linear(glu.fc1) and _is_linear(glu.fc2)


def norm_consists(norm: nn.Module) -> bool:
    """Whether `norm` can enter a product."""
    return _norm(norm) is not None


def mixer_supported(mixer: nn.Module, kind: type, x: Tensor, state: Tensor, lower_bound: Tensor | None) -> bool:
    """Whether `fused_mixer_step` can run: CUDA, few rows, no gradients, a mixer of class `kind` of x's dtype."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    heads, dim, c = state.shape[1], state.shape[-1], mixer.config
    if x.dim() != 2 or state.dtype != torch.float32 or c.impl not in ("auto", "triton"):
        return False
    if torch.is_autocast_enabled("cuda") or x.device.index != torch.cuda.current_device():
        return False
    if state.shape != (x.shape[0], heads, dim, dim) or heads * dim != x.shape[1] or state.device != x.device:
        return False
    if not (mixer_consists(mixer, kind) and _suits(mixer.in_proj, x) and _suits(mixer.out_proj, x)):
        return False
    q = x.unflatten(-1, (heads, dim))
    return step_supported(q, state, lower_bound, c.q_act, c.v_act) is None


def glu_supported(glu: nn.Module, x: Tensor) -> bool:
    """Whether `fused_glu_step` can run where `mixer_supported` holds."""
    return glu_consists(glu) and _suits(glu.fc1, x) and _suits(glu.fc2, x)


def _linear(module: nn.Linear, x: Tensor, norm: nn.Module | None = None, **options) -> Tensor:
    return matvec(x, module.weight, module.bias, norm=None if norm is None else _norm(norm), **options)


def _early(x: Tensor) -> bool:
    return not INTERPRET and early_start(x.device.index)


def _norm(norm: nn.Module) -> tuple | None:
    """A norm over the full width as `matvec` takes it, or None for other kinds and for modules with more to them."""
    if consists_of(norm, nn.LayerNorm, ("weight", "bias")):
        kind, bias = "layer", norm.bias
    elif consists_of(norm, RMSNorm, ("weight",)) or consists_of(norm, nn.RMSNorm, ("weight",)):
        kind, bias = "rms", None
    else:
        return None
    return (kind, norm.weight, bias, norm.eps) if len(norm.normalized_shape) == 1 and norm.eps is not None else None


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` is a Linear as torch made it: no hooks, no other kind of weight."""
    return consists_of(module, nn.Linear, ("weight", "bias")) and type(module.weight) is nn.Parameter


def _suits(module: nn.Linear, x: Tensor) -> bool:
    """Whether a Linear is of x's dtype and device, and of a width that `matvec` takes."""
    weight = module.weight
    if weight.dtype != x.dtype or weight.device != x.device or not weight.is_contiguous():
        return False
    return matvec_supported(x.device.index, x.shape[0], weight.shape[1], x.dtype)
