"""What a continued run starts from, and what it may change: each saved value against the settings it depends on."""

import hashlib
import inspect
import re
import shutil
import signal
from fnmatch import fnmatch

import pytest
import torch
import yaml
from launch import launch
from lightning.pytorch import Callback, Trainer

from tasks.callbacks import CALLBACKS
from tasks.cli import main, resume
from tasks.cli.checkpoints import Checkpoints

TINY = [
    "task=vision",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    "model.optim.warmup_steps=0",
    "model.optim.schedule=constant",
    "model.backbone.dim=16",
    "model.backbone.depth=1",
    "model.backbone.expand_ratio=4",
    "model.backbone.glu_width=8",
]
EARLY = "trainer.callbacks=[{{class_path: EarlyStopping, init_args: {{monitor: val/loss, patience: {}}}}}]"


def fit(*argv):
    """A command line in this process; returns its status."""
    try:
        main([*TINY, *argv])
    except SystemExit as leave:
        return leave.code
    return 0


def checksums(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a finished run of four steps."""
    root = tmp_path_factory.mktemp("trained") / "runs"
    assert fit(f"run_root={root}", "trainer.max_steps=4", EARLY.format(3)) == 0
    return next(root.glob("vision/*"))


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be continued."""
    return shutil.copytree(trained, tmp_path / "runs" / "vision" / trained.name)


def test_every_setting_is_free_honoured_or_refused():
    """A setting that is new has to be thought about."""
    keys = ["seed", "run_root", "logger", "model.backbone.dim", "model.optim.lr", "data.batch_size"]
    keys += [f"trainer.{key}" for key in inspect.signature(Trainer).parameters]
    keys += [f"checkpoint.{key}" for key in inspect.signature(Checkpoints).parameters]
    keys += [f"{name}.{key}" for name, cls in CALLBACKS.items() for key in inspect.signature(cls).parameters]
    for key in keys:
        groups = [any(fnmatch(key, pattern) for pattern in group) for group in (resume.FREE, resume.HONOURED)]
        known = sum(groups) + (not any(groups) and any(fnmatch(key, pattern) for pattern in resume.REFUSED))
        assert known == 1, key


# -- settings that saved values depend on ----------------------------------------------------------------------------

REFUSED = {
    "counters, accumulation": (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2 (there: 1)"),
    "counters, accumulation by epoch": (
        ["trainer.callbacks=[{class_path: GradientAccumulationScheduler, init_args: {scheduling: {4: 2}}}]"],
        "another GradientAccumulationScheduler",
    ),
    "counters, epochs": (["trainer.limit_train_batches=5"], "trainer.limit_train_batches=5"),
    "counters, steps done": (["trainer.max_steps=3"], "is already at step 4 of 3: raise trainer.max_steps"),
    "counters, a try": (["trainer.fast_dev_run=1"], "trainer.fast_dev_run"),
    "order, batches": (["trainer.overfit_batches=2"], "trainer.overfit_batches=2"),
    "order, batch size": (["data.batch_size=32"], "data.batch_size=32 (checkpoint: 64)"),
    "order, seed": (["seed=1"], "data.seed=1 (checkpoint: 0)"),
    "training data": (["data.augment=false"], "the training data is not the checkpoint's"),
    "best score, batches": (["trainer.limit_val_batches=2"], "trainer.limit_val_batches=2 (there: 1)"),
    "best score, samples": (["data.eval_batch_size=7"], "a validation takes 7 samples, the checkpoint's scores are of"),
    "optimiser's groups": (["model.optim.decay_norms_and_biases=true"], "order of its groups"),
    "weights, of the same shapes": (["model.backbone.q_act=silu"], "model.backbone.q_act=silu (there: sigmoid)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, trained, capsys):
    settings, message = REFUSED[name]
    before = checksums(trained)
    more = [] if any("max_steps" in setting for setting in settings) else ["trainer.max_steps=6"]
    assert fit(f"run={trained}", *settings, *more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert checksums(trained) == before


def test_the_optimiser_follows_its_settings(run, capsys):
    """Its state brings the old ones along, and the schedule's is relative to the old learning rate."""
    typed = {"lr": 7e-4, "betas": (0.5, 0.6), "eps": 1e-4, "weight_decay": 0.25}
    settings = [f"model.optim.{key}={list(value) if key == 'betas' else value}" for key, value in typed.items()]
    assert load(run)["optimizer_states"][0]["param_groups"][0]["lr"] == 3e-3
    assert fit(f"run={run}", "trainer.max_steps=6", *settings) == 0
    out = capsys.readouterr().out
    assert "model.optim.lr=0.0007 (was 0.003)" in out
    checkpoint = load(run)
    decayed, plain = checkpoint["optimizer_states"][0]["param_groups"]
    for group in (decayed, plain):
        assert group["lr"] == group["initial_lr"] == typed["lr"]
        assert (group["betas"], group["eps"]) == (typed["betas"], typed["eps"])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0)
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [7e-4, 7e-4]
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 6  # and goes on with what it has learnt


def test_best_is_judged_by_the_new_monitor(run, capsys):
    """By the value that the validation of best.ckpt itself had."""
    before = load(run, "best")["callbacks"]["Checkpoints"]
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = load(run, "best")
    checkpoint["callbacks"]["Checkpoints"]["scores"]["val/loss"] = 0.0  # no later one is better
    path.unlink()  # a link
    torch.save(checkpoint, path)
    monitor = ["checkpoint.monitor=val/loss", "checkpoint.mode=min"]
    assert before["scores"].keys() == {"val/loss", "val/acc"}
    assert fit(f"run={run}", "trainer.max_steps=6", *monitor) == 0
    assert "checkpoint.monitor=val/loss (was val/acc)" in capsys.readouterr().out
    assert load(run, "best")["global_step"] == checkpoint["global_step"]
    assert load(run)["callbacks"]["Checkpoints"]["scores"] == checkpoint["callbacks"]["Checkpoints"]["scores"]
    assert fit(f"run={run}", "trainer.max_steps=8", "checkpoint.mode=max") == 0  # now any loss is better
    assert load(run, "best")["global_step"] == 8


def test_settings_without_a_saved_value_are_honoured(run, capsys):
    changed = ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5", "model.backbone.dropout=0.2"]
    changed += ["model.seed=3", "trainer.val_check_interval=3"]
    assert fit(f"run={run}", "trainer.max_steps=6", *changed) == 0
    out = capsys.readouterr().out
    assert "from here on: " in out
    for key in ("trainer.precision=bf16-mixed (was 32-true)", "model.seed=3 (was 0)", "val_check_interval=3 (was 2)"):
        assert key in out
    rows = [row.split(",") for row in (run / "csv" / "metrics.csv").read_text().splitlines()]
    column = rows[0].index("val/loss")
    assert [int(row[1]) for row in rows[1:] if row[column]] == [1, 3, 5]  # after 2, 4 and 6 steps
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["trainer"]["precision"] == load(run)["config"]["trainer"]["precision"] == "bf16-mixed"


def test_a_waiting_validation_gives_way_to_another_interval(run):
    """last.ckpt of before a validation, and that validation is no longer due."""
    stop = "trainer.callbacks=[{class_path: test_continue.Dies, init_args: {validation: true}}]"
    with pytest.raises(RuntimeError, match="died"):
        fit(f"run={run}", "trainer.max_steps=8", stop)
    assert load(run)["global_step"] == 6
    assert fit(f"run={run}", "trainer.callbacks=[]", "trainer.max_steps=8", "trainer.val_check_interval=4") == 0
    assert load(run)["global_step"] == 8
    assert load(run)["callbacks"]["Checkpoints"]["scores"]


class Dies(Callback):
    """Ends its run with an error.

    Args:
        step: at the end of this step; -1: never
        validation: in a validation
    """

    def __init__(self, step: int = -1, validation: bool = False):
        self.step, self.validation = step, validation

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("died")

    def on_validation_batch_end(self, *args, **kwargs):
        if self.validation:
            raise RuntimeError("died")


# -- callbacks' states -----------------------------------------------------------------------------------------------


def test_a_callback_has_this_command_lines_settings(run, capsys):
    """EarlyStopping keeps its patience in its state."""
    assert fit(f"run={run}", "trainer.max_steps=6", EARLY.format(7)) == 0
    (state,) = [state for key, state in load(run)["callbacks"].items() if key.startswith("EarlyStopping")]
    assert state["patience"] == 7
    assert float(state["best_score"]) < float("inf")  # its state goes on


def test_an_evaluation_misses_no_callback(trained, recwarn):
    main(["test", "task=vision", "trainer.accelerator=cpu", f"run={trained}", "trainer.limit_test_batches=1"])
    assert not [warning for warning in recwarn if "callbacks" in str(warning.message)]


def test_what_early_stopping_ended_stays_ended(run, capsys):
    limits = [f"run={run}", "trainer.max_steps=20"]
    stop = "trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 1, min_delta: 9}}]"
    assert fit(*limits, stop) == 0
    ended = load(run)["global_step"]
    assert ended < 20
    before = checksums(run)
    capsys.readouterr()
    assert fit(*limits) == 0  # the same again, as a requeued job would
    assert checksums(run) == before
    assert fit(*limits, stop.replace("patience: 1", "patience: 2")) == 0
    assert ended < load(run)["global_step"] < 20
    assert fit(*limits, "trainer.callbacks=[]") == 0
    assert load(run)["global_step"] == 20


def test_a_stop_inside_an_accumulation_waits_for_its_step(tmp_path):
    stop = "trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/loss, stopping_threshold: 99}}]"
    accumulate = ["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=5", "trainer.max_steps=9"]
    assert fit(f"run_root={tmp_path}", stop, *accumulate) == 0
    run = next(tmp_path.glob("vision/*"))
    last = load(run)
    assert (last["global_step"], last["inexact"]) == (2, "")
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 8
    before = checksums(run)
    assert fit("resume=auto", f"run_root={tmp_path}", *accumulate) == 0  # ended, with the same settings
    assert checksums(run) == before


def test_lightnings_own_checkpoints_say_whether_they_resume(tmp_path, capsys):
    """Those of a validation hold the callbacks' states of before it, since it runs again."""
    each = "filename: '{step}', save_top_k: -1, monitor: val/acc, mode: max"
    hooks = f"{{class_path: ModelCheckpoint, init_args: {{{each}}}}}"
    hooks += ", {class_path: EarlyStopping, init_args: {monitor: val/loss, min_delta: 9, patience: 9}}"
    hooks += ", {class_path: OnExceptionCheckpoint, init_args: {dirpath: " + str(tmp_path) + "}}"
    hooks += ", {class_path: test_continue.Dies, init_args: {step: 9}}"
    settings = [f"run_root={tmp_path / 'runs'}", f"trainer.callbacks=[{hooks}]", "logger=tensorboard"]
    with pytest.raises(RuntimeError, match="died"):
        fit(*settings, "trainer.max_steps=10")
    (run,) = (tmp_path / "runs" / "vision").iterdir()

    def waits(checkpoint):
        (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("EarlyStopping")]
        return state["wait_count"]

    assert [waits(load(run, f"step={step}")) for step in (2, 4, 6)] == [0, 0, 1]
    assert fit(f"ckpt_path={tmp_path / 'on_exception.ckpt'}", *settings) == 2
    assert "written while an error ended its run" in capsys.readouterr().err
    hooks = hooks.replace("step: 9", "step: -1")
    other = [f"run_root={tmp_path / 'other'}", f"trainer.callbacks=[{hooks}]", "trainer.max_steps=10"]
    assert fit(f"ckpt_path={run / 'checkpoints' / 'step=4.ckpt'}", *other) == 0
    assert fit(f"run={run}", *settings[2:], f"trainer.callbacks=[{hooks}]", "trainer.max_steps=10") == 0
    (again,) = (tmp_path / "other" / "vision").iterdir()
    assert waits(load(again)) == waits(load(run)) == 4
    assert load(again)["callbacks"]["Checkpoints"]["scores"] == load(run, "best")["callbacks"]["Checkpoints"]["scores"]


# -- what a requeued job continues -----------------------------------------------------------------------------------


def test_auto_continues_only_the_same_experiment(run, capsys):
    root = run.parents[1]
    before = checksums(root)
    assert fit(f"run_root={root}", "resume=auto", "trainer.max_steps=6", "model.optim.lr=1e-2") == 2
    error = capsys.readouterr().err
    assert f"resume=auto: the newest run {run} is another experiment: model.optim.lr=0.003 there and 0.01 here" in error
    assert f"run={run}" in error
    assert checksums(root) == before
    free = ["trainer.max_steps=6", "trainer.log_every_n_steps=2", "checkpoint.every_n_steps=1"]
    assert fit(f"run_root={root}", "resume=auto", *free) == 0
    assert load(run)["global_step"] == 6
    shutil.rmtree(run / "checkpoints")
    assert fit(f"run_root={root}", "resume=auto", "trainer.max_steps=6", "model.optim.lr=1e-2") == 0
    assert f"{run} has no checkpoint and is another experiment" in re.sub(r"\s+", " ", capsys.readouterr().out)
    (new,) = set(root.glob("vision/*")) - {run}
    assert load(new)["config"]["model"]["optim"]["lr"] == 1e-2
    assert not (run / "checkpoints").exists()


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(tmp_path):
    """And not the one before it, which has finished."""
    flags = [*TINY, "trainer.max_steps=3", "trainer.val_check_interval=3", "checkpoint.every_n_steps=0"]
    assert fit(f"run_root={tmp_path / 'runs'}", *flags[len(TINY) :]) == 0
    (first,) = (tmp_path / "runs" / "vision").iterdir()
    before = checksums(first)
    recorder = "trainer.callbacks=[{{class_path: recorder.Recorder, init_args: {{path: losses, at: {}}}}}]"
    second = [*flags, "model.optim.lr=1e-3"]
    status, out = launch(tmp_path, *second, recorder.format(1))
    assert status == -signal.SIGKILL, out
    (died,) = set((tmp_path / "runs" / "vision").iterdir()) - {first}
    assert not (died / "checkpoints").exists()
    status, out = launch(tmp_path, *second, recorder.format(-1), "resume=auto")
    assert status == 0, out
    assert "has no checkpoint yet: starting it anew" in out
    assert load(died)["global_step"] == 3
    assert load(died)["config"]["model"]["optim"]["lr"] == 1e-3
    rows = [row.split(",")[1] for row in (died / "csv" / "metrics.csv").read_text().splitlines()[1:]]
    assert sorted(set(rows)) == ["0", "1", "2"]
    assert checksums(first) == before


def test_a_copied_checkpoint_brings_its_configuration(run, tmp_path, capsys):
    """To be evaluated or to be trained on from: the small model, although the task's file says otherwise."""
    copied = tmp_path / "copied.ckpt"
    shutil.copy(run / "checkpoints" / "best.ckpt", copied)
    quiet = TINY[:8]
    main(["test", *quiet, f"ckpt_path={copied}"])
    assert "test/loss" in capsys.readouterr().out
    main([*quiet, f"ckpt_path={copied}", "trainer.max_steps=5", f"run_root={tmp_path / 'new'}"])
    (new,) = (tmp_path / "new" / "vision").iterdir()
    assert load(new)["config"]["model"]["backbone"]["dim"] == 16
