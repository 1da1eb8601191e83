"""The Long Range Arena task: loss, metrics, expressions with what the model makes of them."""

from typing import Literal, get_args

import torch
from torch import Tensor

from hgrn2 import HGRN2Config
from hgrn2.config import check
from tasks.base import ClassificationTask, known
from tasks.lra.model import SequenceClassifier
from tasks.optim import OptimConfig
from tasks.plots import printable

Positions = Literal["sinusoid"]


class LRATask(ClassificationTask):
    """Sequence classification with a mean-pooled HGRN2.

    Args:
        backbone: the HGRN2 backbone.
        optim: optimiser and schedule.
        vocab_size: number of tokens; null for what the data says, more is allowed.
        num_classes: number of labels; null for what the data says.
        positions: sinusoid adds a sinusoidal position code to the embedding; null for none.
        label_smoothing: in training.
        seed: of dropout and other randomness in training.
    """

    def __init__(
        self,
        backbone: HGRN2Config = HGRN2Config(scan="bidirectional", lower_bound="exclusive"),
        optim: OptimConfig = OptimConfig(),
        vocab_size: int | None = None,
        num_classes: int | None = None,
        positions: Positions | None = "sinusoid",
        label_smoothing: float = 0.0,
        seed: int = 0,
    ):
        known(vocab_size=vocab_size)
        check(
            [f"model.vocab_size={vocab_size} must be at least 1"] * (vocab_size < 1)
            + [f"model.positions={positions!r} is unknown; valid: {', '.join(get_args(Positions))}"]
            * (positions not in (None, *get_args(Positions)))
        )
        super().__init__(backbone, optim, seed, num_classes, label_smoothing)
        self.model = SequenceClassifier(self.backbone_config, vocab_size, num_classes, positions)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["tokens"], batch["lengths"], batch.get("places"))

    def count(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        return batch["tokens"].shape[0], batch["real_tokens"]

    def _finish(self, stage: str) -> None:
        super()._finish(stage)
        # what guessing the most frequent label would score, to read the accuracy against
        majority = self.trainer.datamodule.majority(stage)
        if majority is not None:
            self.log(f"{stage}/majority_acc", majority, sync_dist=True)

    @torch.no_grad()
    def show_samples(self, writer, batch: dict[str, Tensor], step: int) -> None:
        """Held-out sequences with predicted and true labels."""
        preds = self.model(batch["tokens"], batch["lengths"]).argmax(-1).tolist()
        columns = (batch["tokens"].tolist(), batch["lengths"].tolist(), preds, batch["label"].tolist())
        rows = ["| | pred | true | expression |", "|---|---|---|---|"]
        for tokens, length, pred, label in zip(*columns, strict=True):
            text = self.trainer.datamodule.decode(tokens[:length])
            rows.append(f"| {'✓' if pred == label else '✗'} | {pred} | {label} | `{text}` |")
        writer.add_text("viz/expressions", printable("\n".join(rows)), step)
