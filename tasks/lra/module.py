"""The Long Range Arena task: loss, metrics, expressions with what the model makes of them."""

from typing import Literal

import torch
from torch import Tensor

from hgrn2 import HGRN2Config
from hgrn2.config import check
from tasks.base import ClassificationTask, as_config
from tasks.lra.model import SequenceClassifier
from tasks.optim import OptimConfig


class LRATask(ClassificationTask):
    """Sequence classification with a mean-pooled HGRN2.

    Args:
        backbone: the HGRN2 backbone.
        optim: optimiser and schedule.
        vocab_size: number of tokens.
        num_classes: number of labels.
        positions: sinusoid adds a sinusoidal position code to the embedding; null for none.
        label_smoothing: in training.
        seed: of dropout and other randomness in training.
    """

    def __init__(
        self,
        backbone: HGRN2Config = HGRN2Config(scan="bidirectional", lower_bound="exclusive"),
        optim: OptimConfig = OptimConfig(),
        vocab_size: int = 17,
        num_classes: int = 10,
        positions: Literal["sinusoid"] | None = "sinusoid",
        label_smoothing: float = 0.0,
        seed: int = 0,
    ):
        backbone, optim = as_config(HGRN2Config, backbone), as_config(OptimConfig, optim)
        own = {"vocab_size": vocab_size, "positions": positions}
        check(
            [f"model.vocab_size={vocab_size} must be at least 1"] * (vocab_size < 1)
            + [f"model.positions={positions!r} is unknown; valid: sinusoid"] * (positions not in (None, "sinusoid"))
        )
        super().__init__(backbone, optim, seed, num_classes, label_smoothing, own)
        self.model = SequenceClassifier(backbone, num_classes=num_classes, **own)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["tokens"], batch["lengths"])

    def count(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        return batch["tokens"].shape[0], batch["real_tokens"]

    def _finish(self, stage: str) -> None:
        super()._finish(stage)
        # what guessing the most frequent label would score, to read the accuracy against
        self.log(f"{stage}/majority_acc", self.trainer.datamodule.majority(stage), sync_dist=True)

    @torch.no_grad()
    def show_samples(self, writer, batch: dict[str, Tensor], step: int) -> None:
        """Held-out expressions with predicted and true values."""
        preds = self.logits(batch).argmax(-1).tolist()
        rows = ["| | pred | true | expression |", "|---|---|---|---|"]
        for tokens, pred, label in zip(batch["tokens"].tolist(), preds, batch["label"].tolist(), strict=True):
            text = self.trainer.datamodule.decode(tokens)
            rows.append(f"| {'✓' if pred == label else '✗'} | {pred} | {label} | `{text}` |")
        writer.add_text("viz/expressions", "\n".join(rows), step)
