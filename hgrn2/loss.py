"""Linear layer and cross-entropy in one: a vocabulary's logits never exist whole in memory.

Tokens are taken in chunks. A chunk's logits are fp32 sums of products in the operands' dtype; loss and logits' gradient
come from one kernel, and the gradients of input and weight from products with it right away, the weight's summed in
fp32. So the backward has nothing left to do but to scale, and no logit is kept or made twice.

Legend: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

from hgrn2.ops import launch
from hgrn2.ops.gates import tl, triton, without_autocast

IGNORED = -1  # the target of a token that does not count
CHUNK_BYTES = 2**29  # of a chunk's fp32 logits
_WHOLE = 32768  # logits that one program can keep in registers


def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `x @ weight.T` in nats, with the first derivatives of its sum.

    Under autocast the products' operands are in autocast's dtype, elsewhere in that of x and weight.

    Args:
        x: `[N, D]`.
        weight: `[V, D]`.
        target: int64 `[N]`, `IGNORED` where a token does not count.

    Returns:
        The sum over the tokens that count, fp32 (fp64 for fp64), and each token's loss `[N]`, 0 where it does not
        count; gradients flow through the sum only.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [N, D] and weight [V, D], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if target.shape != x.shape[:1]:
        raise ValueError(f"target must be [N] = [{x.shape[0]}], got {tuple(target.shape)}")
    wanted = (d.requires_grad and torch.is_grad_enabled() for d in (x, weight))
    return _LinearCrossEntropy.apply(x, weight, target, *wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, target: Tensor, x_grad: bool, weight_grad: bool
    ) -> tuple[Tensor, Tensor]:
        kind = x.device.type
        dtype = torch.promote_types(x.dtype, weight.dtype)
        if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        with without_autocast(x):
            losses, dx, dw = _chunks(x.to(dtype), weight.to(dtype), target, x_grad, weight_grad)
        ctx.dtypes = x.dtype, weight.dtype
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("linear_cross_entropy has no second derivatives; F.cross_entropy has them")
        scaled = (None if d is None else (d * grad).to(t) for d, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *scaled, None, None, None


def _chunks(
    x: Tensor, weight: Tensor, target: Tensor, x_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses `[N]`, and the gradients of their sum: of x in its dtype, of weight in fp32 (fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(x.shape[0], dtype=wide)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if x_grad else None
    dw = torch.zeros_like(weight, dtype=wide) if weight_grad else None
    size = max(1, CHUNK_BYTES // (4 * max(weight.shape[0], 1)))
    size = size // 128 * 128 or size  # whole tiles of the products
    for begin in range(0, x.shape[0], size):
        part = slice(begin, begin + size)
        logits = _product(x[part], weight.T, wide)
        grad = _softmax(logits, target[part], losses[part], x.dtype if x_grad or weight_grad else None)
        if dx is not None:
            torch.mm(grad, weight, out=dx[part])
        if dw is not None:
            _add_product(dw, grad.T, x[part])
    return losses, dx, dw


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b, summed and given in `wide`."""
    if a.dtype == wide:
        return a @ b
    # only CUDA's product takes a wider output; elsewhere wide operands are exact, too
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda else a.to(wide) @ b.to(wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _softmax(logits: Tensor, target: Tensor, losses: Tensor, grad_dtype: torch.dtype | None) -> Tensor | None:
    """Writes the losses `[C]` of logits `[C, V]`; returns the logits' gradient in `grad_dtype`, unless that is None."""
    if triton is not None and (logits.is_cuda or launch.INTERPRET) and logits.dtype == torch.float32:
        grad = None if grad_dtype is None else torch.empty_like(logits, dtype=grad_dtype)
        vocab = triton.next_power_of_2(logits.shape[1])
        block = vocab if vocab <= _WHOLE else 8192
        cross_entropy_kernel[(logits.shape[0],)](
            logits,
            target,
            losses,
            grad,
            logits.shape[1],
            IGNORED=IGNORED,
            BLOCK=block,
            WHOLE=block == vocab,
            num_warps=min(16, max(1, block // 512)),
            **launch.FUSED,
        )
        return grad
    counts = (target != IGNORED)[:, None]
    place = target.clamp(min=0)[:, None]
    log_total = logits.logsumexp(1, keepdim=True)
    losses.copy_(((log_total - logits.gather(1, place)) * counts).squeeze(1))
    if grad_dtype is None:
        return None
    grad = logits.sub_(log_total).exp_()
    grad.scatter_add_(1, place, torch.full_like(log_total, -1))
    return (grad * counts).to(grad_dtype)


if triton is not None:

    @triton.jit
    def cross_entropy_kernel(
        x_ptr,
        target_ptr,
        loss_ptr,
        dx_ptr,
        V,
        IGNORED: tl.constexpr,
        BLOCK: tl.constexpr,
        WHOLE: tl.constexpr,
    ):
        """One row of logits `[V]`: its loss, and its gradient unless dx_ptr is None. WHOLE: the row stays in registers;
        longer ones are read twice."""
        i_row = tl.program_id(0).to(tl.int64)
        target = tl.load(target_ptr + i_row)
        o_v = tl.arange(0, BLOCK)
        p_x = x_ptr + i_row * V + o_v
        b_x = tl.load(p_x, mask=o_v < V, other=float("-inf"))
        if WHOLE:
            top = tl.max(b_x, 0)
            total = tl.sum(tl.exp(b_x - top), 0)
        else:
            b_max = b_x
            b_sum = tl.full([BLOCK], 1.0, tl.float32)  # the first block is full: no -inf
            for i in range(BLOCK, V, BLOCK):
                b_next = tl.load(p_x + i, mask=o_v < V - i, other=float("-inf"))
                b_new = tl.maximum(b_max, b_next)
                b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_next - b_new)
                b_max = b_new
            top = tl.max(b_max, 0)
            total = tl.sum(b_sum * tl.exp(b_max - top), 0)
        counts = target != IGNORED
        picked = tl.load(x_ptr + i_row * V + tl.where(counts, target, 0))
        tl.store(loss_ptr + i_row, tl.where(counts, tl.log(total) + (top - picked), 0.0))
        if dx_ptr is not None:
            scale = tl.where(counts, 1 / total, 0.0)
            p_dx = dx_ptr + i_row * V + o_v
            for i in range(0, V, BLOCK):
                if not WHOLE:
                    b_x = tl.load(p_x + i, mask=o_v < V - i, other=float("-inf"))
                b_dx = tl.exp(b_x - top) * scale - tl.where((o_v + i == target) & counts, 1.0, 0.0)
                tl.store(p_dx + i, b_dx.to(dx_ptr.dtype.element_ty), mask=o_v < V - i)
