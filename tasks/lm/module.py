"""The language-modelling task: next-token loss, perplexity, bits per byte, generated text."""

import math

import torch
from torch import Tensor

from hgrn2 import HGRN2Config
from hgrn2.config import check
from hgrn2.loss import IGNORED, linear_cross_entropy
from tasks.base import Task, known
from tasks.lm.model import LanguageModel
from tasks.optim import OptimConfig
from tasks.plots import printable


class LMTask(Task):
    """Causal language modelling.

    Args:
        backbone: the HGRN2 backbone (scan: causal).
        optim: optimiser and schedule.
        vocab_size: number of tokens; null for what the data says, more is allowed.
        tie_embeddings: one matrix for embedding and output.
        prompt: text that the logged sample continues.
        sample_tokens: length of the logged sample.
        temperature: of the logged sample; 0 is greedy.
        seed: of dropout and other randomness in training.
    """

    progress_metric = "bpb"

    def __init__(
        self,
        backbone: HGRN2Config = HGRN2Config(),
        optim: OptimConfig = OptimConfig(),
        vocab_size: int | None = None,
        tie_embeddings: bool = True,
        prompt: str = "def ",
        sample_tokens: int = 256,
        temperature: float = 0.8,
        seed: int = 0,
    ):
        known(vocab_size=vocab_size)
        least = {"vocab_size": (vocab_size, 1), "sample_tokens": (sample_tokens, 0), "temperature": (temperature, 0)}
        check([f"model.{k}={value} must be at least {v}" for k, (value, v) in least.items() if not value >= v])
        super().__init__(backbone, optim, seed)
        self.prompt, self.sample_tokens, self.temperature = prompt, sample_tokens, temperature
        self.model = LanguageModel(self.backbone_config, vocab_size, tie_embeddings)

    def _token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target `[B, T]` and the mask of targets that count."""
        return self._losses(batch)[1:]

    def _losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss with its gradients, each target's `[B, T]`, and the mask of targets that count."""
        tokens = batch["tokens"]
        position = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        counts = (position < batch["length"][:, None]) & batch["valid"][:, None]
        target = tokens[:, 1:].masked_fill(~counts, IGNORED)
        x = self.model.features(tokens[:, :-1])
        total, losses = linear_cross_entropy(x.flatten(0, 1), self.model.head.weight, target.flatten())
        return total, losses.view(counts.shape), counts

    def compute(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        total, _, counts = self._losses(batch)
        count = counts.sum()
        return {"loss": total / count.clamp(min=1), "sum": total, "count": count}

    def derived_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        return {"ppl": loss.exp(), "bpb": loss / math.log(2)}

    def train_scalars(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"bpb": out["loss"].detach() / math.log(2)}

    def count(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        rows, width = batch["tokens"].shape
        return rows, rows * (width - 1)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Summed loss (nats) and number of targets of each valid block."""
        losses, counts = self._token_losses(batch)
        valid = batch["valid"]
        return {"loss": losses.sum(1)[valid], "targets": counts.sum(1)[valid]}

    def show_samples(self, writer, batch: dict[str, Tensor], step: int) -> None:
        """Text that continues the prompt; drawn by its own generator, so that training's randomness is untouched."""
        data = self.trainer.datamodule
        prompt = torch.as_tensor(data.encode(self.prompt or "\n"), device=self.device)[None]
        generator = torch.Generator().manual_seed(self.seed)
        tokens = self.model.generate(prompt, self.sample_tokens, self.temperature, generator)
        text = printable(data.decode(tokens[0].cpu().numpy())).replace("\0", "\n# --- end of file ---\n")
        writer.add_text("viz/generated", "    " + text.replace("\n", "\n    "), step)
