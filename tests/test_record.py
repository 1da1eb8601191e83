"""What a run leaves behind and says: TensorBoard, config.yaml, progress, summaries, results."""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from launch import REPO, launch
from lightning.pytorch.accelerators import MPSAccelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from hgrn2 import HGRN2Config
from hgrn2.config import ConfigError
from tasks import callbacks
from tasks.cli import compose, execute, main
from tasks.cli.report import already_done
from tasks.progress import Progress, duration, rate
from tasks.vision.module import VisionTask

SMALL = [
    "task=vision",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "data.eval_batch_size=360",
    "trainer.val_check_interval=2",
    "model.optim.warmup_steps=0",
    "model.optim.lr=2e-3",
    "model.backbone.dim=16",
    "model.backbone.depth=1",
    "model.backbone.expand_ratio=4",
    "model.backbone.glu_width=8",
]


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def steps(folder, tag) -> list[int]:
    return [event.step for event in events(folder).Scalars(tag)]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder to run in, and what a run of six steps printed."""
    folder = tmp_path_factory.mktemp("record")
    status, said = launch(folder, *SMALL, "trainer.max_steps=6", "logger=tensorboard,csv")
    assert status == 0, said
    (folder / "said.txt").write_text(said)
    return folder


@pytest.fixture
def run(here, monkeypatch) -> Path:
    monkeypatch.chdir(here)
    (folder,) = (here / "runs" / "vision").iterdir()
    return folder


def test_tensorboard_opens_on_train_and_val(run):
    tags = events(run).Tags()
    shown = sorted([*tags["scalars"], *tags["histograms"], *tags["images"]])
    assert list(dict.fromkeys(tag.partition("/")[0] for tag in shown)) == ["train", "val", "viz"]
    assert [tag for tag in tags["scalars"] if "lr" in tag] == ["train/lr"]
    assert events(run).Scalars("train/lr")[0].value == pytest.approx(2e-3 * 0.933, rel=1e-3)


def test_a_resume_repeats_and_loses_no_event(run):
    """What is kept of a validation has the step of its last training step, which a resume from there does not purge."""
    tags = events(run).Tags()
    assert steps(run, "val/loss") == [1, 3, 5]
    assert [image.step for image in events(run).Images("viz/memory_horizon/map")] == [1, 3, 5]
    assert set(steps(run, "train/best_val_acc")) <= {1, 3, 5}
    assert sorted(tags["scalars"]).index("train/best_val_acc") < 5  # HPARAMS shows the first five
    assert tags["histograms"]


def hparams(run):
    content = events(run).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}


def test_hparams_are_what_differs_from_the_task(run):
    assert hparams(run) == {
        "task": "vision",
        "model.optim.lr": 2e-3,
        "model.optim.warmup_steps": 0,
        "model.backbone.dim": 16,
        "model.backbone.depth": 1,
        "model.backbone.expand_ratio": 4,
        "model.backbone.glu_width": 8,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 2,
        "data.eval_batch_size": 360,
        "trainer.val_check_interval": 2,
        "trainer.max_steps": 6,  # and not model.optim.total_steps, which follows it
    }
    # no columns of this run alone: TensorBoard would use them for all runs
    assert metadata.EXPERIMENT_TAG not in events(run).Tags()["tensors"]


def test_no_empty_files(run):
    assert not list(run.rglob("hparams.yaml"))


def test_the_configuration_has_no_null_that_is_a_default(run):
    text = (run / "config.yaml").read_text()
    saved = yaml.safe_load(text)
    nulls = [key for key in compose.flatten(saved) if compose.at(saved, key) is None]
    assert nulls == ["trainer.check_val_every_n_epoch"]  # the class says 1


def saved_config(capsys, *argv):
    main([*argv, "--print_config"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "typed", "nulls"),
    [
        ("vision", ["trainer.gradient_clip_val=null"], ["trainer.gradient_clip_val"]),  # the task's file says 1.0
        ("vision", ["trainer.max_epochs=null"], ["trainer.max_epochs"]),  # base.yaml says -1
        ("vision", ["model.backbone.glu_width=null"], ["model.backbone.glu_width"]),
        ("lm", [], ["model.backbone.v_act"]),  # the class says silu
        ("lra", [], ["model.positions"]),
    ],
)
def test_nulls_that_say_something_are_kept(task, typed, nulls, tmp_path, capsys):
    first = saved_config(capsys, f"task={task}", *typed)
    saved = yaml.safe_load(first)
    kept = [key for key in compose.flatten(saved) if compose.at(saved, key) is None]
    # the class says 0 and 1
    assert sorted(kept) == sorted([*nulls, "model.optim.warmup_steps", "trainer.check_val_every_n_epoch"])
    (tmp_path / "again.yaml").write_text(first)
    assert yaml.safe_load(saved_config(capsys, f"task={tmp_path / 'again.yaml'}")) == saved


# -- what is said ----------------------------------------------------------------------------------------------------


def test_off_a_terminal_there_is_a_line_every_few_steps(here):
    said = (here / "said.txt").read_text()
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    value = r"\d+\.?\d*(e[+-]\d\d)?"
    training = re.compile(
        rf"step (\d)/6  loss {value}  acc {value}  lr \d\.\de-\d\d  {value}[kM]? tok/s(  0:00:0\d left)"
    )
    assert [int(match[1]) for line in lines if (match := training.fullmatch(line))] == [2, 4, 6]
    validation = re.compile(rf"step (\d)/6  val/loss {value}  val/acc {value}")
    assert [int(match[1]) for line in lines if (match := validation.fullmatch(line))] == [2, 4, 6]
    assert len(lines) == 6
    assert "━" not in said
    assert "it/s" not in said


def test_a_run_ends_with_its_figures(here, run):
    said = (here / "said.txt").read_text()
    values = [event.value for event in events(run).Scalars("val/acc")]
    best = max(values)
    figures = re.search(
        r"finished at step 6/6: \d+\.\d s, [\d.]+k? tokens/s, peak memory \d\.\d\d GiB \(process\)\n(.*)\n", said
    )
    assert figures[1] == f"best val/acc: {best:#.4g} at step {2 * values.index(best) + 2}"


def test_the_start_is_quiet(here):
    """No rows of metrics, no advertising, no deprecated parts of a dependency."""
    said = (here / "said.txt").read_text()
    start = said[: said.index("step 2/6")].splitlines()
    assert len(start) == 7, said
    assert [line.split()[0] for line in start[-5:]] == ["patch_embed", "backbone", "head", "run", "watch:"]
    assert "deprecated" not in said


def test_noise_is_left_out_and_nothing_else():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        execute._quiet()
        for module in ("lightning.pytorch.utilities._pytree", "torchmetrics.metric", "my_own.module"):
            warnings.warn_explicit("deprecated", FutureWarning, "file.py", 1, module)
            warnings.warn_explicit("look", UserWarning, "file.py", 2, module)
    assert [str(warning.message) for warning in shown] == ["look", "look", "deprecated", "look"]

    def is_noise(message):
        return not execute._not_noise(logging.makeLogRecord({"msg": message}))

    assert is_noise("Using bfloat16 Automatic Mixed Precision (AMP)")
    assert is_noise("Initializing distributed: GLOBAL_RANK: 1, MEMBER: 2/2")
    assert not is_noise("Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2")
    assert not is_noise("Time limit reached.")


def test_the_summary_is_of_the_models_parts(capsys):
    rows = [("model", "M", "9"), ("model.head", "Linear", "9"), ("model.head.x", "X", "9"), ("losses", "L", "0")]
    rows += [("model.dropout", "Dropout", "0  ")]
    data = [(column, [row[i] for row in rows]) for i, column in enumerate(("Name", "Type", "Params"))]
    callbacks.ModelParts.summarize([*data, ("FLOPs", ["0"] * 5)], 9, 9, 0.0, {}, total_flops=0)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["Part", "Type", "Params"],
        ["head", "Linear", "9"],
    ]


def test_a_test_is_kept_and_names_its_checkpoint_once(run, capsys):
    main(["test", "task=vision", "trainer.accelerator=cpu", "progress.style=lines"])
    out, err = capsys.readouterr()
    assert (out + err).count("best.ckpt") == 1
    assert f"results: runs/vision/{run.name}/test.json" in out
    results = json.loads((run / "test.json").read_text())
    assert results["checkpoint"] == "checkpoints/best.ckpt"
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert results["step"] == best["global_step"]
    assert results["metrics"].keys() == {"test/loss", "test/acc"}
    assert results["versions"]["torch"] == importlib.metadata.version("torch")
    (event,) = events(run / "test").Scalars("test/acc")
    assert (event.step, event.value) == (best["global_step"], pytest.approx(results["metrics"]["test/acc"]))
    main(["validate", "task=vision", "trainer.accelerator=cpu", "ckpt_path=last"])
    results = json.loads((run / "validate.json").read_text())
    assert (results["checkpoint"], results["step"]) == ("checkpoints/last.ckpt", 6)
    assert results["metrics"]["val/loss"] == pytest.approx(events(run).Scalars("val/loss")[-1].value)


def test_a_finished_run_says_that_it_is(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as leave:
        main(["task=vision", "resume=auto", "trainer.accelerator=cpu"])
    assert leave.value.code == 0
    assert "already at 6 of 6: raise trainer.max_steps\n" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # nor is a new run begun from a checkpoint that has nothing left to do
    with pytest.raises(SystemExit):
        main(["task=vision", f"ckpt_path={run / 'checkpoints' / 'best.ckpt'}", "trainer.max_steps=2"])
    out, err = capsys.readouterr()
    assert "of 2: raise trainer.max_steps" in err
    assert "run folder" not in out
    assert list(run.parent.iterdir()) == [run]


def progress_of(step, epochs, max_steps=-1, max_epochs=-1, validating=False):
    loop = {"epoch_loop.val_loop.batch_progress": {"current": {"started": 1, "completed": 1 - validating}}}
    loop["epoch_progress"] = {"current": {"processed": epochs}}
    checkpoint = {"global_step": step, "loops": {"fit_loop": loop}}
    return already_done(checkpoint, {"max_steps": max_steps, "max_epochs": max_epochs, "fast_dev_run": False})


def test_what_is_already_done():
    assert progress_of(5, 1, max_steps=6, max_epochs=2) is None
    assert progress_of(6, 1, max_steps=6) == "already at 6 of 6: raise trainer.max_steps"
    assert progress_of(6, 2, max_epochs=2) == "already at epoch 2 of 2: raise trainer.max_epochs"
    assert progress_of(6, 2) is None
    assert progress_of(6, 2, max_steps=6, max_epochs=2, validating=True) is None
    assert progress_of(6, 2, max_epochs=None) is None
    assert already_done({}, {"max_steps": 1, "max_epochs": 1, "fast_dev_run": False}) is None


def test_a_resumed_run_continues_its_record(here, tmp_path, monkeypatch, capsys):
    shutil.copytree(here / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (run,) = Path("runs/vision").iterdir()
    old = yaml.safe_load((run / "config.yaml").read_text())
    # of a run of an earlier version
    old |= {"lr_monitor": {"logging_interval": None}, "progress": {"refresh_rate": 10, "leave": False}}
    (run / "config.yaml").write_text("# task: vision\n" + yaml.safe_dump(old))
    best = events(run).Scalars("train/best_val_acc")
    main(["task=vision", f"run={run}", "trainer.max_steps=8"])
    assert steps(run, "val/loss") == [1, 3, 5, 7]
    assert steps(run, "train/lr") == [1, 3, 5, 7]
    assert events(run).Scalars("train/best_val_acc")[: len(best)] == best
    assert [image.step for image in events(run).Images("viz/memory_horizon/map")] == [1, 3, 5, 7]
    assert hparams(run)["model.optim.lr"] == 2e-3
    out = capsys.readouterr().out
    assert "step 8/8  loss" in out
    assert out.count("last.ckpt") == 1


# -- on a terminal ---------------------------------------------------------------------------------------------------

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def screen(said: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    rows, row, column = [""], 0, 0
    for escape, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", said):
        if text:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
        elif escape == "\n":
            row, rows = row + 1, rows + [""] * (row + 1 == len(rows))
        elif escape == "\r":
            column = 0
        elif escape.endswith("A"):  # up
            row -= int(escape[2:-1] or 1)
        elif escape.endswith("K"):  # erase the line
            rows[row] = ""
    return rows


def test_on_a_terminal_one_line_moves(tmp_path):
    """Under a pseudo-terminal of 80 columns: what stays are whole lines; the moving one has step, values, time left."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    argv = [sys.executable, str(REPO / "train.py"), *SMALL, "trainer.max_steps=30", "trainer.val_check_interval=10"]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "CI")}
    process = subprocess.Popen(
        argv, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env=environment | {"TERM": "xterm"}
    )
    os.close(slave)
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(master, 65536):
            said += chunk
    os.close(master)
    assert process.wait() == 0
    moving = [part.rstrip() for part in re.split(r"[\r\n]", ESCAPES.sub("", said.decode())) if "━" in part]
    assert all(len(part) <= 80 for part in moving)
    assert any(re.search(r"step \d+/30 [━╸╺]+ loss .* acc .* lr .* tok/s 0:00:0\d left", part) for part in moving), (
        moving
    )
    assert any("validating" in part for part in moving) or len(moving) > 3
    kept = screen(said.decode())
    assert not [line for line in kept if "━" in line]
    assert [line[:10] for line in kept if line.startswith("step ")] == ["step 10/30", "step 20/30", "step 30/30"]
    assert "it/s" not in said.decode()


# -- no step waits for the device to show its values -----------------------------------------------------------------


def test_values_are_read_at_logged_steps_only(monkeypatch):
    class Values(dict):
        reads = 0

        def __getitem__(self, key):
            Values.reads += 1
            return super().__getitem__(key)

    trainer = SimpleNamespace(global_step=0, log_every_n_steps=5, callbacks=[], is_global_zero=True, fast_dev_run=False)
    trainer.callback_metrics = Values({"train/loss": torch.tensor(1.0)})
    trainer.lightning_module = SimpleNamespace(run_length=lambda: None)
    task = SimpleNamespace(progress_metric="acc")
    progress = Progress("lines")
    progress.on_train_start(trainer, task)
    read_at = []
    for step in range(1, 12):
        trainer.global_step, before = step, Values.reads
        progress.on_train_batch_end(trainer, task, None, None, step - 1)
        read_at += [step] * (Values.reads > before)
    assert read_at == [5, 10]


def test_other_ranks_say_nothing(capsys):
    trainer = SimpleNamespace(
        global_step=0, log_every_n_steps=1, callbacks=[], is_global_zero=False, fast_dev_run=False
    )
    trainer.callback_metrics = {"train/loss": torch.tensor(1.0)}
    trainer.lightning_module = SimpleNamespace(run_length=lambda: None)
    progress = Progress("bar")
    progress.setup(trainer, None, "fit")
    progress.on_train_start(trainer, None)
    trainer.global_step = 1
    progress.on_train_batch_end(trainer, SimpleNamespace(progress_metric="acc"), None, None, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5 tok/s"), (999.4, "999 tok/s"), (999.9, "1k tok/s"), (1234, "1.23k tok/s"), (5.6e7, "56M tok/s")],
)
def test_rates(value, text):
    assert rate(value, "tok") == text


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 360_061)] == ["0:00:00", "0:01:00", "1:00:00", "100:01:01"]


# -- Apple silicon ---------------------------------------------------------------------------------------------------


def test_auto_does_not_take_mps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    said = []
    monkeypatch.setattr(callbacks, "rank_zero_info", said.append)
    argv = [word for word in SMALL if word != "trainer.accelerator=cpu"]
    main([*argv, "trainer.fast_dev_run=1"])
    assert capsys.readouterr().out.count("trainer.accelerator=auto takes the CPU") == 1
    assert "1 x cpu" in said[0]


def test_mps_is_refused(tmp_path, monkeypatch):
    task = VisionTask(
        backbone=HGRN2Config(dim=16, depth=1, expand_ratio=4, scan="bidirectional"),
        num_classes=10,
        img_size=8,
        in_chans=1,
    )
    task._trainer = SimpleNamespace(datamodule=None, strategy=SimpleNamespace(root_device=torch.device("mps")))
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=mps"):
        task.setup("fit")
