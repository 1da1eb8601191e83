"""What a fit says at its end, what an evaluation leaves in the run folder, and a run that has nothing left to do."""

import importlib.metadata
import importlib.util
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from hgrn2.config import ConfigError
from tasks.callbacks import ThroughputLogger
from tasks.cli.arguments import Request
from tasks.cli.checkpoints import Checkpoints
from tasks.cli.loggers import RunTensorBoard
from tasks.cli.runs import run_around, write_atomically
from tasks.cli.text import command
from tasks.progress import duration, of, rate, total_steps

PACKAGES = ("torch", "lightning", "triton", "torchmetrics")


def already_done(checkpoint: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Why a fit from this checkpoint would not train a step, if so. ``settings`` are the Trainer's."""
    if "loops" not in checkpoint or settings["fast_dev_run"]:
        return None
    loop = checkpoint["loops"]["fit_loop"]
    validation = loop["epoch_loop.val_loop.batch_progress"]["current"]
    if validation["started"] > validation["completed"]:
        return None  # the last one is still to come (see settle)
    steps, limit = checkpoint["global_step"], settings["max_steps"]
    if 0 <= limit <= steps:
        return f"already at {steps} of {limit}: raise trainer.max_steps"
    epochs, limit = loop["epoch_progress"]["current"]["processed"], settings["max_epochs"]
    if limit is not None and 0 <= limit <= epochs:
        return f"already at epoch {epochs} of {limit}: raise trainer.max_epochs"
    return None


def fit_summary(trainer: Trainer) -> list[str]:
    """How far, seconds, throughput and peak memory; the best metric and its step."""
    throughput = next((c for c in trainer.callbacks if isinstance(c, ThroughputLogger)), None)
    if throughput is None or throughput.began is None:
        return []  # ended before the first step
    step, total = trainer.global_step, total_steps(trainer)
    seconds = time.perf_counter() - throughput.began
    parts = [f"{seconds:.1f} s" if seconds < 60 else f"{seconds:.0f} s ({duration(seconds)})"]
    if throughput.run.seconds:
        parts.append(rate(throughput.run.rate("tokens", trainer.world_size), "tokens"))
    parts.append(f"peak memory {peak_memory(trainer.strategy.root_device)}")
    lines = [f"{'finished' if step == total else 'stopped'} at {of('step', step, total)}: {', '.join(parts)}"]
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)
    if best is not None and best.best_score is not None:
        when = "" if best.best_step is None else f" at step {best.best_step}"  # unknown to older checkpoints
        lines.append(f"best {best.monitor}: {best.best_score:#.4g}{when}")
    return lines


def peak_memory(device: torch.device) -> str:
    """Of tensors on a CUDA device, else of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB (GPU)"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB (process)"


def save_results(trainer: Trainer, request: Request, task: str, checkpoint: Path, step: int) -> Path:
    """Writes ``test.json`` or ``validate.json`` into the run folder, and a test's metrics for TensorBoard."""
    folder = checkpoint.parent.parent if run_around(checkpoint) else checkpoint.parent
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    results = {
        "task": task,
        "command": command(*request.words),
        "checkpoint": str(checkpoint.relative_to(folder)),
        "step": step,
        "metrics": metrics,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)},
    }
    path = folder / f"{request.command}.json"
    try:
        write_atomically(path, lambda file: file.write((json.dumps(results, indent=2) + "\n").encode()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    if request.command == "test" and any(folder.glob("events.out.tfevents.*")):
        # A folder of its own: TensorBoard follows one file a folder, and this run may still be training.
        logger = RunTensorBoard(folder / "test")
        logger.open()
        logger.log_metrics(metrics, step)
        logger.finalize("success")
    return path
