"""Images. The demo is scikit-learn's digits: 1,797 photographed handwritten digits, 8 x 8, shipped with the library."""

from typing import Any, Literal

import numpy as np

from hgrn2 import ConfigError
from tasks.data import TaskData

DIGITS_MEAN, DIGITS_STD = 4.883, 6.017  # over the training split's pixels, which go from 0 to 16


class Digits:
    """One split of the digits as normalised images `[1, 8, 8]` fp32; training shifts each by up to one pixel."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, shift: bool):
        self.images, self.labels, self.shift = images, labels, shift

    def __len__(self) -> int:
        return len(self.images)

    def content(self) -> list[np.ndarray]:
        return [self.images, self.labels, np.array(self.shift)]

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        image = self.images[index]
        if rng is not None and self.shift:
            down, right = rng.integers(0, 3, size=2)
            image = np.pad(image, 1)[down : down + 8, right : right + 8]
        image = (image - DIGITS_MEAN) / DIGITS_STD
        return {"image": image[None].astype(np.float32), "label": int(self.labels[index]), "index": index}


class VisionData(TaskData):
    """Image data sets by name.

    Args:
        dataset: digits (scikit-learn's; a fixed fifth is the test set, a tenth of the rest the validation set).
        augment: augment training images (digits: shifts by up to one pixel).
    """

    def __init__(
        self,
        dataset: Literal["digits"] = "digits",
        augment: bool = True,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        if dataset != "digits":
            raise ConfigError(f"data.dataset={dataset!r} is unknown; valid: digits")
        self.dataset, self.augment = dataset, augment
        self.class_names = [str(i) for i in range(10)]

    def model_needs(self) -> dict[str, tuple[int, str]]:
        source = f"data.dataset={self.dataset}"
        return {"num_classes": (10, source), "img_size": (8, source), "in_chans": (1, source)}

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images.astype(np.float32), digits.target
        # the split is a constant of the data set, whatever the run's seed
        order = np.random.default_rng(0).permutation(len(images))
        held_out = len(order) // 5
        test, rest = order[:held_out], order[held_out:]
        val, train = rest[: len(rest) // 10], rest[len(rest) // 10 :]
        for name, index in (("train", train), ("val", val), ("test", test)):
            self.splits[name] = Digits(images[index], labels[index], shift=self.augment and name == "train")
