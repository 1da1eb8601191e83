"""Runs a command line that has been read: builds it, fits or evaluates, says where everything is, and cleans up."""

import json
import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only

from hgrn2.config import ConfigError
from tasks.cli.arguments import Request
from tasks.cli.build import DECISION, Afresh, Done, TaskCLI
from tasks.cli.choice import Choice
from tasks.cli.python import Result
from tasks.cli.refusals import refusal
from tasks.cli.report import fit_summary, save_results
from tasks.cli.runs import discard, run_around, write_atomically
from tasks.cli.signals import Leave, Signals, status
from tasks.cli.text import command
from tasks.progress import say

NOISE = (
    *("💡", "GPU available", "TPU available", "`weights_only`", "Trainer already configured with model summary"),
    *("Restoring states from the checkpoint", "Restored all states from", "Loaded model weights from"),
    *("`Trainer.fit` stopped: `max_steps", "`Trainer.fit` stopped: `max_epochs"),
    *("-----", "Using bfloat16 Automatic Mixed Precision", "Using 16bit Automatic Mixed Precision"),
)
LOUD = (
    *("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector"),
    *("fabric.utilities.rank_zero", "fabric.utilities.distributed"),
)
# A dependency's use of another's deprecated parts is no business of a person who trains.
DEPENDENCIES = r"(lightning|torch|torchmetrics|torchvision|timm|jsonargparse|tensorboard)\."


def run(cli: TaskCLI) -> Any:
    """Fits or evaluates, between the lines that say where everything is. Returns the predictions, if any."""
    verb, start = cli.request.command, cli.choice.checkpoint
    tell(cli.choice.note, start and str(start) not in cli.choice.note and f"checkpoint: {start}")
    os.environ[DECISION] = json.dumps(
        {"folder": _text(cli.folder), "checkpoint": _text(start), "run": _text(cli.choice.run)}
    )
    arguments = {"datamodule": cli.datamodule, "ckpt_path": start, "weights_only": True}
    try:
        result = getattr(cli.trainer, verb)(cli.model, **arguments)
        if cli.nothing_left:
            raise Leave(0, cli.nothing_left if cli.trainer.is_global_zero else "")
    except Leave:
        tell(*where_next(cli))
        raise
    finally:
        os.environ.pop(DECISION, None)
    if verb == "predict" and result is not None:
        save_predictions(cli, result)
    if verb in ("validate", "test") and not cli.trainer.fast_dev_run and cli.trainer.is_global_zero:
        tell(f"results: {save_results(cli.trainer, cli.request, cli.task, start, cli.start_step)}")
    tell(*where_next(cli))
    return result if verb == "predict" else None


def result_of(cli: TaskCLI, predictions: Any = None) -> Result:
    """What Python gets."""
    trainer: Trainer | None = getattr(cli, "trainer", None)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} if trainer else {}
    files = [cli.folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")] if cli.folder else []
    written = next((path for path in files if path.exists()), cli.choice.checkpoint)
    return Result(metrics, written, cli.folder or cli.choice.run, predictions)


def save_predictions(cli: TaskCLI, result: Any) -> None:
    parent = cli.choice.checkpoint.parent
    folder = parent.parent if run_around(cli.choice.checkpoint) else parent
    rank = f".rank{cli.trainer.global_rank}" if cli.trainer.world_size > 1 else ""
    path = folder / f"predictions{rank}.pt"
    write_atomically(path, lambda file: torch.save(result, file))
    tell(f"predictions: {path}")


def where_next(cli: TaskCLI) -> list[str]:
    summary = fit_summary(cli.trainer) if cli.request.command == "fit" else []
    if not cli.folder or not (cli.folder / "checkpoints").is_dir():
        return summary
    words = f"task={cli.request.task}", f"run={cli.folder}"
    return [
        *summary,
        f"run folder: {cli.folder}",
        f"  test:   {command('python', 'train.py', 'test', *words)}",
        f"  resume: {command('python', 'train.py', *words)}",
    ]


def tell(*lines: Any) -> None:
    if rank_zero_only.rank == 0:
        for line in filter(None, lines):
            say(str(line))


def close(cli: TaskCLI, completed: bool) -> None:
    """After a failure: no child lives on, and no folder of a run that never trained stays behind."""
    cli.signals.end_children(orderly=completed)
    if cli.fresh and not completed and not cli.stepped:
        discard(cli.folder)


def _text(path: Path | None) -> str | None:
    return path and str(path.absolute())


def _not_noise(record: logging.LogRecord) -> bool:
    """Without advertising, and without what our own lines say better."""
    message = record.getMessage()
    # one rank is enough to see that they are waiting for one another
    repeated = message.startswith("Initializing distributed") and "RANK: 0," not in message
    return not (message.startswith(NOISE) or repeated)


def _quiet() -> None:
    """Lightning's and its dependencies' noise, as narrow as it can be said."""
    for name in LOUD:
        logging.getLogger(f"lightning.{name}").addFilter(_not_noise)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=DEPENDENCIES)
    warnings.filterwarnings("ignore", "The number of training batches")  # of an epoch: check_loop looks at the run
    # of a size in MB that our summary does not show
    warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")


def execute(request: Request, signals: Signals) -> Result | None:
    """Builds and runs."""
    _quiet()
    if request.command != "fit":
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # callbacks that only a fit has
    cli = None
    try:
        try:
            cli = TaskCLI(request, signals)
        except Afresh as afresh:
            cli = TaskCLI(request, signals, Choice(note=str(afresh)))
        with cli.full_keys():
            return result_of(cli, _run(cli))
    except Done:
        return None
    except Leave as leave:
        if cli is not None:
            leave.result = result_of(cli)
        raise
    except ConfigError:
        raise
    except Exception as error:
        stepped = cli is not None and cli.stepped
        text = refusal(error, stepped)
        if text is None:
            raise
        if stepped:
            tell(*where_next(cli))
        raise ConfigError(text if cli is None else cli.with_settings(text)) from error


def _run(cli: TaskCLI) -> Any:
    completed = False
    try:
        cli.trainer = cli.make_trainer()
        predictions = run(cli)
        completed = True
        return predictions
    except Leave:
        completed = cli.stepped  # all ranks leave together
        raise
    except RuntimeError as error:
        # On macOS a signal to the whole group ends the data workers (see outlive_signals), and their loss ends us.
        if cli.signals.received is None or "DataLoader worker" not in str(error):
            raise
        name = signal.Signals(cli.signals.received).name
        tell(*where_next(cli))
        raise Leave(status(cli.signals.received), f"{name}: stopped, a data worker had ended") from error
    finally:
        close(cli, completed)
