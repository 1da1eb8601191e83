"""Random sequences of Long Range Arena's lengths, for benchmarks/train.py (data.dataset=random_data:ListOpsLengths)."""

import numpy as np

# every twentieth of the training set, `<eos>` counted; IMDB's in characters, cut at 4,096
IMDB = (
    53, 357, 513, 627, 665, 703, 743, 791, 844, 909, 980,
    1059, 1161, 1286, 1430, 1615, 1853, 2160, 2618, 3434, 4096,
)  # fmt: skip


class ListOpsLengths:
    """Lengths from 500 to 1,622, all as likely: ListOps' mean of 1,061 (its longest, 2,000, does not occur)."""

    info = {"num_classes": 10, "vocab_size": 17}
    quantiles = (500, 1622)

    def __init__(self, split: str, size: int = 4096):
        self.size, self.split = size, split

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        return f"{type(self).__name__} {self.size}"

    def get(self, index: int, rng: np.random.Generator | None) -> dict:
        rng = np.random.default_rng((len(self.split), index))
        grid = np.linspace(0, 1, len(self.quantiles))
        length = int(np.interp(rng.random(), grid, self.quantiles))
        tokens = rng.integers(1, self.info["vocab_size"], length)
        return {"tokens": tokens, "label": int(rng.integers(self.info["num_classes"]))}


class TextLengths(ListOpsLengths):
    """IMDB's lengths, mean 1,300."""

    info = {"num_classes": 2, "vocab_size": 135}
    quantiles = IMDB
