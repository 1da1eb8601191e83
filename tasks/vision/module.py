"""The vision task: loss, metrics and pictures of what the model sees."""

import torch
from torch import Tensor

from hgrn2 import HGRN2Config
from tasks.base import ClassificationTask, known
from tasks.optim import OptimConfig
from tasks.plots import image_grid
from tasks.vision.model import ImageClassifier


class VisionTask(ClassificationTask):
    """Image classification with a mean-pooled HGRN2.

    Args:
        backbone: the HGRN2 backbone.
        optim: optimiser and schedule.
        num_classes: number of labels; null for what the data says.
        img_size: side of the square images in pixels; null for what the data says.
        patch_size: side of a patch; tokens = (img_size / patch_size)^2.
        in_chans: channels of the images; null for what the data says.
        label_smoothing: in training.
        seed: of dropout and other randomness in training.
    """

    def __init__(
        self,
        backbone: HGRN2Config = HGRN2Config(scan="bidirectional", lower_bound="exclusive"),
        optim: OptimConfig = OptimConfig(),
        num_classes: int | None = None,
        img_size: int | None = None,
        patch_size: int = 4,
        in_chans: int | None = None,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ):
        known(img_size=img_size, in_chans=in_chans)
        super().__init__(backbone, optim, seed, num_classes, label_smoothing)
        self.model = ImageClassifier(self.backbone_config, img_size, patch_size, in_chans, num_classes)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["image"])

    def count(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        samples = len(batch["image"])
        return samples, samples * self.model.patch_embed.num_patches

    @torch.no_grad()
    def show_samples(self, writer, batch: dict[str, Tensor], step: int) -> None:
        """A grid of held-out images with predicted and true labels."""
        names = self.trainer.datamodule.class_names(self.num_classes)
        preds = self.logits(batch).argmax(-1)
        captions = [
            (f"{names[p]}" if p == t else f"{names[p]}, is {names[t]}", p == t)
            for p, t in zip(preds.tolist(), batch["label"].tolist(), strict=True)
        ]
        writer.add_figure("viz/held-out images", image_grid(batch["image"].float().cpu(), captions), step)
