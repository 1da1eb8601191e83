"""Parameter groups and learning-rate schedules: pure functions of the module, the config and the step."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from hgrn2.config import check, unknown_choices

Schedule = Literal["cosine", "inverse_sqrt", "constant"]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class OptimConfig:
    """AdamW with warm-up and a schedule; steps are optimiser steps.

    Args:
        lr: peak learning rate.
        betas: AdamW's two decay rates.
        eps: AdamW's epsilon.
        weight_decay: applied to matrices (Linear and convolution weights) alone, and to what the next three add.
        decay_embeddings: apply weight decay to embeddings too.
        decay_lower_bounds: apply weight decay to the lower-bound logits too.
        decay_norms_and_biases: apply weight decay to norms and biases too.
        schedule: cosine (to min_lr at total_steps), inverse_sqrt (of the step after warm-up) or constant.
        warmup_steps: linear warm-up from warmup_lr to lr; below 1 a fraction of total_steps; null for 50, or a tenth of
            total_steps where 50 do not fit.
        warmup_lr: learning rate of the first step of the warm-up.
        min_lr: the cosine's end.
        total_steps: length of the cosine, warm-up included; null for the run's own length, from trainer.max_steps or
            trainer.max_epochs.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_embeddings: bool = False
    decay_lower_bounds: bool = False
    decay_norms_and_biases: bool = False
    schedule: Schedule = "cosine"
    warmup_steps: int | float | None = 0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        self.betas = tuple(self.betas)
        problems = [
            f"{key}={getattr(self, key)} must not be negative"
            for key in ("lr", "weight_decay", "warmup_steps", "warmup_lr", "min_lr")
            if (getattr(self, key) or 0) < 0
        ]
        warmup, total = self.warmup_steps, self.total_steps
        if isinstance(warmup, float) and warmup.is_integer():
            self.warmup_steps = warmup = int(warmup)  # 0.0, 1e3
        if isinstance(warmup, float) and not warmup < 1:
            problems.append(
                f"warmup_steps={warmup} must be a whole number of steps, or below 1 (a fraction of the run)"
            )
        if self.eps <= 0:
            problems.append(f"eps={self.eps} must be positive")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            problems.append(f"betas={self.betas} must be two numbers in [0, 1)")
        problems += unknown_choices(self)
        if total is not None and total < 1:
            problems.append(f"total_steps={total} must be at least 1, or null for the run's own length")
        elif self.schedule == "cosine" and warmup is not None and total is not None and total <= warmup:
            problems.append(f"total_steps={total} must exceed warmup_steps={warmup} (schedule=cosine)")
        check(problems, type(self))


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of optimiser step `step` (from 0); `config` in whole steps, see tasks/schedule.py."""
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(max(config.warmup_steps, 1) / max(step, 1))
    progress = min((step - config.warmup_steps) / (config.total_steps - config.warmup_steps), 1.0)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def follow(scheduler: torch.optim.lr_scheduler.LambdaLR, module: nn.Module, config: OptimConfig) -> None:
    """Make a restored optimiser and schedule follow `config` from the next step on: a checkpoint brings its own."""
    fresh = parameter_groups(module, config)
    scheduler.lr_lambdas = [partial(_factor, config=config)] * len(fresh)
    scheduler.base_lrs = [config.lr] * len(fresh)
    rate = config.lr * _factor(scheduler.last_epoch, config)
    for group, new in zip(scheduler.optimizer.param_groups, fresh, strict=True):
        group.update(
            initial_lr=config.lr, lr=rate, betas=config.betas, eps=config.eps, weight_decay=new["weight_decay"]
        )


def _factor(step: int, config: OptimConfig) -> float:
    return learning_rate(step, config) / config.lr if config.lr else 0.0


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict]:
    """Two groups, with and without weight decay, that hold every trainable parameter exactly once.

    Decayed are weights of two dimensions or more, by torch's name for them, and what the config's switches name, but
    nothing else that a module may have (scales, position codes).
    """
    decayed, plain, seen = [], [], set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if name == "lower_bounds":
                decay = config.decay_lower_bounds
            elif isinstance(owner, nn.Embedding):
                decay = config.decay_embeddings
            elif isinstance(owner, NORMS) or name.endswith("bias"):
                decay = config.decay_norms_and_biases
            else:
                decay = parameter.ndim >= 2 and name.endswith("weight")
            (decayed if decay else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    grouped = [p for group in groups for p in group["params"]]
    trainable = [p for p in module.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped)) == len(trainable), "every parameter belongs to exactly one group"
    return [group for group in groups if group["params"]]


def may_fuse(device: str, precision: str) -> bool:
    """Whether AdamW runs as one fused kernel: on CUDA, but not in fp16, where a fused optimiser would unscale gradients
    itself, after they are clipped and their norm is logged."""
    return device == "cuda" and precision != "16-mixed"


def build_optimizer(module: nn.Module, config: OptimConfig, fused: bool) -> dict:
    """AdamW and its schedule, as `configure_optimizers` returns them."""
    groups = parameter_groups(module, config)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, config=config))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
