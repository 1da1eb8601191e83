"""What a continued run may change. A setting that a saved value depends on is refused; every other is honoured.

Saved values are counters, the order of samples (tasks/data.py checks that itself), the best score, the optimiser's
state, the schedule (tasks/schedule.py) and the callbacks' states. A checkpoint also keeps its run's configuration.
"""

import inspect
from fnmatch import fnmatch
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from hgrn2.config import ConfigError
from tasks.cli.compose import at, flatten, listed

# Where and for how long a run runs, and what it shows: the experiment stays the same.
FREE = (
    *("run_root", "logger", "compile", "checkpoint.every_n_steps", "data.path"),
    *("data.num_workers", "data.eval_batch_size"),
    *("model.prompt", "model.sample_tokens", "model.temperature", "model.backbone.impl"),
    *("progress.*", "startup.*", "throughput.*", "garbage.*", "memory_horizon.*", "samples.*"),
    *("trainer.accelerator", "trainer.strategy*", "trainer.devices", "trainer.num_nodes", "trainer.plugins*"),
    *("trainer.max_*", "trainer.min_*", "trainer.log_every_n_steps", "trainer.num_sanity_val_steps"),
    *("trainer.enable_*", "trainer.callbacks*", "trainer.logger*", "trainer.profiler*", "trainer.model_registry"),
    *("trainer.limit_test_batches", "trainer.limit_predict_batches", "trainer.default_root_dir"),
    *("trainer.deterministic", "trainer.benchmark", "trainer.inference_mode", "trainer.detect_anomaly"),
    *("trainer.barebones", "trainer.fast_dev_run", "trainer.use_distributed_sampler"),
)
# Honoured from the resume on, and said: a learning rate that is too high has to be lowered somehow.
HONOURED = (
    *("seed", "model.seed", "model.optim.*", "model.backbone.dropout", "model.backbone.drop_path"),
    *("model.label_smoothing", "checkpoint.monitor", "checkpoint.mode", "data.*"),
    *("trainer.precision", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
    *("trainer.val_check_interval", "trainer.check_val_every_n_epoch", "trainer.sync_batchnorm"),
    "trainer.reload_dataloaders_every_n_epochs",
)
REFUSED = {
    "model.optim.decay_*": "the optimiser's state is kept in the order of its groups, which this changes",
    "model.*": "it makes another model",
    "trainer.accumulate_grad_batches": "the run stands between two accumulations of the old length",
    "trainer.limit_train_batches": "the epochs so far had another length",
    "trainer.overfit_batches": "the batches so far were others",
    "trainer.limit_val_batches": "the best score so far is of other validation batches",
}


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in `then`, value in `now`), where both have one."""
    nothing = object()
    keys = dict.fromkeys([*flatten(then), *flatten(now)])
    both = {key: (at(then, key, nothing), at(now, key, nothing)) for key in keys}
    return {key: pair for key, pair in both.items() if nothing not in pair and pair[0] != pair[1]}


def other_experiment(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What makes `now` another experiment than `then`, in words; empty where nothing does."""
    pairs = differences(then, now).items()
    found = [f"{key}={a} there and {b} here" for key, (a, b) in pairs if not _among(key, FREE)]
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def check_changes(then: dict[str, Any], now: dict[str, Any], source: Any) -> str:
    """Refuses what a checkpoint's saved values do not allow; returns what has changed otherwise, in words."""
    refused, said = [], []
    for key, (a, b) in differences(then, now).items():
        if _among(key, FREE):
            continue
        reason = next((why for pattern, why in REFUSED.items() if fnmatch(key, pattern)), "it cannot be changed")
        if _among(key, HONOURED) and not fnmatch(key, "model.optim.decay_*"):
            said.append(f"{key}={b} (was {a})")
        else:
            refused.append(f"{key}={b} (there: {a}): {reason}")
    if _accumulates_by_epoch(then) != _accumulates_by_epoch(now):
        refused.append(f"another GradientAccumulationScheduler: {REFUSED['trainer.accumulate_grad_batches']}")
    if refused:
        raise ConfigError(f"{source} cannot be continued with {'; '.join(refused)}. Put it back, or start a new run")
    return f"from here on: {', '.join(said)}" if said else ""


def _accumulates_by_epoch(config: dict[str, Any]) -> list[Any]:
    entries = [entry for entry in listed(at(config, "trainer.callbacks")) if isinstance(entry, dict)]
    return [entry for entry in entries if str(entry.get("class_path")).endswith("GradientAccumulationScheduler")]


def _among(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


class Resumed(Callback):
    """For a resumed run: its callbacks have the settings of this command line and not the saved ones (EarlyStopping
    keeps its patience in its state), and what EarlyStopping has ended stays ended.

    Args:
        config: this run's configuration
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self._settings: list[tuple[Callback, dict[str, Any]]] = []
        self._same = False  # the callbacks' settings are the checkpoint's

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Comes before any callback loads its state."""
        then, now = (at(config, "trainer.callbacks") for config in (checkpoint.get("config", {}), self.config))
        self._same = then == now
        for callback in trainer.callbacks:
            names = inspect.signature(type(callback)).parameters
            self._settings.append((callback, {name: value for name, value in vars(callback).items() if name in names}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback, settings in self._settings:
            vars(callback).update(settings)
            if isinstance(callback, EarlyStopping) and self._has_ended(callback):
                trainer.should_stop = True
                why = callback.stopping_reason_message or f"{callback.monitor} stopped improving"
                rank_zero_info(f"EarlyStopping has ended this run ({why.rstrip('. ')}): change its settings to go on")
        self._settings = []

    def _has_ended(self, callback: EarlyStopping) -> bool:
        if callback.stopping_reason in (EarlyStoppingReason.NOT_STOPPED, EarlyStoppingReason.PATIENCE_EXHAUSTED):
            return callback.wait_count >= callback.patience
        return self._same
