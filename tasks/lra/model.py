"""Sequence classifier: embedding -> backbone -> mean over real tokens -> head.

The frame of the HGRN papers' Long Range Arena models with the HGRN2 mixer. Legend: B batch, T tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgrn2 import ConfigError, HGRN2Backbone, HGRN2Config


def sinusoid(position: Tensor, dim: int) -> Tensor:
    """Sinusoidal code `[N, D]` fp32 of positions `[N]` (Vaswani et al., arXiv 1706.03762, 3.5; halves in turn)."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=position.device) * (-math.log(10_000.0) / dim))
    angle = position[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]


class SequenceClassifier(nn.Module):
    """Tokens `[B, T]` and lengths `[B]` -> logits `[B, num_classes]`; padding changes nothing."""

    def __init__(self, backbone: HGRN2Config, vocab_size: int, num_classes: int, positions: str | None):
        super().__init__()
        if backbone.scan.startswith("2d"):
            raise ConfigError(
                f"model.backbone.scan={backbone.scan} does not fit text-like sequences; valid: bidirectional, causal"
            )
        self.embed = nn.Embedding(vocab_size, backbone.dim)
        nn.init.normal_(self.embed.weight, std=backbone.dim**-0.5)
        self.positions = positions
        self.dropout = nn.Dropout(backbone.dropout)
        self.backbone = HGRN2Backbone(backbone)
        self.head = nn.Linear(backbone.dim, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor, places: Tensor | None = None) -> Tensor:
        """Logits `[B, num_classes]` of padded rows.

        places: where real tokens lie in the flattened rows, int64 `[real tokens]` in order. With it the backbone sees
            one row of nothing but real tokens, which is what padded rows give, for less work.
        """
        if places is None:
            x = self._embed(tokens, torch.arange(tokens.shape[1], device=tokens.device))
            x = self.backbone(x, lengths=lengths).sum(1)  # padded outputs are 0
        else:
            x = self._embed(tokens.flatten()[places], places % tokens.shape[1])
            x = self.backbone(x[None], cu_seqlens=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)))[0]
            x = _RowSums.apply(x, places, tokens.shape)
        return self.head(x / lengths[:, None].clamp(min=1).to(x.dtype))

    def _embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.positions == "sinusoid":
            x = x + sinusoid(position, x.shape[-1]).to(x.dtype)
        return self.dropout(x)


class _RowSums(torch.autograd.Function):
    """Sums `[B, D]` of the tokens of each row, of packed tokens `[N, D]` at `places` in rows `[B, T]`.

    Neither way adds where several may write, so results repeat to the bit.
    """

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(places)
        ctx.time = shape[1]
        rows = x.new_zeros(shape.numel(), x.shape[-1])
        rows[places] = x
        return rows.view(*shape, -1).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad[places // ctx.time], None, None
