"""Norms and the channel mixer; torch and timm parts where they exist.

Legend: B batch, T tokens, D width.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import GluMlp
from torch import Tensor, nn

from hgrn2.ops.gates import without_autocast
from hgrn2.ops.glu import glu, glu_linear

_GLU_ACTS = {None: nn.Identity, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "relu": nn.ReLU}


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose weight follows the input's dtype: under autocast a mixed pair misses the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class DropPath(nn.Module):
    """Stochastic depth: in training each row of `[B, ...]` becomes 0 with probability `rate`, the others grow by
    1 / (1 - rate).

    timm's keeps the rate as a number, which torch.compile compiles in: layers of different rates would not share code.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("keep", torch.empty(()), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """For whoever builds the model on the meta device first: the buffer is in no checkpoint."""
        self.keep.fill_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = self.keep.to(x.dtype)
        row = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep
        return x * (row / keep).to(x.dtype)


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over real tokens of `[B, T, D]` (or rows of `[B, D]`): padding enters no statistic.

    With `sync`, training statistics are those of all ranks, as `nn.SyncBatchNorm`, on any backend.
    """

    def __init__(self, dim: int, eps: float, sync: bool = False):
        super().__init__(dim, eps=eps)
        self.sync = sync

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sync={self.sync}"

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Args: x `[..., D]`; pad `[..., 1]`, True at padding, or None. Statistics are fp32 under autocast too."""
        with without_autocast(x):
            return self._normalize(x.float() if x.dtype != torch.float64 else x, pad).to(x.dtype)

    def _normalize(self, x: Tensor, pad: Tensor | None) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        across_ranks = self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        whole_batch = not self.training or (pad is None and not across_ranks)
        if whole_batch and self.weight.dtype == x.dtype:
            return super().forward(x).view(shape)
        if self.training:
            mean, var = self._statistics(x, pad, across_ranks)
        else:
            mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return ((x - mean) * scale + self.bias).view(shape)

    def _statistics(self, x: Tensor, pad: Tensor | None, across_ranks: bool) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the real rows of x `[rows, D]`; updates the running ones."""
        rows = x.new_full((), x.shape[0])
        real = None if pad is None else (~pad).reshape(-1, 1).to(x.dtype)
        if real is not None:
            rows = real.sum()
        mean = self._total(x if real is None else x * real, rows, across_ranks)
        centred = x - mean if real is None else (x - mean) * real
        var = self._total(centred * centred, rows, across_ranks)
        with torch.no_grad():
            count = _sum_over_ranks(rows) if across_ranks else rows
            self.num_batches_tracked += 1
            momentum = self.momentum * (count > 0).to(self.running_mean.dtype)  # a batch of padding teaches nothing
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return mean, var

    @staticmethod
    def _total(x: Tensor, rows: Tensor, across_ranks: bool) -> Tensor:
        """Mean over the rows of x, of all ranks if asked; a batch without real tokens gives 0."""
        total = x.sum(0)
        if across_ranks:
            from torch.distributed.nn.functional import all_reduce  # absent from builds without distributed

            both = all_reduce(torch.cat([total, rows[None]]))
            total, rows = both[:-1], both[-1].detach()
        return total / rows.clamp(min=1)


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """`nn.SyncBatchNorm.convert_sync_batchnorm`, in place where it can, for modules that may hold `MaskedBatchNorm`.

    torch's makes of that a norm that knows no padding and takes `[B, T, D]` for `[N, C, L]`; here its `sync` is set.
    """
    if isinstance(module, MaskedBatchNorm):
        module.sync = True
        return module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        module.add_module(name, convert_sync_batchnorm(child))
    return module


def _sum_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def make_norm(name: str | None, dim: int, eps: float) -> nn.Module:
    """A norm over the last dim by its name in `HGRN2Config`; None gives the identity."""
    if name is None:
        return nn.Identity()
    if name == "layernorm":
        return nn.LayerNorm(dim, eps=eps)
    if name in ("rmsnorm", "simple_rmsnorm"):
        return RMSNorm(dim, eps=eps, elementwise_affine=name == "rmsnorm")
    if name in ("batchnorm", "sync_batchnorm"):
        return MaskedBatchNorm(dim, eps, sync=name == "sync_batchnorm")
    raise ValueError(f"norm {name!r} is unknown")


def apply_norm(norm: nn.Module, x: Tensor, pad: Tensor | None) -> Tensor:
    """Norms over tokens ignore padding by construction; batch norms need to know it."""
    return norm(x, pad) if isinstance(norm, MaskedBatchNorm) else norm(x)


class GLU(GluMlp):
    """timm's GLU, `W2 (act(W1 x) * W3 x)`, gated in one launch on CUDA, and no gated tensor is kept."""

    def __init__(self, dim: int, width: int, act: str | None, bias: bool):
        super().__init__(dim, 2 * width, act_layer=_GLU_ACTS[act], bias=bias, gate_last=False)
        self.act_name = act

    def forward(self, x: Tensor) -> Tensor:
        packed, last = self.fc1(x), self.fc2
        if type(last) is not nn.Linear or last._forward_hooks or last._forward_pre_hooks:  # another kind of product
            return last(glu(packed, self.act_name))
        return glu_linear(packed, last.weight, last.bias, self.act_name)


def make_glu(dim: int, width: int, act: str | None, bias: bool) -> GLU:
    """`W2 (act(W1 x) * W3 x)` with hidden `width`; W1 and W3 are one projection."""
    return GLU(dim, width, act, bias)
