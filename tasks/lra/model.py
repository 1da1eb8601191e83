"""Sequence classifier: embedding -> backbone -> mean over real tokens -> head.

The frame of the HGRN papers' Long Range Arena models with the HGRN2 mixer. Legend: B batch, T tokens, D width.
"""

import math

import torch
from torch import Tensor, nn

from hgrn2 import ConfigError, HGRN2Backbone, HGRN2Config


def sinusoid(time: int, dim: int, device: torch.device) -> Tensor:
    """Sinusoidal position code `[T, D]` fp32 (Vaswani et al., arXiv 1706.03762, 3.5; halves not interleaved)."""
    frequency = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10_000.0) / dim))
    angle = torch.arange(time, device=device)[:, None] * frequency
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

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.positions == "sinusoid":
            x = x + sinusoid(tokens.shape[1], x.shape[-1], x.device).to(x.dtype)
        x = self.backbone(self.dropout(x), lengths=lengths)  # padded outputs are 0
        return self.head(x.sum(1) / lengths[:, None].clamp(min=1).to(x.dtype))
