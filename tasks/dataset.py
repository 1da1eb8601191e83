"""What a data set is: one small object for each split, ours by name or a person's own, each sample a pure function.

python train.py task=lra data.dataset=parity:Parity data.length=40      Parity of parity.py in the current folder
"""

import hashlib
import importlib
import inspect
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils import data

from hgrn2.config import ConfigError, check
from tasks.seeds import Stream, seed_globals, sequence

SPLITS = ("train", "val", "test")


class Dataset(Protocol):
    """One split of a data set, made as `Class(split=..., path=..., OPTIONS)`.

    `split` is train, val or test; `path` is data.path (a `pathlib.Path` or None) and may be left out of a constructor
    that reads no files; every further argument is an option, data.NAME on the command line. The constructor checks its
    options and raises `ConfigError` for a mistake in them.
    """

    info: dict[str, int]
    """What a model has to know, by the model's names: num_classes, vocab_size, img_size, ..."""

    def __len__(self) -> int: ...

    def get(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """Sample `index`: numbers, arrays and tensors by name.

        `rng` draws the augmentation of a training sample and is None in evaluation. The global generators of torch,
        numpy and python are seeded for the sample, too, so that any library's transform may draw from them.
        """

    def fingerprint(self) -> str:
        """A short text that differs where the samples do: a resumed run must find the same data.

        `hash_arrays` of arrays in memory, `hash_text` of names and sizes of many files; options that change samples
        belong in it.
        """


def hash_arrays(*arrays: np.ndarray) -> str:
    """A fingerprint of arrays' contents."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def hash_text(*parts: Any) -> str:
    """A fingerprint of texts, numbers and names."""
    text = "\0".join(map(str, parts))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


class SampleKey(NamedTuple):
    """Names one sample: the epoch it is drawn in (for augmentation), its index, and False for a filler."""

    epoch: int
    index: int
    valid: bool = True


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Gives torch's (CPU), numpy's and python's global generators their states back."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - libraries draw from it
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


class KeyedDataset(data.Dataset):
    """Looks samples up by `SampleKey`; all randomness of a sample is seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int, train: bool):
        self.dataset, self.seed, self.train = dataset, seed, train

    def __getitems__(self, keys: list[SampleKey]) -> list[dict[str, Any]]:
        # a batch at once: the generators' states are put aside once, not for each sample
        with global_generators_kept():
            return [self._get(key) for key in keys]

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def _get(self, key: SampleKey) -> dict[str, Any]:
        place = sequence(self.seed, Stream.SAMPLE, key.epoch, key.index)
        seed_globals(place, devices=False)
        rng = np.random.default_rng(place) if self.train else None
        return {**self.dataset.get(key.index, rng), "valid": key.valid}

    def __len__(self) -> int:
        return len(self.dataset)


def find_class(spec: str, key: str) -> type:
    """The class that `package.module:Name` (or package.module.Name) means; the current folder is looked in last."""
    module_name, _, name = spec.rpartition(":" if ":" in spec else ".")
    if not module_name or not name:
        raise ConfigError(f"{key}={spec}: expected package.module:Class")
    if "" not in sys.path:
        sys.path.append("")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # that module is there, and imports another that is not: the person sees where
        raise ConfigError(
            f"{key}={spec}: no module {module_name} in the current folder or among the installed packages"
        ) from error
    if not inspect.isclass(found := getattr(module, name, None)):
        own = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module_name]
        hint = f"; classes there: {', '.join(own)}" if own else ""
        raise ConfigError(f"{key}={spec}: module {module_name} has no class {name}{hint}")
    return found


def find_dataset(name: str, known: dict[str, type]) -> type:
    """The class of a data set by its name in `known`, or a person's own: package.module:Class."""
    if name in known:
        return known[name]
    if ":" not in name:
        raise ConfigError(f"data.dataset={name} is unknown; valid: {', '.join([*known, 'package.module:Class'])}")
    found = find_class(name, "data.dataset")
    if missing := [part for part in ("get", "__len__", "fingerprint") if not hasattr(found, part)]:
        raise ConfigError(f"data.dataset={name}: a data set needs {', '.join(missing)} (see tasks/dataset.py, Dataset)")
    if "split" not in inspect.signature(found).parameters:
        raise ConfigError(f"data.dataset={name}: its constructor must take split ({', '.join(SPLITS)})")
    return found


def options_of(dataset: type) -> dict[str, inspect.Parameter]:
    """The options of a data set: its constructor's arguments beside split and path."""
    parameters = inspect.signature(dataset, eval_str=True).parameters
    return {name: value for name, value in parameters.items() if name not in ("split", "path")}


def check_options(name: str, dataset: type, options: dict[str, Any], path: Any) -> None:
    """Refuse options that the data set does not have, or that are missing."""
    known = options_of(dataset)
    problems = [
        f"data.{key}: data.dataset={name} has no such option; its options: {', '.join(known) or 'none'}"
        for key in options
        if key not in known
    ]
    problems += [
        f"data.{key}: a value is missing, data.dataset={name} needs one"
        for key, parameter in known.items()
        if parameter.default is parameter.empty and key not in options
    ]
    if path is not None and "path" not in inspect.signature(dataset).parameters:
        problems.append(f"data.path={path}: data.dataset={name} reads no files")
    check(problems)
