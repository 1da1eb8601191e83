"""How far a run is: one line that moves on a terminal, plain lines elsewhere (files, nohup, SLURM)."""

import logging
import sys
import time
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from tasks.base import Task

EVAL_LINE_EVERY = 60.0  # seconds between the lines of an evaluation off a terminal


def say(text: str) -> None:
    """A line for the person, wrapped by the terminal and not by us, so that paths can be copied."""
    get_console().print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def ending(left: float | None) -> str:
    return "" if left is None else f"  {duration(left)} left"


def of(what: str, done: int, total: int | None) -> str:
    """Such as step 30/60."""
    return f"{what} {done}" + (f"/{total}" if total is not None else "")


def rate(per_second: float, unit: str) -> str:
    """Such as 12.3k tok/s."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= 0.9995 * size:
            return f"{per_second / size:.3g}{letter} {unit}/s"
    return f"{per_second:.3g} {unit}/s"


def total_steps(trainer: Trainer) -> int | None:
    """Optimiser steps at the end of the fit, by whichever limit comes first; None where only time ends it."""
    if trainer.fast_dev_run:
        return trainer.max_steps
    length = trainer.lightning_module.run_length()
    return None if length is None else length.steps


class Pace:
    """Time left, from what the steps (validations included) have taken so far in this process."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._now = (0, 0.0)

    def update(self, done: int) -> None:
        self._now = (done, time.monotonic())
        if self._first is None:  # the first step compiles and warms up: it starts the clock
            self._first = self._now

    def left(self, total: int | None) -> float | None:
        """Seconds, or None where that cannot be said yet."""
        if total is None or self._first is None or self._now[0] == self._first[0]:
            return None
        seconds = (self._now[1] - self._first[1]) / (self._now[0] - self._first[0])
        return max(total - self._now[0], 0) * seconds


class Progress(ProgressBar):
    """Step of steps, loss, metric, learning rate, throughput and time left; the values every trainer.log_every_n_steps.

    Args:
        style: bar is one line that moves, lines is a plain line per trainer.log_every_n_steps; auto takes the bar on a
            terminal and lines elsewhere
    """

    def __init__(self, style: Literal["auto", "bar", "lines"] = "auto") -> None:
        super().__init__()
        self.style = style
        self._enabled = True
        self._bar: RichProgress | None = None
        self._pace = Pace()
        self._eval_pace = Pace()
        self._handlers = [
            handler
            for name in ("", "lightning", "lightning.pytorch", "lightning.fabric")
            for handler in logging.getLogger(name).handlers
            if type(handler) is logging.StreamHandler and handler.stream is sys.stderr
        ]
        self._step = 0
        self._total: int | None = None
        self._values = ""  # of the last logged step
        self._line_at = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            say(kwargs.get("sep", " ").join(map(str, args)))

    # -- the bar -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Shows the bar, where there is to be one."""
        console = get_console()
        terminal = console.is_interactive and console.file.isatty()
        if (
            self._bar is not None
            or not self._enabled
            or not (terminal if self.style == "auto" else self.style == "bar")
        ):
            return
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[values]}", markup=False, table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            transient=True,
            refresh_per_second=4,
        )
        self._bar.start()
        console.show_cursor(True)  # a run that is killed would leave it hidden
        for handler in self._handlers:
            handler.setStream(sys.stderr)  # which the bar has replaced, so that logged lines go above it

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            for handler in self._handlers:
                handler.setStream(sys.stderr)

    def _show(self, verb: str, done: int, total: float | None, left: float | None, values: str = "") -> None:
        """Sets what the bar says; its own thread draws it."""
        if self._bar is None:
            return
        if not self._bar.tasks:
            self._bar.add_task("", left="", values="")
        fields = {"left": "" if left is None else f"{duration(left)} left", "values": values}
        self._bar.update(self._bar.tasks[0].id, description=verb, completed=done, total=total, **fields)

    # -- training ----------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._start()

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._start()
        self._pace, self._step, self._total, self._values = Pace(), trainer.global_step, total_steps(trainer), ""
        self._show("step", self._step, self._total, None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step or not self._enabled:
            return  # inside an accumulation
        self._step = trainer.global_step
        self._pace.update(self._step)
        every = trainer.log_every_n_steps
        left = self._left(trainer)
        if every and self._step % every == 0:  # only here may reading the values wait for the device
            self._values = self._read(trainer, pl_module)
            if self._bar is None:
                say(f"{of('step', self._step, self._total)}  {self._values}{ending(left)}")
        self._show("step", self._step, self._total, left, self._values)

    def _read(self, trainer: Trainer, task: Task) -> str:
        logged = trainer.callback_metrics
        forms = {
            "train/loss": "loss {:#.4g}",
            f"train/{task.progress_metric}": f"{task.progress_metric} {{:#.4g}}",
            "train/lr": "lr {:.1e}",
        }
        parts = [form.format(float(logged[name])) for name, form in forms.items() if name in logged]
        if "train/tokens_per_s" in logged:
            parts.append(rate(float(logged["train/tokens_per_s"]), "tok"))
        return "  ".join(parts)

    def _left(self, trainer: Trainer) -> float | None:
        limits = [timer.time_remaining() for timer in trainer.callbacks if isinstance(timer, Timer)]  # trainer.max_time
        limits.append(self._pace.left(self._total))
        return min((limit for limit in limits if limit is not None), default=None)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._begin(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._begin(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: Task) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._start()
        self._eval_pace, self._line_at = Pace(), time.monotonic() + EVAL_LINE_EVERY

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance("validating", "val", batch_idx, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance("testing", "test", batch_idx, dataloader_idx)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._advance("predicting", "predict", batch_idx, dataloader_idx)

    def _advance(self, verb: str, kind: str, batch_idx: int, dataloader_idx: int) -> None:
        self.has_dataloader_changed(dataloader_idx)  # tells the next line which one it is
        done, total = batch_idx + 1, getattr(self, f"total_{kind}_batches_current_dataloader")
        limit = int(total) if total < float("inf") else None
        self._eval_pace.update(done)
        left = self._eval_pace.left(limit)
        self._show(verb, done, limit, left)
        now = time.monotonic()
        if self._enabled and self._bar is None and now >= self._line_at:
            self._line_at = now + EVAL_LINE_EVERY
            say(f"{of(f'{verb}: batch', done, limit)}{ending(left)}")

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:
        if trainer.state.fn != "fit":
            self._stop()
        elif not trainer.sanity_checking:
            logged = trainer.callback_metrics
            values = "  ".join(f"{name} {float(logged[name]):#.4g}" for name in logged if name.startswith("val/"))
            self.print(f"{of('step', trainer.global_step, self._total)}  {values}")
            self._show("step", self._step, self._total, self._left(trainer), self._values)

    # -- the end -----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:
        self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: Task) -> None:
        self._stop()

    def on_predict_end(self, trainer: Trainer, pl_module: Task) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: Task, stage: str) -> None:
        self._stop()
