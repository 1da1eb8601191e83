"""The command line's runs from Python and notebooks: ``from tasks import run``."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.config import ConfigError
from tasks.cli.arguments import COMMANDS, Request
from tasks.cli.compose import load_task, merge, nearest, shipped_tasks
from tasks.cli.signals import Leave, Signals


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        metrics: the last value of everything that was logged, ``val/loss`` for example; empty where nothing was run.
        checkpoint: fit: best.ckpt, or last.ckpt where no validation has judged one, or None where none was written;
            otherwise the checkpoint that was evaluated.
        folder: the run folder of a fit, or None.
        predictions: what ``predict`` returned, a list with an entry a batch, or None.
    """

    metrics: dict[str, float]
    checkpoint: Path | None
    folder: Path | None
    predictions: list[Any] | None = None


def run(command: str = "fit", *, task: str, **overrides: Any) -> Result:
    """Do what ``python train.py COMMAND task=TASK ...`` does: run folders, resuming, TensorBoard, everything.

    Args:
        command: fit, validate, test or predict.
        task: a task's name, or the path of a YAML file.
        **overrides: settings: ``trainer={"max_steps": 5}``, or with dots: ``**{"trainer.max_steps": 5}``; also
            ``ckpt_path``, ``run`` and ``resume``.

    Raises:
        ConfigError: for a mistake in the settings, with one line that names it.
        KeyboardInterrupt: Ctrl-C has stopped the run; last.ckpt is written.
        RuntimeError: the loss was not finite.
    """
    if command not in COMMANDS:
        close = nearest(command, list(COMMANDS), 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{command}: expected one of {', '.join(COMMANDS)}{hint}")
    if not isinstance(task, str | Path):
        raise ConfigError(f"task={task!r}: expected a name. Tasks: {', '.join(shipped_tasks())}")
    load_task(str(task))  # a mistake in the task's name is answered before the slow imports
    from tasks.cli.execute import execute
    from tasks.progress import say

    words = [command, f"task={task}", *(f"{key}={value}" for key, value in overrides.items())]
    request = Request(command, str(task), given=nested(overrides), words=words)
    with Signals().installed() as signals:
        try:
            return execute(request, signals)
        except Leave as leave:
            if leave.code == 0:
                say(leave.message)
                return leave.result
            if leave.code == 1:
                raise RuntimeError(leave.message) from leave
            if leave.code == 128 + signal.SIGINT:
                raise KeyboardInterrupt(leave.message) from leave
            raise


def nested(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Settings whose names may hold dots as nested dicts."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise ConfigError(f"{above}{key}: expected a setting's name")
        value = nested(value, f"{above}{key}.") if isinstance(value, dict) else value
        for part in reversed(key.split(".")):
            value = {part: value}
        found = merge(found, value)
    return found
