"""The loggers of a run: TensorBoard by default, CSV and Weights & Biases by override, all in the run folder."""

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from hgrn2.config import ConfigError
from tasks.cli.runs import write_atomically
from tasks.plots import printable

LOGGERS = ("tensorboard", "csv", "wandb", "none")


class Waiting:
    """For a logger: touches no file before ``open``. Lightning starts loggers early, before data, model and checkpoint
    are known to fit, and a command that is refused must leave the folder of the run that it names as it was."""

    opened = False
    _early: tuple[Callable[[], None], ...] = ()

    @property
    def experiment(self) -> Any:
        return super().experiment if self.opened else DummyExperiment()

    def open(self) -> None:
        """Starts the files, with what was logged until now."""
        self.opened = True
        _ = self.experiment
        for call in self._early:
            call()
        self._early = ()

    def _when_open(self, call: Callable[[], None]) -> None:
        if self.opened:
            call()
        else:
            self._early = (*self._early, call)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._when_open(partial(super().log_metrics, metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._when_open(partial(super().log_hyperparams, params, *args, **kwargs))

    def save(self) -> None:
        if self.opened:
            super().save()


class RunTensorBoard(Waiting, TensorBoardLogger):
    """TensorBoard's events in a run folder, without Lightning's `epoch` curve and hparams.yaml (config.yaml has more).

    Args:
        folder: the run folder
        purge_step: events from this step on are dropped, since the resumed run writes them again
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """The run's line in the HPARAMS tab; TensorBoard keeps the first that a run folder holds.

        Lightning's log_hyperparams also writes the table's columns, of which TensorBoard takes those of any one run for
        all runs. Without them it shows every setting and metric that a run has.
        """
        plain = {
            key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in settings.items()
        }
        plain = {key: printable(value) if isinstance(value, str) else value for key, value in plain.items()}
        _, start, _ = hparams(plain, {})
        self.experiment._get_file_writer().add_summary(start)

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()


def _is_before(step: str | None, purge_step: int | None) -> bool:
    """Whether a row of a metrics.csv stays; one that a kill has cut short has no step, or none that is a number."""
    if not (step or "").isdecimal():
        return False
    return purge_step is None or int(step) < purge_step


class _ContinuingWriter(ExperimentWriter):
    """Lightning's deletes the metrics.csv that it finds; this one drops the rows that a resume repeats, and appends."""

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="", errors="replace") as file:
            reader = csv.DictReader(line.replace("\0", "") for line in file)
            rows = [row for row in reader if _is_before(row.get("step"), purge_step)]
            self.metrics_keys = list(reader.fieldnames or [])
        text = io.StringIO()
        writer = csv.DictWriter(text, self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, lambda out: out.write(text.getvalue().encode()))

    def _check_log_dir_exists(self) -> None:
        """Nothing is deleted."""


class RunWandb(Waiting, WandbLogger):
    """Lightning's, which waits."""


class ContinuingCSVLogger(Waiting, CSVLogger):
    """``csv/metrics.csv`` of a run folder, continued by a resumed run.

    Args:
        folder: the run folder
        purge_step: rows from this step on are dropped, since the resumed run writes them again
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        super().__init__(folder, name="", version="csv")
        self.purge_step = purge_step

    def open(self) -> None:
        self._start()
        super().open()

    @rank_zero_only
    def _start(self) -> None:
        self._experiment = _ContinuingWriter(self.log_dir, self.purge_step)


def make_loggers(names: list[str], task: str, folder: Path | None, purge_step: int | None) -> list[Logger]:
    """Loggers by name; ``purge_step`` is the step that a resumed run starts from, so that no step appears twice."""
    names = [name.strip() for name in names if name.strip()]
    if unknown := [name for name in names if name not in LOGGERS]:
        raise ConfigError(f"logger={','.join(names)}: {unknown[0]} is not one of {', '.join(LOGGERS)}")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logger=wandb: the wandb package is not installed (pip install wandb)")
    loggers: list[Logger] = []
    if folder is None:
        return loggers
    for name in names:
        if name == "tensorboard":
            loggers.append(RunTensorBoard(folder, purge_step))
        elif name == "csv":
            loggers.append(ContinuingCSVLogger(folder, purge_step))
        elif name == "wandb":
            # The id makes a resumed run continue its curves.
            key = f"{task}-{folder.name}".replace("/", "-").replace(".", "-")
            loggers.append(RunWandb(name=key, id=key, save_dir=folder, project="hgrn2", resume="allow"))
    return loggers
