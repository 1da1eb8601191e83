"""Settings of the Trainer that Lightning accepts and then ignores, or that do something else than they say.

tests/test_trainer_options.py lists every option of the Trainer, and how it is known to work or to be refused.
"""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import LayerSync, Precision

from hgrn2.config import ConfigError, check
from tasks.cli.compose import listed
from tasks.internals import cluster_environment
from tasks.progress import total_steps

LIMIT_OF = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "max_steps": -1,
    "num_sanity_val_steps": -1,
    "gradient_clip_val": 0,
}


def check_trainer(command: str, settings: dict[str, Any], resumes: bool) -> None:
    """Refuses, before anything is made, what cannot mean what it says.

    Args:
        command: fit, validate, test or predict
        settings: the Trainer's, typed
        resumes: whether the command starts from a checkpoint
    """
    problems = [
        f"trainer.{key}={settings[key]} must be at least {least}"
        for key, least in LEAST.items()
        if settings[key] is not None and settings[key] < least
    ]
    limit = f"limit_{LIMIT_OF[command]}_batches"
    if settings[limit] == 0:
        problems.append(f"trainer.{limit}=0 leaves nothing to {'train on' if command == 'fit' else command}")
    if settings["barebones"]:
        problems.append(
            "trainer.barebones=true keeps neither checkpoints nor metrics of a run; without their cost: logger=none "
            "trainer.enable_checkpointing=false trainer.enable_progress_bar=false"
        )
    if settings["default_root_dir"] is not None:
        problems.append(f"trainer.default_root_dir={settings['default_root_dir']}: run_root says where runs are kept")
    if settings["model_registry"] is not None:
        problems.append(f"trainer.model_registry={settings['model_registry']}: only Lightning's cloud has one")
    problems += _callback_problems(settings) + _plugin_problems(settings) + _profiler_problems(settings["profiler"])
    if command == "fit":
        problems += _fit_problems(settings, resumes)
    check(problems)


def _callback_problems(settings: dict[str, Any]) -> list[str]:
    reasons = {
        LearningRateFinder: "the learning rate is model.optim.lr: a run's record must show it",
        BatchSizeFinder: "the batch is data.batch_size: a run's record must show it",
        StochasticWeightAveraging: "it replaces the schedule, and no resume repeats that; EMAWeightAveraging works",
    }
    return [
        f"trainer.callbacks={type(callback).__name__}: {reason}"
        for callback in listed(settings["callbacks"])
        for kind, reason in reasons.items()
        if isinstance(callback, kind)
    ]


def _plugin_problems(settings: dict[str, Any]) -> list[str]:
    reasons = {
        CheckpointIO: "checkpoints are files that only the trainer's own writer replaces atomically",
        LayerSync: "norms are synchronised by trainer.sync_batchnorm=true",
        Precision: f"excludes trainer.precision={settings['precision']}: set that alone, or to null",
    }
    return [
        f"trainer.plugins={type(plugin).__name__}: {reason}"
        for plugin in listed(settings["plugins"])
        for kind, reason in reasons.items()
        if isinstance(plugin, kind) and not (kind is Precision and settings["precision"] is None)
    ]


def _profiler_problems(profiler: Any) -> list[str]:
    """A report is written when all is over: too late to find out that it cannot be."""
    if getattr(profiler, "filename", None) is None or profiler.dirpath is None:
        return []
    folder = Path(profiler.dirpath).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return []
    return [f"trainer.profiler: dirpath={profiler.dirpath} cannot be written"]


def _fit_problems(settings: dict[str, Any], resumes: bool) -> list[str]:
    problems = [
        f"trainer.{key}={settings[key]} leaves nothing to train on"
        for key in ("max_steps", "max_epochs", "max_time")
        if _is_nothing(settings[key])
    ]
    if _is_nothing(settings["val_check_interval"]):
        interval = settings["val_check_interval"]
        problems.append(f"trainer.val_check_interval={interval} must be positive (limit_val_batches=0: no validation)")
    for what in ("steps", "epochs"):
        least, most = settings[f"min_{what}"], settings[f"max_{what}"]
        if least is not None and most is not None and 0 <= most < least:
            problems.append(f"trainer.min_{what}={least} exceeds trainer.max_{what}={most}")
    if settings["gradient_clip_algorithm"] and settings["gradient_clip_val"] is None:
        algorithm = settings["gradient_clip_algorithm"]
        problems.append(f"trainer.gradient_clip_algorithm={algorithm} clips nothing without trainer.gradient_clip_val")
    if settings["overfit_batches"] and settings["limit_train_batches"] is not None:
        both = (f"trainer.{key}={settings[key]}" for key in ("overfit_batches", "limit_train_batches"))
        problems.append(" and ".join(both) + " exclude each other")
    if settings["fast_dev_run"] and resumes:
        problems.append(f"trainer.fast_dev_run={settings['fast_dev_run']} starts at step 0 and cannot continue a run")
    if settings["precision"] == "16-true":
        problems.append("trainer.precision=16-true rounds AdamW's eps to 0; to train, use 16-mixed or bf16-true")
    return problems


def _is_nothing(value: Any) -> bool:
    """0, also as a time in any of Lightning's forms."""
    if isinstance(value, str):
        return re.fullmatch(r"[0:]+", value) is not None
    return (value is not None and value in (0, timedelta(0))) or (isinstance(value, dict) and not timedelta(**value))


def check_built(trainer: Trainer, settings: dict[str, Any]) -> None:
    """Refuses what Lightning replaces, and processes that the Trainer does not use: each would train its own run."""
    if str(settings["precision"]) in ("16", "16-mixed") and trainer.precision != "16-mixed":
        raise ConfigError(f"trainer.precision={settings['precision']} cannot run on the CPU: use {trainer.precision}")
    environment = cluster_environment(trainer)
    if trainer.num_nodes > 1 and not environment.creates_processes_externally:
        raise ConfigError(f"trainer.num_nodes={trainer.num_nodes}: start every node with torchrun or srun")
    if isinstance(environment, LightningEnvironment) or environment.world_size() == trainer.world_size:
        return
    name = type(environment).__name__.removesuffix("Environment").replace("TorchElastic", "torchrun")
    raise ConfigError(
        f"trainer.devices={trainer.num_devices} x trainer.num_nodes={trainer.num_nodes} does not match the "
        f"{environment.world_size()} processes that {name} starts"
    )


def _monitoring_validation(trainer: Trainer) -> list[Any]:
    found = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping | ModelCheckpoint)]
    return [callback for callback in found if (callback.monitor or "").startswith("val")]


def check_loop(trainer: Trainer) -> list[str]:
    """Once the data is there: refuses what an epoch is too short for. Returns what a person should know."""
    batches, notes = trainer.num_training_batches, []
    by_epoch = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    accumulate = max(by_epoch[0].scheduling.values()) if by_epoch else trainer.accumulate_grad_batches
    if accumulate > batches:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} exceeds the {batches} batches of an epoch, "
            "which ends with an optimiser step"
        )
    first, end, every = trainer.global_step + 1, total_steps(trainer), trainer.log_every_n_steps
    if every and end is not None and not trainer.fast_dev_run and end // every == (first - 1) // every:
        notes.append(f"trainer.log_every_n_steps={every}: none of the steps {first} to {end} is logged")
    last, left = _last_batch(trainer), batches % trainer.accumulate_grad_batches
    if left and last >= batches:
        every = f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}"
        notes.append(f"{every} does not divide the {batches} batches of an epoch: its last step takes {left}")
    if (trainer.min_epochs or 0) * batches > last:
        raise ConfigError(
            f"trainer.min_epochs={trainer.min_epochs} is more than trainer.max_steps={trainer.max_steps} reaches"
        )
    if not trainer.enable_validation:
        limit = f"trainer.limit_val_batches={trainer.limit_val_batches}"
        check(
            [
                f"{type(callback).__name__} monitors {callback.monitor}, but {limit} leaves no validation"
                for callback in _monitoring_validation(trainer)
            ]
        )
        notes.append("no validation (trainer.limit_val_batches=0): no best.ckpt, only last.ckpt")
    elif trainer.val_check_batch is not None and _first_validation(trainer) > last:
        notes.append(
            f"the run ends with batch {last}, before its first validation (trainer.val_check_interval="
            f"{trainer.val_check_interval}): no best.ckpt, only last.ckpt"
        )
    return notes


def _last_batch(trainer: Trainer) -> float:
    """The number of training batches in the whole run."""
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    limits = [float("inf")]
    if trainer.max_steps >= 0:
        epochs, steps = divmod(trainer.max_steps, -(-batches // accumulate))
        limits.append(epochs * batches + steps * accumulate)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * batches)
    return min(limits)


def _first_validation(trainer: Trainer) -> float:
    epochs = trainer.check_val_every_n_epoch
    return trainer.val_check_batch + (0 if epochs is None else (epochs - 1) * trainer.num_training_batches)
