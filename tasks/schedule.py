"""How long a run will be, and the warm-up and schedule that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from hgrn2.config import check
from tasks.optim import OptimConfig, learning_rate

DEFAULT_WARMUP = 50  # optimiser steps, where nobody chose
SHORT_WARMUP = 0.1  # of the run, where those do not fit


@dataclass(frozen=True)
class Length:
    """Optimiser steps of a whole run, the setting that ends it, and one that would have ended it later."""

    steps: int
    ended_by: str
    before: str = ""


def limited(batches: int, limit: int | float) -> int:
    """How many of so many batches a limit of the Trainer's leaves: a number of them, or (a float) a fraction."""
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def run_length(
    max_steps: int, max_epochs: int, batches: int | None, limit: int | float, accumulate: Callable[[int], int]
) -> Length | None:
    """How long a run will be; None where neither steps nor epochs end it, or an epoch's length is not known.

    Args:
        max_steps: the Trainer's; -1 for no limit.
        max_epochs: the Trainer's; -1 for no limit.
        batches: training batches an epoch.
        limit: trainer.limit_train_batches.
        accumulate: batches an optimiser step, by epoch; an epoch's last step takes what is left.
    """
    limits = [Length(max_steps, f"trainer.max_steps={max_steps}")] if max_steps >= 0 else []
    if max_epochs >= 0 and batches is not None:
        used = limited(batches, limit)
        steps = sum(-(-used // accumulate(epoch)) for epoch in range(max_epochs))
        limits.append(Length(steps, f"trainer.max_epochs={max_epochs}"))
    limits.sort(key=lambda limit: limit.steps)
    if len(limits) == 2 and limits[0].steps < limits[1].steps:
        return replace(limits[0], before=limits[1].ended_by)
    return limits[0] if limits else None


def plan(
    config: OptimConfig, length: Length | None, then: dict[str, int | None] | None = None
) -> tuple[OptimConfig, list[str]]:
    """`config` with warm-up and total as whole steps, and what a person should know about them.

    A resumed run passes `then`, what its checkpoint ran with: `total_steps`, and `warmup_steps` unless that setting
    was changed. Raises ConfigError where a warm-up that somebody chose does not fit.
    """
    total = length.steps if config.total_steps is None and length else config.total_steps
    warmup, notes, cosine = config.warmup_steps, [], config.schedule == "cosine"
    if total is None and (cosine or isinstance(warmup, float)):
        what = f"schedule={config.schedule}" if cosine else f"warmup_steps={warmup}"
        check([f"{what} needs an end: set trainer.max_steps, trainer.max_epochs or total_steps=STEPS"], OptimConfig)
    ended_by = length.ended_by if config.total_steps is None and length else f"model.optim.total_steps={total}"
    kept = then is not None and "warmup_steps" in then
    if kept:
        warmup = then["warmup_steps"]
    elif isinstance(warmup, float):
        warmup = round(warmup * total)
    elif warmup is None:
        warmup = DEFAULT_WARMUP
        if total is not None and total <= warmup:
            warmup = int(SHORT_WARMUP * total)
            notes.append(f"warm-up shortened from {DEFAULT_WARMUP} to {warmup} steps: a tenth of the run ({ended_by})")
    if cosine and total <= warmup and total:
        checkpoint = " (the checkpoint's)" if kept else ""
        check([f"warmup_steps={warmup}{checkpoint} must be below the cosine's {total} steps ({ended_by})"], OptimConfig)
    if cosine and then is not None and then["total_steps"] != total:
        stays = f"; the warm-up stays {warmup} steps" if kept else ""
        notes.append(f"the cosine now ends at step {total} ({ended_by}), before at {then['total_steps']}{stays}")
    return replace(config, warmup_steps=warmup, total_steps=total), notes


def unfinished(planned: OptimConfig, length: Length | None) -> list[str]:
    """What was asked for and a run of this length does not reach."""
    if length is None or not length.steps:
        return []
    missed = [length.before] if length.before else []
    if planned.warmup_steps >= length.steps:
        missed.append(f"the warm-up's {planned.warmup_steps} steps")
    elif planned.schedule == "cosine" and planned.total_steps > length.steps:
        missed.append(f"model.optim.total_steps={planned.total_steps}")
    last = learning_rate(length.steps - 1, planned)
    text = f"{length.ended_by} ends the run at step {length.steps}, before {' and '.join(missed)}"
    return [f"{text}; its last learning rate is {last:.2g}"] if missed else []
