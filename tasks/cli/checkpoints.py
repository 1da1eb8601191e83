"""When ``last.ckpt`` and ``best.ckpt`` are written, and in which state, so that a resumed fit repeats every loss.

Lightning's loops save whatever their counters say in the hook that saves, and some of these states resume inexactly
(an epoch counted twice, a validation skipped, a batch too many). ``settle`` rewrites the counters to one of three
states that resume exactly: between two batches, before a validation, or after an epoch. Every checkpoint says whether
it is one of them (``inexact``: why not), and nothing continues from one that is not: inside an accumulation, say, where
the gradients so far are in no checkpoint.
"""

import copy
import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from hgrn2.config import ConfigError
from tasks.callbacks import logged_step
from tasks.cli.runs import link_atomically, read_checkpoint
from tasks.internals import validates_now, validates_this_epoch


def settle(trainer: Trainer, loops: dict[str, Any], validated: bool) -> None:
    """Rewrites the fit loop's counters in a checkpoint. ``validated``: this batch's validation is over."""
    batch = loops["epoch_loop.batch_progress"]
    in_batch_end = batch["current"]["completed"] < batch["current"]["processed"] == batch["current"]["ready"]
    epochs = loops["epoch_progress"]
    due = in_batch_end and validates_now(trainer)
    pending = due or (trainer.validating and not validated)
    last = batch["is_last_batch"] or batch["current"]["processed"] >= trainer.num_training_batches
    in_epoch_end = epochs["current"]["processed"] == epochs["current"]["ready"]
    finished = last and not pending and (in_batch_end or in_epoch_end)

    for scope in ("total", "current"):
        _level(batch[scope], batch[scope]["processed"])
        _level(epochs[scope], epochs[scope]["ready"])
        if not finished:
            epochs[scope]["processed"] = epochs[scope]["completed"] = epochs[scope]["ready"] - 1
        val = loops["epoch_loop.val_loop.batch_progress"][scope]
        _level(val, val["ready"])
        if pending:  # Lightning runs the whole validation again where its first batch has started and not ended
            val.update(ready=1, started=1, processed=0, completed=0)
    if finished:
        _level(batch["current"], 0)
        batch["is_last_batch"] = False
    # Lightning raises this after the validation, also after one that a resume skips.
    before_raise = pending or (validated and not finished)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step - before_raise


def _level(tracker: dict[str, int], value: int) -> None:
    tracker.update(dict.fromkeys(tracker, value))


class Checkpoints(Checkpoint):
    """Writes last.ckpt and best.ckpt into the run folder.

    Args:
        every_n_steps: optimiser steps between writes of last.ckpt, which is also written around each validation and at
            each epoch's end; 0: only there
        monitor: the logged metric that decides which checkpoint is best
        mode: whether the smallest (min) or the largest (max) value is best
    """

    def __init__(
        self, every_n_steps: int = 500, monitor: str = "val/loss", mode: Literal["min", "max"] = "min"
    ) -> None:
        super().__init__()
        if every_n_steps < 0:
            raise ConfigError(f"checkpoint.every_n_steps={every_n_steps}: must be 0 or more")
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.folder: Path | None = None  # set by the command line; without one nothing is written
        self.guard: Any = None  # the Guard that may ask for a last save
        self.config: dict[str, Any] = {}  # of the run; kept in its checkpoints
        self.scores: dict[str, float] = {}  # what the validation of best.ckpt logged
        self.best_step: int | None = None
        self.saved_step: int | None = None
        self._step = -1  # before the current micro-batch
        self._validated = False
        self._stop = False  # was asked for inside an accumulation
        self._before: dict[str, Any] = {}  # callbacks' states before the current validation

    @property
    def best_score(self) -> float | None:
        return self.scores.get(self.monitor)

    @property
    def last_model_path(self) -> str:
        return str(self.folder / "last.ckpt") if self.folder else ""

    @property
    def best_model_path(self) -> str:
        return str(self.folder / "best.ckpt") if self.folder and self.best_score is not None else ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a monitor that no validation logs, before a resumed run has trained up to its first validation."""
        packages = {type(callback).__module__.partition(".")[0] for callback in trainer.callbacks}
        if stage != "fit" or not packages <= {"lightning", "tasks"}:
            return  # somebody's own callback may log whatever it likes
        names = pl_module.evaluation_names("val")
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None)
            if callback is self or (isinstance(monitor, str) and monitor.startswith("val/")):
                key = "checkpoint" if callback is self else f"trainer.callbacks: {type(callback).__name__}"
                if monitor not in names:
                    raise ConfigError(f"{key}.monitor={monitor} is not logged; logged: {', '.join(names)}")

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scores, self.best_step = state_dict.get("scores", {}), state_dict.get("best_step")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        loops = checkpoint["loops"]["fit_loop"]
        checkpoint["inexact"], checkpoint["config"] = self._inexact(trainer, loops), self.config
        if trainer.validating and not self._validated:
            checkpoint["callbacks"] = self._before  # the whole validation runs again
        settle(trainer, loops, self._validated)

    def _inexact(self, trainer: Trainer, loops: dict[str, Any]) -> str:
        """Why a resume from this moment would be another run; empty where it is the same."""
        batch = loops["epoch_loop.batch_progress"]["current"]
        if trainer.state.status == "interrupted":
            return "written while an error ended its run"
        if batch["processed"] < batch["started"]:
            return "written in the middle of a step"
        return "written inside an accumulation of gradients" if trainer.global_step == self._step else ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = -1
        if self.folder is None:
            return
        self.folder = trainer.strategy.broadcast(self.folder)
        self.load_state_dict(trainer.strategy.broadcast(self._best_there(trainer)))

    def _best_there(self, trainer: Trainer) -> dict[str, Any]:
        """What best.ckpt itself says about the best of the run that is continued: it may be newer than the checkpoint
        that the run continues from, and with another monitor it is judged by that one's value."""
        path = self.folder / "best.ckpt"
        if not trainer.ckpt_path or not path.exists():
            return {}  # the best of another run, or of an attempt that starts anew, is not the best of this one
        try:
            return read_checkpoint(path)["callbacks"][self.state_key]
        except (ConfigError, KeyError):
            return {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step, self._validated = trainer.global_step, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step:
            self._stop_later(trainer)
            return  # inside an accumulation: its gradients are in no checkpoint
        trainer.should_stop, self._stop = trainer.should_stop or self._stop, False
        loop = trainer.fit_loop
        validates = validates_now(trainer)
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        stopping = self.guard is not None and self.guard.stopping
        # After the last batch of an epoch without validation, on_train_epoch_end saves.
        if validates or (
            (due or stopping or self._validates_within_a_step(trainer))
            and not loop.epoch_loop.batch_progress.is_last_batch
        ):
            self._save_last(trainer)

    def _stop_later(self, trainer: Trainer) -> None:
        """A stop (by EarlyStopping, by trainer.max_time) waits for the end of the accumulation that it comes in."""
        trainer.should_stop, self._stop = False, trainer.should_stop or self._stop

    @staticmethod
    def _validates_within_a_step(trainer: Trainer) -> bool:
        """Whether a validation comes inside the next accumulation: a kill there should cost no more than that step."""
        loop, every, batches = trainer.fit_loop.epoch_loop, trainer.val_check_batch, trainer.accumulate_grad_batches
        if batches == 1 or not every or math.isinf(every) or not validates_this_epoch(trainer):
            return False
        done = (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx) + 1
        return (done + batches - 1) // every > done // every

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
            self._before = copy.deepcopy({key: state for key, state in states.items() if state})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.fast_dev_run or self.folder is None:
            return
        if self.monitor not in trainer.callback_metrics:  # seen in the sanity check: before any step is wasted
            logged = ", ".join(sorted(key for key in trainer.callback_metrics if key.startswith("val"))) or "nothing"
            raise ConfigError(f"checkpoint.monitor={self.monitor} is not logged; logged: {logged}")
        if trainer.sanity_checking:
            return
        self._validated = True
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # on_train_epoch_end follows at once
        whole_step = trainer.global_step != self._step
        self._save_judged(trainer, whole_step)
        if not whole_step:
            self._stop_later(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        whole_step = trainer.global_step != self._step
        if self._validated:
            self._save_judged(trainer, whole_step)
        elif whole_step:
            self._save_last(trainer)

    def _writes(self, trainer: Trainer) -> bool:
        if self.folder is None or trainer.fast_dev_run:
            return False
        for logger in trainer.loggers:
            logger.save()  # what is logged up to here is on disk with the checkpoint
        return True

    def _save_last(self, trainer: Trainer) -> None:
        if self._writes(trainer):
            trainer.save_checkpoint(self.last_model_path, weights_only=False)
            self.saved_step = trainer.global_step

    def _save_judged(self, trainer: Trainer, whole_step: bool) -> None:
        """After a validation. A new best is written as best.ckpt and then linked as last.ckpt: a kill in between leaves
        the last.ckpt from before the validation, which runs it again and comes to the same verdict."""
        if not self._writes(trainer):
            return
        logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
        score = float(trainer.callback_metrics[self.monitor])
        best = self.best_score
        better = score == score and (best is None or (score < best if self.mode == "min" else score > best))
        if not trainer.strategy.broadcast(better):
            if whole_step:
                self._save_last(trainer)
            return
        self.scores = {key: value for key, value in logged.items() if math.isfinite(value)} | {self.monitor: score}
        self.best_step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # among the first of HPARAMS' metrics, which are those it shows
                logger.log_metrics({f"train/best_{self.monitor.replace('/', '_')}": score}, logged_step(trainer))
                logger.save()
        trainer.save_checkpoint(self.best_model_path, weights_only=False)
        if whole_step:
            if Path(self.best_model_path).is_dir():  # sharded: no link
                trainer.save_checkpoint(self.last_model_path, weights_only=False)
            elif trainer.is_global_zero:
                link_atomically(Path(self.best_model_path), Path(self.last_model_path))
            trainer.strategy.barrier("last.ckpt")
            self.saved_step = trainer.global_step
