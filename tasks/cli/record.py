"""A run's record, config.yaml and the loggers' files: begun once nothing can refuse the command any more."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from tasks.cli import compose
from tasks.cli.loggers import RunTensorBoard, Waiting
from tasks.cli.runs import write_atomically
from tasks.cli.text import command
from tasks.progress import say


class Record(Callback):
    """Opens the loggers when training starts, and writes config.yaml: a new run's at once, a continued run's after its
    first optimiser step, since it replaces the settings that are known to work.

    Args:
        folder: of the run; None: nothing is written
        root: where the run folders are
        task: the task's name
        words: the command line
        config: the resolved configuration
        changed: the settings whose values differ from the task's defaults
        fresh: whether the run is a new one
    """

    def __init__(
        self,
        folder: Path | None,
        root: Path,
        task: str,
        words: list[str],
        config: dict[str, Any],
        changed: dict[str, Any],
        fresh: bool,
    ) -> None:
        self.folder, self.root, self.task, self.words = folder, root, task, words
        self.config, self.changed, self.fresh = config, changed, fresh
        self._start = 0
        self._written = self._announced = folder is None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = trainer.global_step
        if trainer.should_stop:
            return  # a finished run is resumed: nothing will happen
        for logger in trainer.loggers:
            if isinstance(logger, Waiting):
                logger.open()
        if self.fresh:
            self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not self._announced and trainer.is_global_zero:
            self._announce(trainer)
        if trainer.global_step > self._start:
            self._write(trainer)

    def _announce(self, trainer: Trainer) -> None:
        """After the first batch: from now on the folder stays."""
        self._announced = True
        say(f"run folder: {self.folder}")
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            say(f"  watch:  {command('tensorboard', '--logdir', self.root)}")

    def _write(self, trainer: Trainer) -> None:
        if self._written or not trainer.is_global_zero:
            return
        self._written = True
        text = compose.to_yaml(self.config)
        head = compose.heading(self.task, self.words)
        write_atomically(self.folder / "config.yaml", lambda file: file.write((head + text).encode()))
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoard):
                logger.log_settings({"task": self.task} | self.changed)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "), self._start)
