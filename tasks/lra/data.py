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
    """Data sets of sequences by name: listops (Long Range Arena's grammar, drawn at any size)."""

    datasets = {"listops": ListOps}

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
        return {"tokens": tokens, "lengths": lengths, "label": label, "valid": valid, "real_tokens": real_tokens}

    def decode(self, tokens: np.ndarray) -> str:
        """A sequence as text, without padding."""
        decode = getattr(self.split("val"), "decode", None)
        return decode(tokens) if decode else " ".join(map(str, np.asarray(tokens).tolist()))
