"""What Lightning lacks: throughput, memory horizon, samples to look at, one line that says what runs."""

import gc
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich import get_console
from rich.table import Column, Table
from torch import Tensor

from hgrn2 import HGRN2Mixer
from hgrn2.config import check
from hgrn2.ops import choose_impl
from tasks.base import Task
from tasks.compilation import Compile
from tasks.internals import accumulates
from tasks.plots import horizon_map
from tasks.progress import Progress

MAX_HALF_LIFE = 1e6  # tokens; a gate that never forgets has none
MAX_VALUES = 65_536  # a head and layer; enough for a histogram


def logged_step(trainer: Trainer) -> int:
    """The step under which loggers keep what the last optimiser step did: they count from 0.

    What is logged here stays when a run is resumed from a checkpoint of this step, which starts at the next.
    """
    return max(trainer.global_step - 1, 0)


def tensorboard_writer(trainer: Trainer):
    """TensorBoard's SummaryWriter on the rank that has one, else None."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                return logger.experiment
    return None


class Startup(Callback):
    """One line at the start of a run: device, precision, parameters, and the implementation of the scan."""

    def on_fit_start(self, trainer: Trainer, pl_module: Task) -> None:
        rank_zero_info(describe(trainer, pl_module))


def describe(trainer: Trainer, task: Task) -> str:
    """What is about to run, in a line."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    config = task.backbone_config
    impl, reason = (config.impl, "asked for") if config.impl != "auto" else choose_impl(device, config.expand_ratio)
    parameters = sum(p.numel() for p in task.parameters())
    modes = [c.resolved(device.type) for c in trainer.callbacks if isinstance(c, Compile)]
    compiled = modes[0] if modes else "off"
    count = f"{parameters / 1e6:.2f}M" if parameters >= 1e4 else str(parameters)
    return (
        f"{type(task).__name__}: {trainer.world_size} x {name}, precision {trainer.precision}, {count} parameters, "
        f"hgrn2_scan runs {impl} ({reason}), compile={compiled}"
    )


class ModelParts(ModelSummary):
    """At the start of a fit: type, parameters and, where Lightning can count them, FLOPs of each part of the model."""

    def __init__(self) -> None:
        super().__init__(max_depth=2)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        *args: Any,
        total_flops: int = 0,
        **kwargs: Any,
    ) -> None:
        columns = dict(summary_data)
        shown = ["Type", "Params", *(["FLOPs"] if total_flops else [])]
        table = Table(
            *[Column(name, justify="left" if name == "Type" else "right") for name in ("Part", *shown)], box=None
        )
        table.columns[0].justify = "left"
        for row, name in enumerate(columns["Name"]):
            part = name.removeprefix("model.")
            # no losses, no metrics, no wholes, no dropout
            if part != name and "." not in part and columns["Params"][row].strip() != "0":
                table.add_row(part, *(columns[column][row] for column in shown))
        get_console().print(table)


@dataclass
class Tally:
    """What was trained on, by one rank, in how long."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, samples: int, tokens: int, seconds: float) -> None:
        self.samples, self.tokens, self.seconds = self.samples + samples, self.tokens + tokens, self.seconds + seconds

    def rate(self, what: str, ranks: int) -> float:
        """Samples or tokens a second of all ranks together."""
        return getattr(self, what) * ranks / max(self.seconds, 1e-9)


class ThroughputLogger(Callback):
    """Logs `train/samples_per_s` and `train/tokens_per_s` (all devices together), validation's time left out."""

    def __init__(self):
        self.run = Tally()  # since the fit began
        self.began: float | None = None
        self._window = Tally()  # since the values were last logged
        self._before: float | None = None
        self._paused = 0.0
        self._pause_began: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:
        self.run, self._window, self._before, self.began = Tally(), Tally(), None, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        before, self._before = self._before, time.perf_counter()
        paused, self._paused = self._paused, 0.0
        if before is None:  # the first step warms up: it starts the clock and does not count
            return
        for tally in (self.run, self._window):
            tally.add(*pl_module.count(batch), self._before - before - paused)
        step, every = trainer.global_step, trainer.log_every_n_steps
        if every and step and step % every == 0 and not accumulates(trainer):
            pl_module.log("train/samples_per_s", self._window.rate("samples", trainer.world_size))
            pl_module.log("train/tokens_per_s", self._window.rate("tokens", trainer.world_size))
            self._window = Tally()

    def on_validation_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._pause_began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:
        # Only now is all of a validation over: figures, checkpoints.
        if self._pause_began is not None:
            self._paused, self._pause_began = time.perf_counter() - self._pause_began, None


class GarbageCollection(Callback):
    """Python's cyclic garbage collector runs between steps that are logged, not whenever it likes: a full collection
    takes tens of milliseconds in which nothing is launched, on each rank at another time.

    Args:
        every_n_steps: optimiser steps between collections; 0 leaves the collector alone.
    """

    def __init__(self, every_n_steps: int = 1000):
        check([f"garbage.every_n_steps={every_n_steps} must be 0 or more"] * (every_n_steps < 0))
        self.every_n_steps = every_n_steps
        self._paused = False

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:
        if self.every_n_steps and gc.isenabled():
            gc.collect()
            gc.freeze()  # what is here stays: later collections need not look at it
            gc.disable()
            self._paused = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._paused and (batch_idx + 1) % self.every_n_steps == 0:
            gc.collect()

    def teardown(self, trainer: Trainer, pl_module: Task, stage: str) -> None:
        self._resume()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:
        self._resume()

    def _resume(self) -> None:
        if self._paused:
            gc.enable()
            gc.unfreeze()
            self._paused = False


class MemoryHorizon(Callback):
    """TensorBoard: how far back each layer and head remembers, on the first validation batch.

    The half-life of channel c is ln 2 / -log lam_c tokens; a histogram a layer, and a layer x head map of medians.
    """

    def __init__(self):
        self._half_lives: dict[int, Tensor] = {}
        self._handles: list = []

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx or trainer.sanity_checking or tensorboard_writer(trainer) is None:
            return
        mixers = [module for module in pl_module.modules() if isinstance(module, HGRN2Mixer)]
        self._half_lives = {}
        for layer, mixer in enumerate(mixers):
            hook = self._recorder(layer)
            self._handles.append(mixer.register_forward_pre_hook(hook, with_kwargs=True))

    def _recorder(self, layer: int):
        def record(mixer: HGRN2Mixer, args: tuple, kwargs: dict) -> None:
            x, gamma = args
            decay = -mixer.log_decay(x, gamma)  # [B, T, H, K]
            half_life = (math.log(2) / decay.clamp(min=math.log(2) / MAX_HALF_LIFE)).movedim(2, 0)
            lengths = kwargs.get("lengths")
            if lengths is not None:
                real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
                half_life = half_life[:, real]
            half_life = half_life.flatten(1)  # [H, tokens * K]
            self._half_lives[layer] = half_life[:, :: max(1, half_life.shape[1] // MAX_VALUES)].cpu()

        return record

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:
        writer = tensorboard_writer(trainer)
        if writer is None or not self._half_lives:
            return
        for layer, values in self._half_lives.items():
            writer.add_histogram(
                f"viz/memory_horizon/layer_{layer:02d}_log10_tokens", values.flatten().log10(), logged_step(trainer)
            )
        medians = np.stack([values.median(1).values.numpy() for _, values in sorted(self._half_lives.items())])
        writer.add_figure("viz/memory_horizon/map", horizon_map(medians), logged_step(trainer))
        self._half_lives = {}


class SampleViewer(Callback):
    """TensorBoard: what the model makes of a few held-out samples, at every validation.

    Args:
        count: number of samples to show.
    """

    def __init__(self, count: int = 24):
        self.count = count
        self._batch: dict[str, Tensor] | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            keep = batch["valid"].nonzero().flatten()[: self.count]
            rows = {key: x for key, x in batch.items() if isinstance(x, Tensor) and len(x) == len(batch["valid"])}
            self._batch = {key: value[keep] for key, value in rows.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:
        writer = tensorboard_writer(trainer)
        if writer is not None and self._batch is not None:
            pl_module.show_samples(writer, self._batch, logged_step(trainer))
        self._batch = None


# the command line turns each into a group of options; trainer.callbacks adds to them
CALLBACKS = {
    "startup": Startup,
    "summary": ModelParts,
    "throughput": ThroughputLogger,
    "progress": Progress,  # shows what the one before it has logged
    "garbage": GarbageCollection,
    "memory_horizon": MemoryHorizon,
    "samples": SampleViewer,
}
