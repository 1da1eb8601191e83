"""A schedule as long as the run: from steps or epochs, warm-up in steps, as a fraction or left to us, and resumed."""

import logging

import pytest
import torch
from launch import launch
from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from hgrn2 import ConfigError, HGRN2Config
from tasks.optim import OptimConfig, learning_rate
from tasks.schedule import Length, plan, run_length, unfinished
from tasks.vision.data import VisionData
from tasks.vision.module import VisionTask

LR = 0.5
DIGITS = {"num_classes": 10, "img_size": 8, "in_chans": 1}
SMALL = HGRN2Config(dim=16, depth=1, expand_ratio=4, scan="bidirectional", lower_bound=None, glu_width=16)


def length(max_steps=-1, max_epochs=-1, batches=20, limit=1.0, accumulate=1):
    return run_length(max_steps, max_epochs, batches, limit, lambda epoch: accumulate)


@pytest.mark.parametrize(
    ("limits", "steps", "ended_by"),
    [
        ({"max_steps": 30}, 30, "trainer.max_steps=30"),
        ({"max_epochs": 2}, 40, "trainer.max_epochs=2"),
        ({"max_epochs": 2, "max_steps": 30}, 30, "trainer.max_steps=30"),
        ({"max_epochs": 2, "max_steps": 50}, 40, "trainer.max_epochs=2"),
        ({"max_epochs": 2, "accumulate": 3}, 14, "trainer.max_epochs=2"),  # an epoch's last step takes what is left
        ({"max_epochs": 2, "accumulate": 100}, 2, "trainer.max_epochs=2"),
        ({"max_epochs": 3, "limit": 0.25}, 15, "trainer.max_epochs=3"),
        ({"max_epochs": 3, "limit": 7}, 21, "trainer.max_epochs=3"),
        ({"max_epochs": 3, "limit": 700}, 60, "trainer.max_epochs=3"),
        ({"max_epochs": 3, "batches": None, "max_steps": 9}, 9, "trainer.max_steps=9"),
    ],
    ids=str,
)
def test_the_length_follows_from_what_ends_the_run(limits, steps, ended_by):
    found = length(**limits)
    assert (found.steps, found.ended_by) == (steps, ended_by)


def test_a_run_without_an_end_has_no_length():
    assert length() is None
    assert length(max_epochs=3, batches=None) is None


@pytest.mark.parametrize(
    ("optim", "steps", "warmup", "total", "said"),
    [
        ({"warmup_steps": None}, 400, 50, 400, []),
        ({"warmup_steps": None}, 51, 50, 51, []),  # it fits
        ({"warmup_steps": None}, 50, 5, 50, ["warm-up shortened from 50 to 5 steps: a tenth of the run (x)"]),
        ({"warmup_steps": None}, 3, 0, 3, ["warm-up shortened from 50 to 0 steps: a tenth of the run (x)"]),
        ({"warmup_steps": 0.1}, 400, 40, 400, []),
        ({"warmup_steps": 0.1, "total_steps": 1000}, 400, 100, 1000, []),
        ({"warmup_steps": 20}, 400, 20, 400, []),
        ({"warmup_steps": 20.0}, 400, 20, 400, []),
        ({"warmup_steps": 2e1, "total_steps": 30}, 400, 20, 30, []),
        ({"warmup_steps": 500, "schedule": "constant"}, 400, 500, 400, []),
    ],
    ids=str,
)
def test_warm_up_and_total_become_steps(optim, steps, warmup, total, said):
    planned, notes = plan(OptimConfig(**optim), Length(steps, "x"))
    assert (planned.warmup_steps, planned.total_steps, notes) == (warmup, total, said)
    assert isinstance(planned.warmup_steps, int)


def test_what_somebody_chose_and_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"^warmup_steps=50 must be below the cosine's 30 steps \(trainer.max_steps"):
        plan(OptimConfig(warmup_steps=50), length(max_steps=30))
    with pytest.raises(ConfigError, match="total_steps=40 must exceed warmup_steps=50"):
        OptimConfig(warmup_steps=50, total_steps=40)
    with pytest.raises(ConfigError, match=r"warmup_steps=1\.5 must be a whole number of steps, or below 1"):
        OptimConfig(warmup_steps=1.5)
    with pytest.raises(ConfigError, match="warmup_steps=nan"):
        OptimConfig(warmup_steps=float("nan"))
    with pytest.raises(ConfigError, match="total_steps=0 must be at least 1"):
        OptimConfig(total_steps=0)


def test_a_run_without_an_end_needs_a_total():
    for optim in (OptimConfig(), OptimConfig(schedule="constant", warmup_steps=0.1)):
        with pytest.raises(
            ConfigError, match=r"needs an end: set trainer.max_steps, trainer.max_epochs or total_steps"
        ):
            plan(optim, None)
    planned, _ = plan(OptimConfig(schedule="inverse_sqrt", warmup_steps=None), None)
    assert (planned.warmup_steps, planned.total_steps) == (50, None)
    assert plan(OptimConfig(total_steps=90), None)[0].total_steps == 90


def test_a_schedule_that_the_run_cannot_finish_is_said():
    typed = OptimConfig(total_steps=1000, lr=LR)
    (note,) = unfinished(typed, length(max_steps=30))
    assert note.startswith("trainer.max_steps=30 ends the run at step 30, before model.optim.total_steps=1000")
    assert note.endswith(f"its last learning rate is {learning_rate(29, typed):.2g}")
    (note,) = unfinished(OptimConfig(schedule="constant", warmup_steps=80), length(max_epochs=2))
    assert "before the warm-up's 80 steps" in note
    (note,) = unfinished(OptimConfig(total_steps=30), length(max_steps=30, max_epochs=2))
    assert note.startswith("trainer.max_steps=30 ends the run at step 30, before trainer.max_epochs=2")
    assert unfinished(OptimConfig(total_steps=30, warmup_steps=3), length(max_steps=30)) == []
    assert unfinished(OptimConfig(total_steps=20), length(max_steps=30)) == []


def fit(folder, optim, ckpt_path=None, callbacks=(), **limits):
    """Trains on the digits; returns (the rate of each step, the task, the checkpoint's path)."""
    task, data = VisionTask(SMALL, optim, **DIGITS), VisionData(batch_size=100)  # 12 batches
    rates = []
    task.on_train_batch_end = lambda *_: rates.append(task.trainer.optimizers[0].param_groups[0]["lr"])
    defaults = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    trainer = Trainer(**(defaults | quiet | limits), callbacks=list(callbacks))
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    path = folder / f"{trainer.global_step}.ckpt"
    trainer.save_checkpoint(path)
    return rates, task, path


def test_a_run_by_epochs_finishes_its_cosine(tmp_path):
    rates, task, _ = fit(tmp_path, OptimConfig(lr=LR, warmup_steps=0.1), max_epochs=2, accumulate_grad_batches=5)
    assert (task.planned.warmup_steps, task.planned.total_steps) == (1, 6)
    assert len(rates) == 24
    assert rates[-1] < 1e-9  # the rate of a seventh step
    _, task, _ = fit(tmp_path, OptimConfig(), max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 2, 1: 6})])
    assert task.planned.total_steps == task.trainer.global_step == 6 + 2
    _, task, _ = fit(tmp_path, OptimConfig(), max_epochs=2, limit_train_batches=0.5)
    assert task.planned.total_steps == task.trainer.global_step == 12


def test_fast_dev_run_fits_every_schedule(tmp_path):
    fit(tmp_path, OptimConfig(warmup_steps=5000), fast_dev_run=True)


def test_an_extended_run_keeps_its_warm_up_and_says_the_new_end(tmp_path, caplog):
    optim = OptimConfig(lr=LR, warmup_steps=None)
    _, task, saved = fit(tmp_path, optim, max_steps=10)
    assert (task.planned.warmup_steps, task.planned.total_steps) == (1, 10)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        rates, task, _ = fit(tmp_path, optim, saved, max_steps=20)
    assert (
        "the cosine now ends at step 20 (trainer.max_steps=20), before at 10; the warm-up stays 1 steps" in caplog.text
    )
    assert "shortened" not in caplog.text
    expected = OptimConfig(lr=LR, warmup_steps=1, total_steps=20)
    # from its first step on, not from its second: the checkpoint's rate is the end of the shorter cosine
    assert rates == pytest.approx([learning_rate(step + 1, expected) for step in range(10, 20)])


def test_the_first_resumed_step_follows_the_new_schedule(tmp_path):
    seen = []
    optim = OptimConfig(lr=LR)
    _, _, saved = fit(tmp_path, optim, max_steps=10)
    task = VisionTask(SMALL, optim, **DIGITS)
    task.on_train_batch_start = lambda *_: seen.append(task.trainer.optimizers[0].param_groups[0]["lr"])
    Trainer(
        max_steps=11, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    ).fit(task, VisionData(batch_size=100), ckpt_path=saved, weights_only=True)  # fmt: skip
    assert seen == pytest.approx([learning_rate(10, OptimConfig(lr=LR, total_steps=11))])
    assert seen[0] > 0


def test_a_changed_warm_up_is_taken(tmp_path, caplog):
    _, _, saved = fit(tmp_path, OptimConfig(warmup_steps=0.2), max_steps=10)
    _, task, _ = fit(tmp_path, OptimConfig(warmup_steps=0.2), saved, max_steps=30)
    assert task.planned.warmup_steps == 2
    caplog.clear()
    with caplog.at_level(logging.INFO):
        _, task, _ = fit(tmp_path, OptimConfig(warmup_steps=0.5), saved, max_steps=30)
    assert task.planned.warmup_steps == 15
    assert "the warm-up stays" not in caplog.text
    with pytest.raises(ConfigError, match=r"warmup_steps=2 \(the checkpoint's\) must be below the cosine's 2 steps"):
        fit(tmp_path, OptimConfig(warmup_steps=0.2), saved, max_steps=2)


@pytest.mark.parametrize("task", ["vision", "lm", "lra"])
def test_thirty_steps_of_a_demo(task, tmp_path):
    """The first thing that everyone types."""
    small = ["model.backbone.dim=16", "model.backbone.expand_ratio=4", "model.backbone.glu_width=16", "logger=csv"]
    small += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"]
    small += {"lm": ["data.seq_len=32"], "vision": [], "lra": ["data.train_size=640", "data.eval_size=50"]}[task]
    status, out = launch(tmp_path, f"task={task}", "trainer.max_steps=30", *small)
    assert status == 0, out
    assert out.count("warm-up shortened from 50 to 3 steps: a tenth of the run (trainer.max_steps=30)") == 1
    (checkpoint,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["schedule"] == {"warmup_steps": 3, "total_steps": 30}
    if task == "vision":
        status, out = launch(tmp_path, "task=vision", "trainer.max_steps=30", "model.optim.warmup_steps=50", *small)
        assert status == 2
        assert "warmup_steps=50 must be below the cosine's 30 steps (trainer.max_steps=30)" in out
