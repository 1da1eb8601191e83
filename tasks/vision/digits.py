"""scikit-learn's digits: 1,797 photographed handwritten digits of 8 x 8 pixels, shipped with the library."""

from functools import lru_cache
from typing import Any

import numpy as np

from tasks.dataset import hash_arrays

MEAN, STD = 4.883, 6.017  # over the training split's pixels, which go from 0 to 16


@lru_cache(maxsize=1)
def split_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """split -> (images fp32 `[N, 8, 8]`, labels); a constant of the data set, whatever the run's seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images.astype(np.float32), digits.target
    order = np.random.default_rng(0).permutation(len(images))
    held_out = len(order) // 5
    test, rest = order[:held_out], order[held_out:]
    val, train = rest[: len(rest) // 10], rest[len(rest) // 10 :]
    return {name: (images[index], labels[index]) for name, index in (("train", train), ("val", val), ("test", test))}


class Digits:
    """One split as normalised images `[1, 8, 8]` fp32: a fixed fifth is the test set, a tenth of the rest validation.

    Args:
        split: train, val or test.
        augment: shift training images by up to one pixel.
    """

    info = {"num_classes": 10, "img_size": 8, "in_chans": 1}

    def __init__(self, split: str, augment: bool = True):
        self.images, self.labels = split_digits()[split]
        self.shift = augment and split == "train"

    def __len__(self) -> int:
        return len(self.images)

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        image = self.images[index]
        if rng is not None and self.shift:
            down, right = rng.integers(0, 3, size=2)
            image = np.pad(image, 1)[down : down + 8, right : right + 8]
        image = (image - MEAN) / STD
        return {"image": image[None].astype(np.float32), "label": int(self.labels[index]), "index": index}

    def fingerprint(self) -> str:
        return hash_arrays(self.images, self.labels, np.array(self.shift))
