"""A run's record, config.yaml and the loggers' files: begun once nothing can refuse the command any more."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from tasks.cli import compose
from tasks.cli.loggers import RunTensorBoard, Waiting
from tasks.cli.runs import write_atomically


class Record(Callback):
    """Opens the loggers when training starts, and writes config.yaml: a new run's at once, a continued run's after its
    first optimiser step, since it replaces the settings that are known to work.

    Args:
        path: of config.yaml; None: not written
        task: the task's name
        config: the resolved configuration
        changed: the settings whose values differ from the task's defaults
        fresh: whether the run is a new one
    """

    def __init__(
        self, path: Path | None, task: str, config: dict[str, Any], changed: dict[str, Any], fresh: bool
    ) -> None:
        self.path, self.task, self.config, self.changed, self.fresh = path, task, config, changed, fresh
        self._start = 0
        self._written = path is None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, Waiting):
                logger.open()
        if self.fresh:
            self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > self._start:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        text = compose.to_yaml(self.config)
        head = f"# task: {self.task}\n# command: {' '.join(sys.argv[1:])}\n"
        write_atomically(self.path, lambda file: file.write((head + text).encode()))
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoard):
                logger.log_settings({"task": self.task} | self.changed)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "), self._start)
