"""A callback for tests: writes every loss to a file, and sends this process a real signal at a chosen place."""

import hashlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback


class Recorder(Callback):
    """Appends ``position step loss samples`` per micro-batch, exact to the bit.

    Args:
        path: the file
        at: micro-batch (from the run's start) or validation batch at which the signal is sent; -1: never
        where: in which hook
        send: the signal
        group: whether the whole process group gets it, data workers too
        poison: micro-batch whose loss becomes NaN; -1: none
    """

    def __init__(
        self,
        path: str,
        at: int = -1,
        where: Literal["start", "backward", "end", "val"] = "start",
        send: str = "SIGKILL",
        poison: int = -1,
        group: bool = False,
    ) -> None:
        self.group = group
        self.path, self.at, self.where, self.send, self.poison = path, at, where, send, poison

    def _signal(self, where: str, position: int) -> None:
        if where == self.where and position == self.at:
            if self.group:  # sent by another process, as a shell or SLURM would
                subprocess.run(["kill", f"-{self.send.removeprefix('SIG')}", "--", f"-{os.getpgrp()}"], check=False)
            else:
                os.kill(os.getpid(), getattr(signal, self.send))

    def _position(self, trainer) -> int:
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def on_train_batch_start(self, trainer, pl_module, batch: Any, batch_idx: int) -> None:
        position = self._position(trainer)
        self._signal("start", position)
        if position == self.poison:
            for parameter in pl_module.parameters():
                parameter.data.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._signal("backward", self._position(trainer))

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx: int) -> None:
        position = self._position(trainer) - 1
        rows = next(value for value in batch.values() if value.dim() > 1)
        samples = ",".join(sorted(hashlib.md5(row.numpy().tobytes()).hexdigest()[:8] for row in rows))
        rank = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        with open(self.path + rank, "a") as file:
            file.write(f"{position} {trainer.global_step} {float(outputs['loss']).hex()} {samples}\n")
        self._signal("end", position)

    def on_validation_batch_start(self, trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking and trainer.fit_loop.epoch_loop.batch_progress.total.processed > 0:
            self._signal("val", args[2])


def read(path) -> dict[int, tuple[str, ...]]:
    """position -> (step, loss, samples); a position that was replayed must have repeated itself exactly."""
    rows: dict[int, tuple[str, ...]] = {}
    for line in Path(path).read_text().splitlines():
        position, *rest = line.split()
        assert rows.setdefault(int(position), tuple(rest)) == tuple(rest), f"micro-batch {position} was not repeated"
    return rows


def same_state(left: Any, right: Any, where: str = "") -> None:
    """Two checkpoints' contents are equal to the bit."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            same_state(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right, strict=True)):
            same_state(*pair, f"{where}.{i}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where
