"""The gate of a GLU, `act(a) * b` of `[a, b]` in one tensor, in one launch forward and one backward.

What a compiler makes of it writes the gradient as two halves that each read what the other has read. Rounded once, to
the input's dtype, where plain torch rounds the activation first.

Legend: W hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2.ops import launch
from hgrn2.ops.gates import tl, triton

ACTS = (None, "silu", "sigmoid", "gelu", "relu")
_TORCH = (lambda x: x, F.silu, torch.sigmoid, F.gelu, F.relu)

_LIBRARY = torch.library.Library("hgrn2", "FRAGMENT")
_LIBRARY.define("glu(Tensor packed, int act) -> Tensor")
_LIBRARY.define("glu_backward(Tensor grad, Tensor packed, int act) -> Tensor")


def glu(packed: Tensor, act: str | None) -> Tensor:
    """`act(a) * b` for `packed` = [a, b] along the last dim: `[..., 2W]` -> `[..., W]`; act is one of `ACTS`."""
    code = ACTS.index(act)
    if _runs_triton(packed) or torch.compiler.is_compiling():
        return torch.ops.hgrn2.glu(packed, code)
    a, b = packed.chunk(2, dim=-1)
    return _TORCH[code](a) * b


def _runs_triton(packed: Tensor) -> bool:
    on_device = packed.is_cuda or (launch.tiles.INTERPRET and packed.device.type == "cpu")
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


def _glu_backward(grad: Tensor, packed: Tensor, act: int) -> Tensor:
    if not _runs_triton(packed):
        a, b = packed.to(torch.promote_types(packed.dtype, torch.float32)).chunk(2, dim=-1)
        y, dy = _TORCH[act](a), _derivative(a, act)
        return torch.cat([grad * b * dy, grad * y], dim=-1).to(packed.dtype)
    packed, grad = packed.contiguous(), grad.contiguous()
    out = torch.empty_like(packed)
    with launch.on_device(packed):
        glu_backward_kernel[(triton.cdiv(grad.numel(), _BLOCK),)](
            grad, packed, out, grad.numel(), packed.shape[-1] // 2, act, _BLOCK
        )
    return out


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
    packed, ctx.act = inputs
    ctx.save_for_backward(packed)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.hgrn2.glu_backward(grad, *ctx.saved_tensors, ctx.act), None


def _no_second_derivative(*_):
    raise NotImplementedError("the fused GLU has no second derivatives")


for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("glu", _glu, _key)
    _LIBRARY.impl("glu_backward", _glu_backward, _key)
torch.library.register_fake(
    "hgrn2::glu", lambda packed, act: packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2), lib=_LIBRARY
)
torch.library.register_fake(
    "hgrn2::glu_backward", lambda grad, packed, act: packed.new_empty(packed.shape), lib=_LIBRARY
)
torch.library.register_autograd("hgrn2::glu", _differentiate, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd("hgrn2::glu_backward", _no_second_derivative, lib=_LIBRARY)

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
    def glu_backward_kernel(dy_ptr, x_ptr, dx_ptr, size, W: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr):
        o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        m_y = o_y < size
        o_a = o_y // W * (2 * W) + o_y % W
        b_dy = tl.load(dy_ptr + o_y, mask=m_y).to(tl.float32)
        b_a = tl.load(x_ptr + o_a, mask=m_y).to(tl.float32)
        b_b = tl.load(x_ptr + o_a + W, mask=m_y).to(tl.float32)
        b_y, b_d = _act(b_a, ACT)
        tl.store(dx_ptr + o_a, (b_dy * b_b * b_d).to(dx_ptr.dtype.element_ty), mask=m_y)
        tl.store(dx_ptr + o_a + W, (b_dy * b_y).to(dx_ptr.dtype.element_ty), mask=m_y)
