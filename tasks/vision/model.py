"""Image classifier: patch embedding -> backbone -> mean over tokens -> head.

No position embedding and no class token (the recurrence knows the order). Source: the frame of HGRN (arXiv 2311.04823)
with the HGRN2 mixer. Legend: B batch, C channels, Y x X grid of patches, D width.
"""

from timm.layers import PatchEmbed
from torch import Tensor, nn

from hgrn2 import ConfigError, HGRN2Backbone, HGRN2Config


class ImageClassifier(nn.Module):
    """`[B, C, img_size, img_size]` -> logits `[B, num_classes]`."""

    def __init__(self, backbone: HGRN2Config, img_size: int, patch_size: int, in_chans: int, num_classes: int):
        super().__init__()
        if img_size % patch_size:
            raise ConfigError(f"model.img_size={img_size} must be divisible by model.patch_size={patch_size}")
        if backbone.scan == "causal":
            raise ConfigError(
                "model.backbone.scan=causal does not fit image classification; "
                "valid: bidirectional, 2d_parallel, 2d_series"
            )
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, backbone.dim)
        self.grid = self.patch_embed.grid_size if backbone.scan.startswith("2d") else None
        self.backbone = HGRN2Backbone(backbone)
        self.head = nn.Linear(backbone.dim, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patch_embed(image)  # [B, Y * X, D], raster order
        return self.head(self.backbone(tokens, grid=self.grid).mean(1))
