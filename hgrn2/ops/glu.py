"""The second half of a GLU: `act(a) * b` of `[a, b]` in one tensor, one launch each way, and the product after it.

What a compiler makes of the gate's gradient is two halves that each read what the other has read. The gated tensor,
which the gradient of the product's weight needs, is not kept: the launch of the gate's gradient writes it again.
Rounded once, to the input's dtype, where plain torch rounds the activation first.

Legend: W hidden width, D output width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hgrn2.ops import launch
from hgrn2.ops.gates import tl, triton

ACTS = (None, "silu", "sigmoid", "gelu", "relu")
_TORCH = (lambda x: x, F.silu, torch.sigmoid, F.gelu, F.relu)

_LIBRARY = torch.library.Library("hgrn2", "FRAGMENT")
_LIBRARY.define("glu_backward(Tensor grad, Tensor packed, int act) -> (Tensor, Tensor)")
_LIBRARY.define("glu_linear(Tensor packed, Tensor weight, Tensor? bias, int act) -> Tensor")


def glu_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """`(act(a) * b) @ weight.T + bias` for `packed` = [a, b] along the last dim.

    Args:
        packed: `[..., 2W]`.
        weight: `[D, W]`, and bias `[D]` or None; taken in packed's dtype.
        act: one of `ACTS`.

    Returns:
        `[..., D]` in packed's dtype. On CUDA it has first derivatives only.
    """
    code = ACTS.index(act)
    if _runs_triton(packed) or torch.compiler.is_compiling():
        bias = None if bias is None else bias.to(packed.dtype)
        return torch.ops.hgrn2.glu_linear(packed, weight.to(packed.dtype), bias, code)
    a, b = packed.chunk(2, dim=-1)
    return F.linear(_TORCH[code](a) * b, weight, bias)


def glu(packed: Tensor, act: str | None) -> Tensor:
    """The gate alone, in plain torch: `[..., 2W]` -> `[..., W]`."""
    a, b = packed.chunk(2, dim=-1)
    return _TORCH[ACTS.index(act)](a) * b


def _runs_triton(packed: Tensor) -> bool:
    on_device = packed.is_cuda or (launch.INTERPRET and packed.device.type == "cpu")
    return triton is not None and on_device and packed.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _glu(packed: Tensor, act: int) -> Tensor:
    if not _runs_triton(packed):
        a, b = packed.chunk(2, dim=-1)
        return _TORCH[act](a) * b
    packed = packed.contiguous()
    width = packed.shape[-1] // 2
    out = packed.new_empty(*packed.shape[:-1], width)
    with launch.on_device(packed):
        glu_kernel[(triton.cdiv(out.numel(), _BLOCK),)](packed, out, out.numel(), width, act, _BLOCK)
    return out


def _glu_linear(packed: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    return F.linear(_glu(packed, act), weight, bias)


def _glu_backward(grad: Tensor, packed: Tensor, act: int) -> tuple[Tensor, Tensor]:
    """The gradient of packed `[..., 2W]` for that of the gated tensor `[..., W]`, and the gated tensor again."""
    if not _runs_triton(packed):
        a, b = packed.to(torch.promote_types(packed.dtype, torch.float32)).chunk(2, dim=-1)
        y, dy = _TORCH[act](a), _derivative(a, act)
        return torch.cat([grad * b * dy, grad * y], dim=-1).to(packed.dtype), (y * b).to(packed.dtype)
    packed, grad = packed.contiguous(), grad.contiguous()
    out, gated = torch.empty_like(packed), torch.empty_like(grad)
    with launch.on_device(packed):
        glu_backward_kernel[(triton.cdiv(grad.numel(), _BLOCK),)](
            grad, packed, out, gated, grad.numel(), packed.shape[-1] // 2, act, _BLOCK
        )
    return out, gated


def _derivative(x: Tensor, act: int) -> Tensor:
    sigmoid = torch.sigmoid(x)
    if act == 1:
        return sigmoid * (1 + x * (1 - sigmoid))
    if act == 2:
        return sigmoid * (1 - sigmoid)
    if act == 3:
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
    return (x > 0).to(x.dtype) if act == 4 else torch.ones_like(x)


def _save(ctx, inputs, output) -> None:
    packed, weight, bias, ctx.act = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(packed, weight)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    packed, weight = ctx.saved_tensors
    d_packed, gated = torch.ops.hgrn2.glu_backward(grad @ weight, packed, ctx.act)
    rows = grad.flatten(0, -2)
    d_weight = rows.T @ gated.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return d_packed, d_weight, rows.sum(0) if ctx.has_bias else None, None


def _no_second_derivative(*_):
    raise NotImplementedError("the GLU has no second derivatives (create_graph=True) on CUDA or compiled")


def _glu_linear_fake(packed, weight, bias, act):
    return packed.new_empty(*packed.shape[:-1], weight.shape[0])


for _name, _real, _fake in (
    ("glu_linear", _glu_linear, _glu_linear_fake),
    (
        "glu_backward",
        _glu_backward,
        lambda grad, packed, act: (packed.new_empty(packed.shape), grad.new_empty(grad.shape)),
    ),
):
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_name, _real, _key)
    torch.library.register_fake(f"hgrn2::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("hgrn2::glu_linear", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("hgrn2::glu_backward", _no_second_derivative, lib=_LIBRARY)


@register_flop_formula(torch.ops.hgrn2.glu_linear)
def _flops(packed: tuple[int, ...], weight: tuple[int, ...], *_, **__) -> int:
    return math.prod(packed) * weight[0]  # 2 a multiplication and addition, half of packed's width


_BLOCK = 1024

if triton is not None:

    @triton.jit
    def _act(x, ACT: tl.constexpr):
        """An activation and its derivative."""
        if ACT == 0:
            y, dy = x, x * 0 + 1
        elif ACT == 3:
            cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
            y, dy = x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        elif ACT == 4:
            y, dy = tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
        else:
            sigmoid = tl.sigmoid(x)
            if ACT == 1:
                y, dy = x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
            else:
                y, dy = sigmoid, sigmoid * (1 - sigmoid)
        return y, dy

    @triton.jit
    def glu_kernel(x_ptr, y_ptr, size, W: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
        o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_y = o_y < size
        p_a = x_ptr + o_y // W * (2 * W) + o_y % W
        b_a = tl.load(p_a, mask=m_y).to(tl.float32)
        b_b = tl.load(p_a + W, mask=m_y).to(tl.float32)
        b_y, _ = _act(b_a, ACT)
        tl.store(y_ptr + o_y, (b_y * b_b).to(y_ptr.dtype.element_ty), mask=m_y)

    @triton.jit
    def glu_backward_kernel(
        dy_ptr, x_ptr, dx_ptr, y_ptr, size, W: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr
    ):
        o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_y = o_y < size
        o_a = o_y // W * (2 * W) + o_y % W
        b_dy = tl.load(dy_ptr + o_y, mask=m_y).to(tl.float32)
        b_a = tl.load(x_ptr + o_a, mask=m_y).to(tl.float32)
        b_b = tl.load(x_ptr + o_a + W, mask=m_y).to(tl.float32)
        b_y, b_d = _act(b_a, ACT)
        tl.store(dx_ptr + o_a, (b_dy * b_b * b_d).to(dx_ptr.dtype.element_ty), mask=m_y)
        tl.store(y_ptr + o_y, (b_y * b_b).to(y_ptr.dtype.element_ty), mask=m_y)
        tl.store(dx_ptr + o_a + W, (b_dy * b_y).to(dx_ptr.dtype.element_ty), mask=m_y)
