"""What every task shares: the training step, metrics and logging, the optimiser, reproducible randomness."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from hgrn2 import HGRN2Config
from hgrn2.config import ConfigError, check
from hgrn2.ops import choose_impl
from tasks.layer_sync import keep_masked_norms
from tasks.optim import OptimConfig, build_optimizer, follow, may_fuse
from tasks.schedule import Length, plan, run_length, unfinished
from tasks.seeds import Stream, seed_globals, sequence

EVAL_STAGES = ("val", "test")
IGNORED = -1  # the target of a sample that no metric counts


def as_config(cls: type, value: Any) -> Any:
    """A config dataclass from itself or, out of a checkpoint, from its plain dict."""
    return cls(**value) if isinstance(value, dict) else value


def plain(value: Any, name: str) -> Any:
    """What checkpoints hold beside tensors, so that they load with `weights_only=True`.

    Dataclasses become dicts and paths text, all the way down; what else is not plain is refused, by its `name`.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, name)
    if isinstance(value, dict):
        return {key: plain(item, f"{name}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item, name) for item in value)
    if isinstance(value, Path):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ConfigError(
        f"{name}: a {type(value).__name__} cannot be kept in checkpoints; use numbers, text, and lists, dicts or "
        "dataclasses of them"
    )


def left_to_data(arguments: dict[str, Any], info: dict[str, int]) -> dict[str, int]:
    """The arguments of a model that are null and that the data knows, with what the data says."""
    return {key: value for key, value in info.items() if key in arguments and arguments[key] is None}


def misfits(arguments: dict[str, Any], info: dict[str, int], source: str) -> list[str]:
    """Arguments of a model that contradict the data; a vocabulary may be larger than the data's."""
    return [
        f"model.{key}={arguments[key]} does not fit {source}, which needs {key}={need}"
        for key, need in info.items()
        if arguments.get(key) is not None
        and arguments[key] != need
        and not (key == "vocab_size" and arguments[key] > need)
    ]


def known(**arguments: Any) -> None:
    """Refuse arguments that neither a person nor the data has given a value."""
    check(
        [
            f"model.{key} is null and the data does not say it: give a value (in Python: **data.info)"
            for key, value in arguments.items()
            if value is None
        ]
    )


class MeanLoss(Metric):
    """A loss summed over targets, divided by their number, over all batches and ranks.

    torchmetrics' MeanMetric leaves NaN batches out (a broken model would look good), or, told not to look for them,
    the weights (1.9).
    """

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, *args: Any, **kwargs: Any) -> "MeanLoss":
        """The sum stays fp64 where the model becomes bf16 (trainer.precision=bf16-true): it would soon stop growing."""
        super()._apply(*args, **kwargs)
        self.total, self._defaults["total"] = self.total.double(), self._defaults["total"].double()
        return self

    def update(self, total: Tensor, count: Tensor) -> None:
        self.total += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count


class Task(LightningModule):
    """Base of the tasks. A subclass sets `self.model` and writes `compute`; its arguments are settings, `model.NAME`.

    The arguments, a subclass's too, are kept in checkpoints for `load_from_checkpoint`, and have to be plain values or
    dataclasses of them. Those that the data knows (`num_classes`, `vocab_size`, ...) are None by default, and filled
    from its `info` before the model is made.

    Args:
        backbone: the HGRN2 backbone.
        optim: optimiser and schedule.
        seed: of dropout and other randomness in training.
    """

    progress_metric = "acc"  # shown in the progress bar next to the loss

    def __init__(self, backbone: HGRN2Config, optim: OptimConfig, seed: int):
        super().__init__()
        check([f"model.seed={seed} must not be negative"] * (seed < 0))
        self.save_hyperparameters(logger=False)  # of the subclass that is being made
        self.hparams.update(plain(dict(self.hparams), "model"))
        self.backbone_config, self.optim_config = as_config(HGRN2Config, backbone), as_config(OptimConfig, optim)
        self.seed = seed
        self.planned: OptimConfig | None = None  # with the schedule in whole steps, once training begins
        self._ran_with: dict[str, int | None] | None = None  # the checkpoint's
        self.model: nn.Module
        self.losses = nn.ModuleDict({stage: MeanLoss() for stage in EVAL_STAGES})
        self.metrics = nn.ModuleDict({stage: MetricCollection(self.make_metrics()) for stage in EVAL_STAGES})

    # -- what a task says about itself -------------------------------------------------------------------------------

    def make_metrics(self) -> dict:
        """torchmetrics for evaluation by name, without prefix."""
        return {}

    def compute(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One batch through the model.

        Returns:
            `loss`: the scalar to train on; `sum` and `count`: the summed loss over the batch's valid targets and
            their number, for evaluation; `preds` and `target`: for the metrics (optional), `IGNORED` where not valid.
        """
        raise NotImplementedError

    def count(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """(samples, tokens) in a batch, for throughput; tokens without padding where that is known on the host."""
        samples = len(batch["valid"])
        return samples, batch["tokens"].numel() if "tokens" in batch else samples

    def show_samples(self, writer: Any, batch: dict[str, Tensor], step: int) -> None:
        """What the model makes of a few held-out samples, for TensorBoard; nothing by default."""

    def derived_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Further scalars that follow from the mean evaluation loss."""
        return {}

    # -- before anything runs ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse a model that does not fit the data or the device, in words, before the first step does."""
        data = self.trainer.datamodule
        problems = misfits(self.hparams, getattr(data, "info", {}), f"data.dataset={getattr(data, 'dataset', None)}")
        device, config = self.trainer.strategy.root_device, self.backbone_config
        if config.impl == "triton":
            name, reason = choose_impl(device, config.expand_ratio)
            if name != "triton":
                problems.append(
                    f"model.backbone.impl=triton cannot run with trainer.accelerator={device.type}: {reason}"
                )
        if device.type == "mps":
            problems.append(f"trainer.accelerator={device.type}: hgrn2_scan does not run on it yet; use cpu")
        check(problems)
        keep_masked_norms(self.trainer)
        if stage == "fit" and hasattr(data, "example"):
            self.example_input_array = self.trainer.precision_plugin.convert_input(data.example())  # as a step's batch

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """`compute` for Lightning's model summary, whose FLOP counter goes with no compiled module."""
        with torch.compiler.set_stance("force_eager"):
            return self.compute(batch)

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        processed = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        # dropout is a function of where training stands, so that a resumed step repeats its loss exactly
        seed_globals(sequence(self.seed, Stream.STEP, processed, self.global_rank), devices=True)

    @property
    def logs_step(self) -> bool:
        """Whether this optimiser step's values are logged (trainer.log_every_n_steps)."""
        every = self.trainer.log_every_n_steps
        return bool(every) and (self.global_step + 1) % every == 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.compute(batch)
        # Lightning would take these at every step, and wait at each for those of a progress bar (prog_bar).
        if self.logs_step:
            self.log("train/loss", out["loss"])
            for name, value in self.train_scalars(out).items():
                self.log(f"train/{name}", value)
        return out["loss"]

    def train_scalars(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars of a training batch beside the loss."""
        if "preds" not in out:
            return {}
        return {"acc": (out["preds"] == out["target"]).float().mean()}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning, which refuses a fused optimiser in bf16-mixed (where nothing is scaled, so nothing is wrong),
        and the norm of all gradients is computed once for clipping and logging. Nothing waits for the device."""
        if isinstance(self.trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            # Gradients are shards in disguise: their norm is one rank's. Lightning refuses, or leaves it to DeepSpeed.
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        logs = self.logs_step
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        parameters = [p for p in self.parameters() if p.grad is not None]
        if by_norm or logs:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            if hasattr(norm, "full_tensor"):  # of DTensors: the norm over all shards
                norm = norm.full_tensor()
            if logs:
                self.log("train/grad_norm", norm)
                self.log("train/lr", optimizer.param_groups[0]["lr"])  # all groups have the same
            if by_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        if gradient_clip_val and not by_norm:
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)

    def run_length(self) -> Length | None:
        """Optimiser steps of the whole run. Lightning's own estimate builds the loaders before they are restored."""
        trainer = self.trainer
        if trainer.fast_dev_run:  # replaces the limits that the schedule was made for, which only has to fit
            return Length(sys.maxsize, "trainer.fast_dev_run")
        batches = getattr(trainer.datamodule, "train_batches", lambda: None)()
        by_epoch = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
        accumulate = by_epoch[0].get_accumulate_grad_batches if by_epoch else lambda _: trainer.accumulate_grad_batches
        return run_length(trainer.max_steps, trainer.max_epochs, batches, trainer.limit_train_batches, accumulate)

    def configure_optimizers(self) -> dict:
        self.planned, _ = plan(self.optim_config, self.run_length(), self._ran_with)
        return build_optimizer(self, self.planned, self._fused())

    def _fused(self) -> bool:
        return may_fuse(self.device.type, self.trainer.precision)

    def on_train_start(self) -> None:
        """By now optimiser and schedule are restored. They follow this run's settings, and what surprises is said."""
        if self.planned is None:  # a subclass's own optimiser
            return
        length = self.run_length()
        self.planned, notes = plan(self.optim_config, length, self._ran_with)
        follow(self.lr_schedulers(), self, self.planned)
        for note in notes + unfinished(self.planned, length):
            rank_zero_info(note)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> dict[str, Tensor]:
        out = self.compute(batch)
        self.losses[stage].update(out["sum"], out["count"])
        if len(self.metrics[stage]) and "preds" in out:
            self.metrics[stage].update(out["preds"], out["target"])
        return out

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def evaluation_names(self, stage: str) -> list[str]:
        """What an evaluation logs: `val/loss` and so on."""
        names = ["loss", *self.metrics[stage].keys(), *self.derived_metrics(torch.zeros(()))]
        return sorted(f"{stage}/{name}" for name in names)

    def _finish(self, stage: str) -> None:
        loss = self.losses[stage].compute()
        values = {"loss": loss, **self.metrics[stage].compute(), **self.derived_metrics(loss)}
        for name, value in values.items():
            # each value is already the one of all ranks
            self.log(f"{stage}/{name}", value.float(), prog_bar=name in ("loss", self.progress_metric), sync_dist=True)
        self.losses[stage].reset()
        self.metrics[stage].reset()

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.planned is not None:
            checkpoint["schedule"] = {key: getattr(self.planned, key) for key in ("warmup_steps", "total_steps")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None:
            for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
                group["fused"] = self._fused()  # before the state is loaded: it decides where the step counts live
        self._ran_with = checkpoint.get("schedule")
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).get("optim", {})
        if self._ran_with and saved.get("warmup_steps") != self.optim_config.warmup_steps:
            self._ran_with = {"total_steps": self._ran_with["total_steps"]}  # another warm-up was asked for


class ClassificationTask(Task):
    """A task with one label a sample; subclasses write `logits`.

    Args:
        num_classes: number of labels; null for what the data says.
        label_smoothing: in training; evaluation reports the plain cross-entropy.
    """

    def __init__(
        self,
        backbone: HGRN2Config,
        optim: OptimConfig,
        seed: int,
        num_classes: int | None,
        label_smoothing: float,
    ):
        known(num_classes=num_classes)
        check(
            [f"model.num_classes={num_classes} must be at least 2"] * (num_classes < 2)
            + [f"model.label_smoothing={label_smoothing} must be in [0, 1)"] * (not 0 <= label_smoothing < 1)
        )
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        super().__init__(backbone, optim, seed)

    def make_metrics(self) -> dict:
        return {"acc": MulticlassAccuracy(self.num_classes, average="micro", ignore_index=IGNORED, validate_args=False)}

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """`[B, num_classes]` of a batch."""
        raise NotImplementedError

    def compute(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, target = self.logits(batch).float(), batch["label"]
        if self.training:
            loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
            return {"loss": loss, "preds": logits.argmax(-1), "target": target}
        valid = batch["valid"]
        losses = F.cross_entropy(logits, target, reduction="none").masked_fill(~valid, 0)
        return {
            "sum": losses.sum(),
            "count": valid.sum(),
            "preds": logits.argmax(-1),
            "target": target.masked_fill(~valid, IGNORED),
        }

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities and labels of the batch's valid samples."""
        probs, valid = self.logits(batch).float().softmax(-1), batch["valid"]
        return {"probs": probs[valid], "preds": probs.argmax(-1)[valid], "label": batch["label"][valid]}
