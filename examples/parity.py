"""A data set of one's own: is the number of ones odd? python train.py task=lra data.dataset=parity:Parity"""

import numpy as np

from tasks.dataset import hash_text


class Parity:
    """Random bits; the label is their sum modulo 2. `length` is an option: data.length=64."""

    info = {"vocab_size": 2, "num_classes": 2}

    def __init__(self, split: str, size: int = 10_000, length: int = 32):
        self.split, self.size, self.length = ("train", "val", "test").index(split), size, length

    def __len__(self) -> int:
        return self.size if self.split == 0 else self.size // 10

    def get(self, index: int, rng: np.random.Generator | None) -> dict:
        tokens = np.random.default_rng((self.split, index)).integers(0, 2, self.length)
        return {"tokens": tokens, "label": int(tokens.sum() % 2)}

    def fingerprint(self) -> str:
        return hash_text(len(self), self.length)
