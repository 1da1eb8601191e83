"""Stopping well: a signal finishes the optimiser step and writes last.ckpt; a NaN loss stops with a reason.

Lightning's own handlers (2.6) are never installed: that of SIGTERM runs a collective inside the handler and saves
nothing, that of SLURM's warning writes a checkpoint of its own and requeues the job. Instead, ``Signals`` sets a flag,
and ``Guard`` makes all ranks agree on it at the end of each optimiser step.
"""

import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hgrn2.config import ConfigError
from tasks.cli.checkpoints import Checkpoints
from tasks.cli.settings import check_loop
from tasks.cli.signals import Leave, Signals, status
from tasks.internals import keep_signal_handlers, set_logged_step

NEVER = 2**62  # larger than any step


class Guard(Callback):
    """Watches for a signal and for losses that are not finite, and leaves the fit at a point that resumes exactly."""

    def __init__(self, signals: Signals, checkpoints: Checkpoints, start: Path | None = None) -> None:
        self.signals, self.checkpoints, self.start = signals, checkpoints, start
        checkpoints.guard = self
        self.stepped = False  # whether this process has taken a step, or evaluated a batch outside of training
        self.stopping = 0  # the signal that all ranks agreed to obey
        self._group: Any = None
        self._step = 0
        self._first_bad: torch.Tensor | None = None  # step of the first bad loss; stays on the device
        self._common_val_batches = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        keep_signal_handlers(trainer)
        self.signals.children = list(getattr(trainer.strategy.launcher, "procs", []))
        self.signals.many = trainer.world_size > 1
        if self.signals.many and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")  # host memory: never waits for a GPU
            start = self.start and str(self.start.absolute())
            first = trainer.strategy.broadcast(start)
            if not trainer.strategy.reduce_boolean_decision(start == first):
                raise ConfigError(
                    f"rank {trainer.global_rank} starts from {start}, rank 0 from {first}: the ranks disagree; "
                    "run_root must be on storage that all nodes share"
                )

    def _agree(self, *values: int) -> list[int]:
        """The largest of each value over all ranks."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for note in check_loop(trainer):
            rank_zero_info(note)
        self.signals.deferred = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave_if_asked(trainer)
        self._step = trainer.global_step
        # The step of the loggers. Lightning restores it one off in some states; Guard comes before all that log.
        set_logged_step(trainer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            step = torch.where(torch.isfinite(loss.detach()).all(), NEVER, self._step + 1)
            self._first_bad = step if self._first_bad is None else torch.minimum(self._first_bad, step)
        if trainer.global_step == self._step:
            return  # inside an accumulation
        self.stepped = True
        free = self._first_bad is None or self._first_bad.device.type == "cpu"
        look = free or trainer.global_step % max(trainer.log_every_n_steps, 1) == 0
        self.stopping, bad = self._agree(self.signals.received or 0, -self._bad_step() if look else -NEVER)
        self._leave_if_bad(trainer, -bad)

    def _bad_step(self) -> int:
        return NEVER if self._first_bad is None else int(self._first_bad)  # waits for the device

    def _leave_if_bad(self, trainer: Trainer, step: int, what: str = "the loss is not finite (NaN or inf)") -> None:
        if step >= NEVER:
            return
        saved = self.checkpoints.saved_step
        good = self.checkpoints.last_model_path
        if saved is None:
            good = self.start  # nothing written by this process: what it started from
        kept = f"Last good checkpoint: {good}" + (f" (step {saved})." if saved is not None else ".")
        where = f"optimizer step {step} (epoch {trainer.current_epoch})"
        self._leave(
            trainer,
            1,
            f"{what} at {where}. {kept if good else 'No checkpoint was written yet.'} "
            "Try a lower learning rate, gradient clipping, or a higher trainer.precision.",
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in pl_module.parameters())
        loss_step, weights_step = self._agree(-self._bad_step(), -NEVER if finite else -trainer.global_step)
        self._leave_if_bad(trainer, -loss_step)
        self._leave_if_bad(trainer, -weights_step, "a weight is not finite (NaN or inf)")

    # The places to leave: after everything about a batch is logged and last.ckpt is written.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_asked(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            batches = trainer.num_val_batches
            mine = sum(batches) if isinstance(batches, list) else batches
            # Ranks may hold different numbers of batches: agree only on those that all of them have.
            self._common_val_batches = 0 if mine == float("inf") else -self._agree(-int(mine))[0]

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.stepped = True

    on_predict_batch_end = on_test_batch_end

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.stepped |= trainer.state.fn != "fit"
        if self._common_val_batches > 0 and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._common_val_batches -= 1
            self.stopping = self._agree(self.signals.received or 0)[0]
            self._leave_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_if_asked(trainer)
        self.signals.deferred = False

    def _leave_if_asked(self, trainer: Trainer) -> None:
        if self.stopping:
            name = signal.Signals(self.stopping).name
            last = self.checkpoints.last_model_path if self.checkpoints.saved_step is not None else self.start
            self._leave(
                trainer,
                status(self.stopping),
                f"{name}: stopped after optimizer step {trainer.global_step}. "
                + (f"Last checkpoint: {last}" if last else "No checkpoint was written."),
            )

    def _leave(self, trainer: Trainer, code: int, message: str) -> None:
        """Every rank comes here together. Lightning's observer would kill rank 0 when a child ends with a status."""
        self.signals.deferred = False
        procs = getattr(trainer.strategy.launcher, "procs", None)
        if procs:
            procs.clear()  # still in signals.children, which main() waits for
        self._agree(0)
        raise Leave(code, message if trainer.is_global_zero else "")
