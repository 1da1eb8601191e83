"""The command line, as a person types it."""

import importlib.util
import os
import pickle
import subprocess
import sys

import pytest
import torch
import yaml
from launch import REPO, launch

from hgrn2.config import ConfigError
from tasks.cli import compose, main
from tasks.cli.arguments import read_request

TINY = [
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "trainer.val_check_interval=2",
    "model.optim.warmup_steps=0",
    "model.backbone.dim=16",
    "model.backbone.depth=1",
    "model.backbone.expand_ratio=4",
]
VISION = ["task=vision", *TINY, "model.backbone.glu_width=8"]


def config(tmp_path, *argv):
    """What --print_config prints, read back."""
    status, out = launch(tmp_path, *argv, "--print_config")
    assert status == 0, out
    return yaml.safe_load(out)


def refused(tmp_path, *argv):
    """The message of a command line that must be refused: one line, status 2, nothing left behind."""
    status, out = launch(tmp_path, *argv)
    assert status == 2, out
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, out
    assert "Traceback" not in out
    assert "Usage" not in out
    assert not (tmp_path / "runs").exists()
    return errors[0]


# -- reading ---------------------------------------------------------------------------------------------------------


def test_requests():
    request = read_request(["test", "task=lm", "a.b=1", "--c=2", "--d", "3", "--flag", "--print_config"])
    assert (request.command, request.task, request.print_config) == ("test", "lm", True)
    assert request.tokens == ["a.b=1", "--c=2", "--d", "3", "--flag"]
    assert read_request(["--task", "lm"]).task == "lm"
    assert read_request(["--flag", "task=lm"]).task == "lm"
    assert read_request(["task=lm", "validate"]).command == "validate"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit", "vision"], "did you mean task=vision"),
        (["tset", "task=vision"], "did you mean test"),
        (["fit", "test", "task=vision"], "test: expected key=value"),
    ],
)
def test_stray_words(argv, message):
    with pytest.raises(ConfigError, match=message):
        read_request(argv)


def test_help_lists_the_tasks(capsys):
    main(["--help"])
    out = capsys.readouterr().out
    for task in compose.shipped_tasks():
        assert f"\n  {task} " in out
    assert "fit|validate|test|predict" in out


@pytest.mark.parametrize("argv", [[], ["fit"], ["task=nope"], ["task=visoin"], ["task=base"]])
def test_without_a_known_task_the_tasks_are_listed(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert all(task in error for task in compose.shipped_tasks())
    assert error.count("\n") == 1


# -- composing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", compose.shipped_tasks())
def test_every_shipped_configuration_parses(task, tmp_path):
    resolved = config(tmp_path, f"task={task}")
    assert resolved["domain"] in ("lm", "vision", "lra")
    assert "${" not in str(resolved["trainer"])


@pytest.mark.parametrize("task", [task for task in compose.shipped_tasks() if "/" not in task])
def test_every_demo_runs(task, tmp_path):
    small = ["trainer.fast_dev_run=2", "trainer.accelerator=cpu", "data.batch_size=4", "data.eval_batch_size=4"]
    status, out = launch(tmp_path, f"task={task}", *small, "trainer.enable_progress_bar=false")
    assert status == 0, out
    assert not (tmp_path / "runs").exists()


def test_help_of_a_task_shows_resolved_values(tmp_path):
    status, out = launch(tmp_path, "task=vision", "--help", "trainer.max_steps=123", "seed=5")
    assert status == 0, out
    for line in ("trainer.max_steps=123 ", "seed=5 ", "model.seed=5 ", "model.backbone.dim=64 ", "ckpt_path=null "):
        assert f"  {line}" in out
    assert "width of the residual stream" in out
    assert "nearest" not in out.lower()


def test_precedence(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("parent: vision\ntrainer: {log_every_n_steps: 7, max_steps: 70}\n")
    resolved = config(tmp_path, "task=own.yaml", "trainer.max_steps=71", "seed=5")
    assert resolved["trainer"]["log_every_n_steps"] == 7  # the task's file over base.yaml
    assert resolved["trainer"]["max_steps"] == 71  # the command line over the task's file
    assert resolved["trainer"]["use_distributed_sampler"] is False  # base.yaml over the class
    assert resolved["trainer"]["accumulate_grad_batches"] == 1  # the class
    assert resolved["model"]["patch_size"] == 4  # the parent
    assert resolved["model"]["seed"] == resolved["data"]["seed"] == 5  # interpolations follow
    assert config(tmp_path, "task=own.yaml", "seed=0")["data"]["seed"] == 0


def test_three_spellings(tmp_path):
    plain = ["trainer.max_steps=9", "model.prompt=a=b", "trainer.detect_anomaly=true", "trainer.fast_dev_run=true"]
    dashed = [f"--{word}" for word in plain[:2]] + ["--trainer.detect_anomaly=yes", "--trainer.fast_dev_run", "true"]
    apart = ["--trainer.max_steps", "9", "--model.prompt", "a=b", "--trainer.detect_anomaly", "--trainer.fast_dev_run"]
    read = [
        config(tmp_path, "task=lm", *plain),
        config(tmp_path, "--task=lm", *dashed),
        config(tmp_path, *apart, "--task", "lm"),
    ]
    assert read[0] == read[1] == read[2]
    assert read[0]["model"]["prompt"] == "a=b"
    assert read[0]["trainer"]["max_steps"] == 9
    assert read[0]["trainer"]["detect_anomaly"] is True
    assert read[0]["trainer"]["fast_dev_run"] is True


@pytest.mark.parametrize("text", ["yes", "0123", "12:30:45", "a: b", "${x}", "1e3", "null", "", "#c", "[1]", "--x"])
def test_typed_text_arrives_unchanged(text, tmp_path):
    status, out = launch(tmp_path, "task=lm", f"model.prompt={text}", "--print_config")
    assert status == 0, out
    (tmp_path / "again.yaml").write_text(out)
    _, read = compose.load_task(str(tmp_path / "again.yaml"))
    assert compose.resolve(read)["model"]["prompt"] == text


def test_numbers_and_lists(tmp_path):
    typed = ["model.optim.lr=1e-4", "model.optim.betas=[0.8,0.9]", "trainer.limit_val_batches=0.5"]
    resolved = config(tmp_path, "task=vision", *typed, "trainer.max_time=00:12:00:00", "trainer.precision=bf16-mixed")
    assert resolved["model"]["optim"]["lr"] == 1e-4
    assert resolved["model"]["optim"]["betas"] == [0.8, 0.9]
    assert resolved["trainer"]["limit_val_batches"] == 0.5
    assert resolved["trainer"]["max_time"] == "00:12:00:00"
    assert resolved["trainer"]["precision"] == "bf16-mixed"


def test_changed_class_drops_old_arguments(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "parent: vision\ntrainer: {profiler: {class_path: PyTorchProfiler, init_args: {group_by_input_shapes: true}}}\n"
    )
    resolved = config(tmp_path, "task=own.yaml", "trainer.profiler=SimpleProfiler")
    assert resolved["trainer"]["profiler"]["class_path"].endswith("SimpleProfiler")
    assert "group_by_input_shapes" not in resolved["trainer"]["profiler"].get("init_args", {})


def test_printed_configuration_reproduces_itself(tmp_path):
    status, first = launch(tmp_path, "task=lm", "model.prompt=${x} yes", "trainer.max_steps=77", "--print_config")
    assert status == 0, first
    (tmp_path / "again.yaml").write_text(first)
    status, second = launch(tmp_path, "task=again.yaml", "--print_config")
    assert status == 0, second
    assert first == second


# -- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["trainer.max_epoch=3"], ["trainer.max_epoch:", "trainer.max_epochs"]),
        (["--max_epochs", "3"], ["max_epochs: unknown key", "trainer.max_epochs"]),
        (["model.dim=32"], ["model.dim: unknown key", "model.backbone.dim"]),
        (["trainer.max_epochs.x=3"], ["trainer.max_epochs.x: unknown key"]),
        (["trainer.max_steps=many"], ["trainer.max_steps=many: expected int"]),
        (["trainer.max_steps"], ["trainer.max_steps: a value is missing"]),
        (["--trainer.max_steps"], ["trainer.max_steps: a value is missing"]),
        (["trainer.precision=bf17"], ["trainer.precision=bf17", "bf16-mixed"]),
        (["model.backbone.norm=nrom"], ["model.backbone.norm=nrom", "rmsnorm"]),
        (["model.backbone.dim=10"], ["expand_ratio=16", "dim=10"]),
        (["data.batch_size=0"], ["data.batch_size=0"]),
        (["seed=x"], ["seed=x: expected int"]),
        (["seed=-1"], ["seed=-1"]),
        (["logger=tensorbord"], ["logger=tensorbord", "tensorboard, csv, wandb, none"]),
        (["trainer.accelerator=gpux"], ["gpux"]),
        (["trainer.strategy=foo"], ["foo"]),
        (["trainer.accelerator=cpu", "trainer.devices=0"], ["0"]),
        (["trainer.gradient_clip_algorithm=x"], ["x"]),
        (["trainer.callbacks=Nope"], ["trainer.callbacks=Nope"]),
        (["ckpt_path=last"], ["ckpt_path=last: no run of task=vision"]),
        (["ckpt_path=nowhere.ckpt"], ["ckpt_path=nowhere.ckpt: no such file"]),
        (["run=nowhere"], ["run=nowhere"]),
        (["test"], ["no run of task=vision", "ckpt_path=PATH"]),
        (["test", "resume=auto"], ["resume=auto is for fit"]),
        (["trainer.val_check_interval=1000", "trainer.check_val_every_n_epoch=1", *TINY[:1]], ["1000"]),
        (["data.batch_size=100000", *TINY], ["data.batch_size=100000"]),
        (["trainer.num_nodes=2", *TINY], ["trainer.num_nodes=2", "torchrun"]),
        (["trainer.strategy=ddp_spawn", "trainer.devices=2", "trainer.accelerator=cpu"], ["ddp_spawn", "use ddp"]),
        (["checkpoint.monitor=val/los", *TINY], ["checkpoint.monitor=val/los", "val/loss"]),
    ],
)
def test_mistakes_are_one_message(argv, fragments, tmp_path):
    message = refused(tmp_path, "task=vision", *argv)
    for fragment in fragments:
        assert fragment in message
    assert len(message) < 600


def test_missing_data_path(tmp_path):
    assert "data.path=/nope" in refused(tmp_path, "task=lm", "data.path=/nope", *TINY)


def test_missing_package(tmp_path):
    if importlib.util.find_spec("wandb") is None:
        assert "pip install wandb" in refused(tmp_path, *VISION, "logger=wandb")


def test_mistake_in_a_file_names_the_file(tmp_path):
    (tmp_path / "own.yaml").write_text("parent: vision\ntrainer: {max_epoch: 3}\n")
    message = refused(tmp_path, "task=own.yaml")
    assert "task=own.yaml" in message
    assert "trainer.max_epochs" in message


def test_a_bug_shows_its_traceback(tmp_path):
    hook = "trainer.callbacks=[{class_path: recorder.Recorder, init_args: {path: /nowhere/losses}}]"
    status, out = launch(tmp_path, *VISION, hook)
    assert status == 1
    assert "Traceback" in out
    assert "FileNotFoundError" in out


# -- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    status, out = launch(folder, *VISION, "logger=tensorboard,csv", "model.label_smoothing=0.1")
    assert status == 0, out
    return folder, out


def the_run(folder):
    (run,) = (folder / "runs" / "vision").iterdir()
    return run


def test_a_run_folder_has_everything(trained):
    folder, out = trained
    run = the_run(folder)
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "csv/metrics.csv"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    assert out.count(f"run folder: runs/vision/{run.name}") == 2  # at start and at the end
    assert "tensorboard --logdir runs" in out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["backbone"]["dim"] == 16
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["schedule"] == {"warmup_steps": 0, "total_steps": 2}


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_uses_the_runs_own_model(trained, command):
    """The small model of the run, although the task's file says otherwise."""
    folder, _ = trained
    status, out = launch(folder, command, "task=vision", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
    assert status == 0, out
    assert f"{command} uses runs/vision/{the_run(folder).name}/checkpoints/best.ckpt" in out
    assert f"{'val' if command == 'validate' else command}/loss" in out
    status, out = launch(folder, command, "task=vision", "ckpt_path=last", "model.backbone.dim=32", *TINY[:4])
    assert status == 2  # typed, so it wins, and it does not fit
    assert "a checkpoint of another model" in out


def test_predict_writes_into_the_run(trained):
    folder, _ = trained
    status, out = launch(folder, "predict", "task=vision", "ckpt_path=last", *TINY[:4])
    assert status == 0, out
    assert "predictions: " in out
    predictions = torch.load(the_run(folder) / "predictions.pt", weights_only=True)
    assert sum(len(batch["preds"]) for batch in predictions) == 359  # a fifth of 1,797


def test_saved_configuration_is_a_task_file(trained):
    folder, _ = trained
    path = the_run(folder) / "config.yaml"
    resolved = config(folder, f"task={path}")
    saved = yaml.safe_load(path.read_text())
    assert resolved == saved
    assert compose.task_name(str(path)) == "vision"  # filed with the run's task


def test_more_steps_continue_in_the_same_run(trained):
    folder, _ = trained
    status, out = launch(folder, "task=vision", "resume=auto", "trainer.max_steps=4", "logger=csv", *TINY[:4])
    assert status == 0, out
    run = the_run(folder)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert checkpoint["schedule"]["total_steps"] == 4  # followed
    assert saved["model"]["label_smoothing"] == 0.1  # kept from the run
    status, out = launch(folder, "task=vision", "resume=auto", *TINY[:4])
    assert status == 0, out  # nothing left to do: not an error, and no new run
    assert the_run(folder) == run


def test_checkpoints_load_from_python(trained):
    from tasks.vision.module import VisionTask

    folder, _ = trained
    path = the_run(folder) / "checkpoints" / "best.ckpt"
    task = VisionTask.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    assert task.backbone_config.dim == 16
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in task.state_dict().items())


def test_checkpoints_made_in_python_load_safely(tmp_path):
    from lightning.pytorch import Trainer

    from hgrn2 import HGRN2Config
    from tasks.vision.data import VisionData
    from tasks.vision.module import VisionTask

    backbone = HGRN2Config(dim=16, depth=1, expand_ratio=4, scan="bidirectional", glu_width=8)
    task = VisionTask(backbone=backbone, img_size=8, patch_size=2, in_chans=1, num_classes=10)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    trainer.fit(task, VisionData(batch_size=64))
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    again = VisionTask.load_from_checkpoint(tmp_path / "python.ckpt", weights_only=True)
    assert again.backbone_config == backbone
    assert all(torch.equal(value, task.state_dict()[key]) for key, value in again.state_dict().items())


def test_data_goes_to_workers_that_are_not_forked():
    from tasks.vision.data import VisionData

    data = VisionData(batch_size=4)
    data.trainer = lambda: None  # as little picklable as a Trainer
    assert pickle.loads(pickle.dumps(data.collate)).__self__.trainer is None


def test_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), "task=vision", "--print_config"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["domain"] == "vision"


@pytest.mark.ddp
def test_two_processes_report_a_mistake_once(tmp_path):
    """They train in test_resume.py."""
    argv = [*VISION, "trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=7"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    train = [sys.executable, str(REPO / "train.py"), *argv]
    done = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "data.batch_size=7" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
