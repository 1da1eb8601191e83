"""Sequences of tokens with one label each, as Long Range Arena's. The demo is ListOps, drawn here at laptop size.

A data set of sequences gives `tokens` int64 `[length]`, of any lengths, and `label`. Optional: `decode(tokens)` for the
samples in TensorBoard, and `labels` (all of them), from which the score of guessing follows.
"""

from typing import Any

import numpy as np
import torch

from tasks.data import TaskData
from tasks.lra.listops import ListOps


class LRAData(TaskData):
    """Data sets of sequences by name: listops (Long Range Arena's grammar, drawn at any size).

    Args:
        dataset: which data set: a name, or package.module:Class (the current folder is looked in, too); null for the
            first name.
        path: where its files lie; null for data that needs none.
        options: the data set's own options by name (on the command line they stand beside these: data.NAME).
        packed: compute on real tokens only, all rows of a batch in one, in place of padded rows; the same results for
            less work. null: on CUDA.
        batch_size: training samples a step over all devices together.
        eval_batch_size: samples a step and device in evaluation; null for batch_size.
        num_workers: loader processes a device.
        seed: of the training order and the augmentation.
    """

    datasets = {"listops": ListOps}

    def __init__(
        self,
        dataset: str | None = None,
        path: str | None = None,
        options: dict[str, Any] | None = None,
        packed: bool | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(dataset, path, options, batch_size, eval_batch_size, num_workers, seed)
        self.packed = packed

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.packed is None and self.trainer is not None:
            self.packed = self.trainer.strategy.root_device.type == "cuda"

    def majority(self, split: str) -> float | None:
        """Share of the split's most frequent label: what guessing it would score; None where labels are not listed."""
        labels = getattr(self.split(split), "labels", None)
        return None if labels is None else float(np.bincount(labels).max() / len(labels))

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows padded with zeros on the right; `lengths` say what is real, and padding is never read."""
        real_tokens = sum(len(item["tokens"]) for item in items)  # on the host, for throughput
        lengths = torch.tensor([len(item["tokens"]) for item in items], dtype=torch.int32)
        tokens = torch.zeros(len(items), int(lengths.max()), dtype=torch.int64)
        for row, item in zip(tokens, items, strict=True):
            row[: len(item["tokens"])] = torch.as_tensor(item["tokens"])
        label = torch.tensor([int(item["label"]) for item in items])
        valid = torch.tensor([item["valid"] for item in items])
        batch = {"tokens": tokens, "lengths": lengths, "label": label, "valid": valid, "real_tokens": real_tokens}
        if self.packed:
            real = torch.arange(tokens.shape[1]) < lengths[:, None]
            batch["places"] = real.flatten().nonzero().squeeze(1)
        return batch

    def decode(self, tokens: np.ndarray) -> str:
        """A sequence as text, without padding."""
        decode = getattr(self.split("val"), "decode", None)
        return decode(tokens) if decode else " ".join(map(str, np.asarray(tokens).tolist()))
