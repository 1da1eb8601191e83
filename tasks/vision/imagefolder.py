"""A person's own images: a folder for each class.

PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg and maybe PATH/test/CLASS/*.jpg; or PATH/CLASS/*.jpg, which is split by a
hash of the files' names.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image

from hgrn2 import ConfigError
from tasks.dataset import hash_text

MODES = {1: "L", 3: "RGB"}  # channels: PIL's name
MEAN, STD = 0.5, 0.5  # of every channel: pixels from -1 to 1


def split_of(name: str) -> str:
    """train (80%), val or test (10% each) from a hash of a file's relative name: stable across machines."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


def list_images(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """(names of the classes, (file, class) of every image) of a folder with a folder for each class."""
    from torchvision.datasets import ImageFolder as Listing

    try:
        listing = Listing(root)
    except FileNotFoundError as error:
        raise ConfigError(f"data.path={root}: {str(error).splitlines()[0]}") from error
    return listing.classes, listing.samples


class ImageFolder:
    """One split of a folder of images, as fp32 `[in_chans, img_size, img_size]` from -1 to 1.

    Training images are random crops (8 to 100% of the area), flipped at random; evaluation takes the middle.

    Args:
        split: train, val or test.
        path: the folder: train/CLASS/IMAGE and val/CLASS/IMAGE (without test/, val is the test set), or CLASS/IMAGE,
            split 80/10/10 by a hash of each file's name.
        img_size: side of the square images that the model sees, in pixels.
        in_chans: 3 for colour, 1 for grey.
        augment: random crops and flips in training; without it training images are cut as in evaluation.
    """

    def __init__(
        self, split: str, path: Path | None = None, img_size: int = 64, in_chans: int = 3, augment: bool = True
    ):
        if path is None:
            raise ConfigError("data.path: a value is missing, data.dataset=imagefolder needs a folder of images")
        if in_chans not in MODES:
            raise ConfigError(f"data.in_chans={in_chans} must be 3 (colour) or 1 (grey)")
        if img_size < 1:
            raise ConfigError(f"data.img_size={img_size} must be at least 1")
        self.class_names, self.samples = self._find(split, path)
        if len(self.class_names) < 2:
            raise ConfigError(f"data.path={path}: one class only ({self.class_names[0]}); expected a folder for each")
        if not self.samples:
            raise ConfigError(f"data.path={path}: too few images, none is in the {split} split")
        self.root, self.mode = path, MODES[in_chans]
        self.info = {"num_classes": len(self.class_names), "img_size": img_size, "in_chans": in_chans}
        self._transform = self._make_transform(img_size, in_chans, split == "train" and augment)
        self._settings = (img_size, in_chans, split == "train" and augment)

    @staticmethod
    def _find(split: str, path: Path) -> tuple[list[str], list[tuple[str, int]]]:
        if not (path / "train").is_dir():
            names, samples = list_images(path)
            return names, [s for s in samples if split_of(Path(s[0]).relative_to(path).as_posix()) == split]
        folder = path / split
        if split == "test" and not folder.is_dir():
            rank_zero_info(f"data.path={path}: there is no test/, so val/ is the test set")
            folder = path / "val"
        names, samples = list_images(folder)
        expected = sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir())
        if names != expected:
            odd = sorted(set(names) ^ set(expected))
            raise ConfigError(f"data.path={path}: {folder.name}/ and train/ differ in classes: {', '.join(odd[:5])}")
        return names, samples

    @staticmethod
    def _make_transform(img_size: int, in_chans: int, augment: bool):
        from torchvision.transforms import v2

        cut = [v2.RandomResizedCrop(img_size, antialias=True), v2.RandomHorizontalFlip()]
        if not augment:
            cut = [v2.Resize(round(img_size * 8 / 7), antialias=True), v2.CenterCrop(img_size)]
        return v2.Compose([*cut, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        file, label = self.samples[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert(self.mode)
        except Exception as error:  # PIL's decoders, on bytes of any kind: OSError, ValueError, SyntaxError, ...
            raise ConfigError(f"{file}: cannot be read as an image: {error}") from error
        return {"image": (self._transform(image) - MEAN) / STD, "label": label, "index": index}

    def fingerprint(self) -> str:
        files = ((os.path.relpath(file, self.root), os.path.getsize(file), label) for file, label in self.samples)
        return hash_text(*self._settings, *(part for file in files for part in file))
