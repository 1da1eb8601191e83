"""Data shared by all tasks: the order of training samples, and loaders that can start at any position.

The order is a pure function of (seed, epoch, position): epoch e visits a permutation drawn from (seed, e), cut into
global batches that the ranks divide among themselves. Where a run stands follows from the number of batches it has
consumed, which Lightning's checkpoints hold; what was prefetched does not count.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, default_collate

from hgrn2.config import ConfigError, check
from tasks.base import plain
from tasks.cli.signals import outlive_signals
from tasks.dataset import SPLITS, Dataset, KeyedDataset, SampleKey, check_options, find_dataset
from tasks.schedule import limited
from tasks.seeds import Stream, sequence

SPLITS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of `size` samples that epoch `epoch` visits."""
    return np.random.default_rng(sequence(seed, Stream.ORDER, epoch)).permutation(size)


class TrainOrder:
    """Batches of keys for one rank, from global batch `start()` on, for one epoch's worth of batches.

    With `repeat`, every epoch is the first so many batches of the first epoch, augmentation included.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start: Callable[[], int],
        repeat: int = 0,
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.start, self.repeat = rank, world_size, start, repeat

    def __len__(self) -> int:
        return self.size // self.batch_size

    def _place(self, position: int) -> tuple[int, int]:
        """The epoch, and the batch in it, of a global batch."""
        return (0, position % self.repeat) if self.repeat else divmod(position, len(self))

    def batch(self, position: int, order: np.ndarray | None = None) -> list[SampleKey]:
        """This rank's share of the global batch at `position` (counted from the start of the run)."""
        epoch, offset = self._place(position)
        order = epoch_order(self.seed, epoch, self.size) if order is None else order
        share = self.batch_size // self.world_size
        begin = offset * self.batch_size + self.rank * share
        return [SampleKey(epoch, int(i)) for i in order[begin : begin + share]]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        start, order, drawn = self.start(), None, None
        # Lightning ends an epoch by its own count, so running into the next one is harmless and keeps
        # epochs shortened by limit_train_batches moving through the data
        for position in range(start, start + len(self)):
            epoch, _ = self._place(position)
            if drawn != epoch:
                order, drawn = epoch_order(self.seed, epoch, self.size), epoch
            yield self.batch(position, order)


class EvalOrder:
    """Every sample once, ranks taking turns; the same number of batches on each, so that collectives match.

    Ranks that run out get fillers (`valid` False) that no metric counts. With `mixed` the samples come in a fixed
    random order, so that the first of them, which limit_val_batches keeps, are like the rest.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int, mixed: bool = False):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size
        self.mixed = mixed

    def __len__(self) -> int:
        per_rank = -(-self.size // self.world_size)
        return -(-per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = epoch_order(0, 0, self.size).tolist() if self.mixed else range(self.size)
        places = range(self.rank, -(-self.size // self.world_size) * self.world_size, self.world_size)
        keys = [SampleKey(0, order[i], True) if i < self.size else SampleKey(0, 0, False) for i in places]
        for begin in range(0, len(keys), self.batch_size):
            yield keys[begin : begin + self.batch_size]


class Loader:
    """A DataLoader over an order. Not a DataLoader subclass: Lightning would replace its sampler under DDP."""

    def __init__(self, dataset: KeyedDataset, order, collate: Callable, num_workers: int, pin_memory: bool):
        self.order = order
        self._loader = DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=outlive_signals,
            pin_memory=pin_memory,
            # its own generator: drawing the workers' base seed must not touch the global one
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict]:
        try:
            yield from self._loader
        except ConfigError as error:  # a worker hands it on inside the text of its traceback
            raise ConfigError(str(error).strip().rpartition("ConfigError: ")[2]) from error

    # Lightning asks a resumable loader for these; the position itself is held by the data module
    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class TaskData(LightningDataModule):
    """A data set by name, its samples in an order that can be resumed anywhere, in batches.

    Args:
        dataset: which data set: a name, or package.module:Class (the current folder is looked in, too); null for the
            first name.
        path: where its files lie; null for data that needs none.
        options: the data set's own options by name (on the command line they stand beside these: data.NAME).
        batch_size: training samples a step over all devices together, so that a recipe keeps its meaning on any
            number of GPUs; times trainer.accumulate_grad_batches per optimiser step.
        eval_batch_size: samples a step and device in evaluation; null for batch_size.
        num_workers: loader processes a device.
        seed: of the training order and the augmentation.
    """

    datasets: ClassVar[dict[str, type]] = {}  # by name; a person's own need not be here

    def __init__(
        self,
        dataset: str | None = None,
        path: str | None = None,
        options: dict[str, Any] | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        problems = [f"data.batch_size={batch_size} must be at least 1"] if batch_size < 1 else []
        if eval_batch_size is not None and eval_batch_size < 1:
            problems.append(f"data.eval_batch_size={eval_batch_size} must be at least 1")
        if num_workers < 0:
            problems.append(f"data.num_workers={num_workers} must not be negative")
        if seed < 0:
            problems.append(f"data.seed={seed} must not be negative")
        check(problems)
        self.dataset, self.dataset_class = self.choose(dataset)
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and not self.path.exists():
            raise ConfigError(f"data.path={path}: no such file or folder")
        self.options = dict(options or {})
        check_options(self.dataset, self.dataset_class, self.options, path)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.splits: dict[str, Dataset] = {}
        self._resumed: dict | None = None
        self._fingerprints: dict[str, str] = {}

    @classmethod
    def choose(cls, name: str | None) -> tuple[str, type]:
        """(name, class) of a data set; None is the first of `datasets`."""
        if name is None:
            if not cls.datasets:
                raise ConfigError("data.dataset: a value is missing: package.module:Class")
            name = next(iter(cls.datasets))
        return name, find_dataset(name, cls.datasets)

    def __getstate__(self) -> dict:
        """For workers that are not forked (macOS): `collate` goes to them with us, the trainer cannot."""
        return {**self.__dict__, "trainer": None}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack a batch of samples; override for ragged ones."""
        return default_collate(items)

    def split(self, name: str) -> Dataset:
        """The data set's split train, val or test, made when it is first asked for."""
        if name not in self.splits:
            path = {} if self.path is None else {"path": self.path}
            self.splits[name] = self.dataset_class(split=name, **path, **self.options)
        return self.splits[name]

    @property
    def info(self) -> dict[str, int]:
        """What a model has to know of the data, by the names of the model's arguments."""
        made = next(iter(self.splits), "train")
        return dict(getattr(self.split(made), "info", {}))

    def example(self) -> dict[str, Any]:
        """A batch of one held-out sample, always the same."""
        dataset = KeyedDataset(self.split("val"), self.seed, train=False)
        return self.collate([dataset[SampleKey(0, 0, True)]])

    def prepare_data(self) -> None:
        # read the data before any folder or logger exists, so that a wrong path leaves nothing behind
        self.setup(self.trainer.state.fn if self.trainer else None)
        for split in self.splits.values():
            len(split)

    def setup(self, stage: str | None = None) -> None:
        for name in SPLITS_OF.get(stage, SPLITS):
            self.split(name)

    @property
    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_batches(self) -> int:
        """Global training batches an epoch, before any limit of the Trainer's."""
        return len(self.split("train")) // self.batch_size

    def _overfit_batches(self, batches: int, what: str = "training") -> int:
        """How many of so many batches trainer.overfit_batches repeats; 0 without it."""
        limit = self.trainer.overfit_batches if self.trainer else 0
        repeated = limited(batches, limit)
        if limit and not repeated:
            raise ConfigError(f"trainer.overfit_batches={limit} of {batches} {what} batches is none: give a number")
        return repeated

    def _judged_samples(self) -> int:
        """Validation samples that a score is of: trainer.limit_val_batches counts the batches of each device."""
        size, (rank, world_size) = len(self.split("val")), self._ranks
        batches = len(EvalOrder(size, self.eval_batch_size, rank, world_size))
        used = limited(batches, self.trainer.limit_val_batches if self.trainer else 1.0)
        return min(size, used * self.eval_batch_size * world_size)

    def consumed_batches(self) -> int:
        """Global batches that training has consumed since the start of the run."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0

    def _loader(self, split: str, order) -> Loader:
        pin = bool(self.trainer) and self.trainer.strategy.root_device.type == "cuda"
        dataset = KeyedDataset(self.split(split), self.seed, train=split == "train")
        return Loader(dataset, order, self.collate, self.num_workers, pin)

    def train_dataloader(self) -> Loader:
        rank, world_size = self._ranks
        size = len(self.split("train"))
        if self.batch_size > size:
            raise ConfigError(f"data.batch_size={self.batch_size} exceeds the {size} training samples")
        if self.batch_size % world_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} is the batch over all devices and must be divisible by their "
                f"number ({world_size}: trainer.devices x trainer.num_nodes)"
            )
        self._check_resumed()
        repeat = self._overfit_batches(self.train_batches())
        order = TrainOrder(size, self.batch_size, self.seed, rank, world_size, self.consumed_batches, repeat)
        return self._loader("train", order)

    def _eval_loader(self, split: str, mixed: bool = True) -> Loader:
        return self._loader(split, EvalOrder(len(self.split(split)), self.eval_batch_size, *self._ranks, mixed))

    def val_dataloader(self) -> Loader:
        loader = self._eval_loader("val")
        self._overfit_batches(len(loader), "validation")
        return loader

    def test_dataloader(self) -> Loader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> Loader:
        """The test split in its own order; rank r has samples r, r + ranks, ..."""
        return self._eval_loader("test", mixed=False)

    def state_dict(self) -> dict:
        if "train" not in self.splits:
            return {}
        return {**self._signature(), "samples_consumed": self.consumed_batches() * self.batch_size}

    def load_state_dict(self, state: dict) -> None:
        self._resumed = state

    def _signature(self) -> dict:
        """What must stay the same for a resumed run to see the samples that the uninterrupted run would have seen, and
        to judge by the same ones."""
        for name in {"train", *self.splits} - {"test", *self._fingerprints}:
            self._fingerprints[name] = self.split(name).fingerprint()
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "training_data": self._fingerprints["train"],
            "validation_data": self._fingerprints.get("val"),
            "validation_samples": self._judged_samples() if "val" in self.splits else None,
            "overfit_batches": self._overfit_batches(self.train_batches()),
            "options": plain(self.options, "data"),  # only to name what differs: the fingerprint decides
        }

    def _check_resumed(self) -> None:
        if not self._resumed:
            return
        then, now = self._resumed, self._signature()
        problems = [
            f"data.{key}={now[key]} (checkpoint: {then[key]}) would change the order of the training samples"
            for key in ("batch_size", "seed")
            if now[key] != then[key]
        ]
        repeats = then.get("overfit_batches", 0)  # unknown to earlier versions
        if now["overfit_batches"] != repeats:
            problems.append(f"trainer.overfit_batches repeats {now['overfit_batches']} batches (checkpoint: {repeats})")
        # another validation would make the best score so far mean something else
        for which in ("training", "validation"):
            key = f"{which}_data"
            if now[key] == then.get(key, now[key]):
                continue
            before = then.get("options", {})
            names = [name for name in now["options"] if name in before and now["options"][name] != before[name]]
            differs = ", ".join(f"data.{name}={now['options'][name]} (checkpoint: {before[name]})" for name in names)
            why = differs or "other files, or other data.* settings"
            problems.append(f"the {which} data is not the checkpoint's ({why})")
        judged, before = now["validation_samples"], then.get("validation_samples")  # None: unknown to earlier versions
        if None not in (judged, before) and judged != before:
            problems.append(
                f"a validation takes {judged} samples, the checkpoint's scores are of {before} "
                "(trainer.limit_val_batches times data.eval_batch_size times the number of devices)"
            )
        consumed = self.consumed_batches() * self.batch_size
        if self.trainer and not problems and consumed != then["samples_consumed"]:
            problems.append(f"its loops stand at sample {consumed}, its data at {then['samples_consumed']}")
        if problems:
            raise ConfigError(f"cannot resume: {'; '.join(problems)}; put it back, or start a new run")
