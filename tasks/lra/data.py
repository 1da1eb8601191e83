"""Long Range Arena data. The demo is ListOps, drawn here at laptop size."""

from typing import Any, Literal

import numpy as np
import torch

from hgrn2 import ConfigError
from tasks.data import TaskData
from tasks.lra import listops

# in the order they are drawn: an expression that a split holds is in no later one
SPLITS = ("test", "val", "train")
SPLITS_OF_STAGE = {"fit": 3, "validate": 2, "test": 1, "predict": 1}
DATA_SEED = 2011_04006  # the data set is a constant, whatever the run's seed


class ListOps:
    """One split of drawn expressions: `tokens` int64 `[length]` with `<eos>` last, and `label`."""

    def __init__(self, split: str, size: int, drawn: set[bytes], limits: dict):
        stream = SPLITS.index(split)
        samples = [listops.draw_sample((DATA_SEED, stream, i), drawn=drawn, **limits) for i in range(size)]
        self.tokens = [tokens for tokens, _ in samples]
        self.labels = np.array([label for _, label in samples])

    def content(self) -> list[np.ndarray]:
        return [*self.tokens, self.labels]

    def __len__(self) -> int:
        return len(self.tokens)

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        return {"tokens": self.tokens[index], "label": self.labels[index]}


class LRAData(TaskData):
    """Long Range Arena tasks by name.

    Args:
        task: listops.
        train_size: number of training expressions.
        eval_size: number of expressions in each of the validation and test sets.
        max_depth: levels of nesting, digits included.
        max_args: arguments an operator has at most (at least 2).
        min_length: tokens an expression has at least.
        max_length: tokens an expression has at most (without the end-of-sequence token).
    """

    def __init__(
        self,
        task: Literal["listops"] = "listops",
        train_size: int = 20_000,
        eval_size: int = 2_000,
        max_depth: int = 4,
        max_args: int = 5,
        min_length: int = 8,
        max_length: int = 64,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if task != "listops":
            raise ConfigError(f"data.task={task!r} is unknown; valid: listops")
        for key, value, least in (
            ("train_size", train_size, 1), ("eval_size", eval_size, 1), ("max_depth", max_depth, 2),
            ("max_args", max_args, 2), ("min_length", min_length, 4),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"data.{key}={value} must be at least {least}")
        if max_length < min_length:
            raise ConfigError(f"data.max_length={max_length} must not be below data.min_length={min_length}")
        longest = listops.longest(max_depth, max_args)
        if min_length > longest:
            raise ConfigError(
                f"data.min_length={min_length} cannot be reached with data.max_depth={max_depth} and "
                f"data.max_args={max_args} (at most {longest} tokens)"
            )
        self.task, self.train_size, self.eval_size = task, train_size, eval_size
        self.limits = {"max_depth": max_depth, "max_args": max_args, "lengths": (min_length, max_length)}
        self.vocabulary, self.pad = listops.VOCABULARY, listops.PAD
        self._drawn: set[bytes] = set()

    def model_needs(self) -> dict[str, tuple[int, str]]:
        source = f"data.task={self.task}"
        return {"num_classes": (listops.NUM_CLASSES, source), "vocab_size": (len(self.vocabulary), source)}

    def setup(self, stage: str | None = None) -> None:
        sizes = {"test": self.eval_size, "val": self.eval_size, "train": self.train_size}
        for split in SPLITS[: SPLITS_OF_STAGE.get(stage, len(SPLITS))]:
            if split not in self.splits:
                self.splits[split] = ListOps(split, sizes[split], self._drawn, self.limits)

    def majority(self, split: str) -> float:
        """Share of the split's most frequent label: what guessing it would score."""
        return float(np.bincount(self.splits[split].labels).max() / len(self.splits[split]))

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        real_tokens = sum(len(item["tokens"]) for item in items)  # on the host, for throughput
        lengths = torch.tensor([len(item["tokens"]) for item in items], dtype=torch.int32)
        tokens = torch.full((len(items), int(lengths.max())), self.pad)
        for row, item in zip(tokens, items, strict=True):
            row[: len(item["tokens"])] = torch.from_numpy(item["tokens"])
        label = torch.tensor([int(item["label"]) for item in items])
        valid = torch.tensor([item["valid"] for item in items])
        return {"tokens": tokens, "lengths": lengths, "label": label, "valid": valid, "real_tokens": real_tokens}

    def decode(self, tokens: np.ndarray) -> str:
        """An expression as text, without padding and `<eos>`."""
        return " ".join(self.vocabulary[t] for t in tokens if t not in (listops.PAD, listops.EOS))
