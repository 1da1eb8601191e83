"""Lists of objects: every spelling keeps what a task file or a resumed run has, unless it is replaced by name."""

import pytest
import yaml
from launch import launch

from hgrn2.config import ConfigError
from tasks.cli import compose, main
from tasks.cli.lists import read_lists

OWN = """parent: vision
trainer:
  callbacks:
  - class_path: EarlyStopping
    init_args: {monitor: val/loss, patience: 7}
  - class_path: lightning.pytorch.callbacks.LearningRateMonitor
"""


@pytest.fixture
def read(tmp_path, capsys):
    """The callbacks of a command line over the task file: class -> arguments, in order."""
    (tmp_path / "own.yaml").write_text(OWN)

    def run(*argv, key="callbacks", task="own.yaml"):
        main([f"task={tmp_path / task}", *argv, "--print_config"])
        entries = yaml.safe_load(capsys.readouterr().out)["trainer"].get(key) or []
        return {entry["class_path"].rpartition(".")[2]: entry.get("init_args", {}) for entry in entries}

    return run


OLD = ["EarlyStopping", "LearningRateMonitor"]


@pytest.mark.parametrize(
    "argv",
    [
        ["trainer.callbacks=ModelSummary", "trainer.callbacks.max_depth=3"],
        ["trainer.callbacks+=ModelSummary", "trainer.callbacks.max_depth=3"],
        ["--trainer.callbacks=ModelSummary", "--trainer.callbacks.max_depth=3"],
        ["--trainer.callbacks+=ModelSummary", "--trainer.callbacks.init_args.max_depth=3"],
        ["--trainer.callbacks", "ModelSummary", "--trainer.callbacks.max_depth", "3"],
        ["--trainer.callbacks+", "ModelSummary", "--trainer.callbacks.max_depth", "3"],
        ['trainer.callbacks={"class_path": "ModelSummary", "init_args": {"max_depth": 3}}'],
        ['trainer.callbacks+={"class_path": "ModelSummary", "init_args": {"max_depth": 3}}'],
        ["trainer.callbacks=[{class_path: ModelSummary, init_args: {max_depth: 3}}]"],
        ["trainer.callbacks+=[{class_path: lightning.pytorch.callbacks.ModelSummary, init_args: {max_depth: 3}}]"],
    ],
    ids=str,
)
def test_every_spelling_adds(argv, read):
    callbacks = read(*argv)
    assert list(callbacks) == [*OLD, "ModelSummary"]
    assert callbacks["EarlyStopping"]["patience"] == 7
    assert callbacks["ModelSummary"]["max_depth"] == 3


def test_the_same_class_is_replaced(read):
    callbacks = read("trainer.callbacks=Timer", "trainer.callbacks+=EarlyStopping", "trainer.callbacks.monitor=val/acc")
    assert list(callbacks) == [*OLD, "Timer"]
    assert callbacks["EarlyStopping"]["monitor"] == "val/acc"
    assert callbacks["EarlyStopping"]["patience"] == 3  # the class's own: a new entry in the old one's place


def test_a_key_below_changes_the_entry_that_has_it(read):
    callbacks = read("trainer.callbacks.patience=2", "trainer.callbacks.init_args.log_momentum=true")
    assert list(callbacks) == OLD
    assert (callbacks["EarlyStopping"]["patience"], callbacks["EarlyStopping"]["monitor"]) == (2, "val/loss")
    assert callbacks["LearningRateMonitor"]["log_momentum"] is True


@pytest.mark.parametrize("value", ["null", "[]"])
def test_null_empties(value, read):
    assert read(f"trainer.callbacks={value}") == {}
    assert list(read(f"trainer.callbacks={value}", "trainer.callbacks+=Timer")) == ["Timer"]
    assert read("trainer.callbacks+=Timer", f"trainer.callbacks={value}") == {}


def test_a_file_adds_to_its_parent(read, tmp_path):
    entries = "[Timer, {class_path: LearningRateMonitor, init_args: {log_momentum: true}}]"
    (tmp_path / "child.yaml").write_text(f"parent: own.yaml\ntrainer: {{callbacks: {entries}}}\n")
    callbacks = read(task="child.yaml")
    assert list(callbacks) == [*OLD, "Timer"]
    assert callbacks["LearningRateMonitor"]["log_momentum"] is True


def test_loggers_and_plugins(read):
    argv = ["trainer.logger=CSVLogger", "trainer.logger.save_dir=a", "trainer.logger+=TensorBoardLogger"]
    argv += ["trainer.logger.save_dir=b", "trainer.plugins+=LightningEnvironment", "trainer.plugins+=TorchCheckpointIO"]
    assert {name: args["save_dir"] for name, args in read(*argv, key="logger").items()} == {
        "CSVLogger": "a", "TensorBoardLogger": "b",
    }  # fmt: skip
    assert list(read(*argv, key="plugins")) == ["LightningEnvironment", "TorchCheckpointIO"]


def test_loggers_by_name(read, capsys, tmp_path):
    def loggers(*argv):
        main([f"task={tmp_path / 'own.yaml'}", *argv, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)["logger"]

    assert loggers("logger+=csv") == "tensorboard,csv"
    assert loggers("logger=csv") == "csv"
    assert loggers("logger=none", "logger+=csv", "logger+=wandb,csv") == "csv,wandb"
    assert loggers("logger+=wandb", "logger=csv") == "csv"


def test_what_cannot_be_added_to():
    with pytest.raises(ConfigError, match=r"data.batch_size\+=3: \+= adds to"):
        read_lists(["--data.batch_size+=3"])


def test_no_entry_has_the_key(read, capsys):
    with pytest.raises(SystemExit):
        read("trainer.callbacks.max_depth=3")
    error = capsys.readouterr().err
    assert (
        "trainer.callbacks.max_depth=3: none of its entries (EarlyStopping, LearningRateMonitor) has max_depth" in error
    )


def test_the_nearest_key_is_named(read, capsys):
    with pytest.raises(SystemExit):
        read("trainer.callbacks.pateince=3")
    assert "LearningRateMonitor) has pateince (nearest: patience)" in capsys.readouterr().err


def test_merging_is_by_class_and_only_for_objects():
    def lists(*names):
        return {"trainer": {"callbacks": list(names), "devices": list(names)}}

    merged = compose.merge(lists("a.A", "B"), lists("x.y.A", "C"))
    assert merged["trainer"] == {"callbacks": ["x.y.A", "B", "C"], "devices": ["x.y.A", "C"]}
    assert compose.merge(lists("A"), {"trainer": {"callbacks": None}})["trainer"]["callbacks"] is None
    assert compose.merge({"trainer": {"logger": False}}, {"trainer": {"logger": ["A"]}})["trainer"]["logger"] == ["A"]


def test_a_resumed_run_keeps_its_callbacks(tmp_path):
    small = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=csv", "model.backbone.dim=16"]
    small += ["model.backbone.expand_ratio=4", "model.backbone.depth=1", "model.backbone.glu_width=8"]
    first = [*small, "trainer.callbacks=EarlyStopping", "trainer.callbacks.monitor=val/loss", "trainer.max_steps=1"]
    status, out = launch(tmp_path, "task=vision", *first)
    assert status == 0, out
    more = [
        "trainer.max_steps=2",
        "trainer.callbacks.patience=9",
        "trainer.callbacks+=ModelSummary",
        "logger+=tensorboard",
    ]
    status, out = launch(tmp_path, "task=vision", "resume=auto", *more)
    assert status == 0, out
    (path,) = tmp_path.glob("runs/vision/*/config.yaml")
    saved = yaml.safe_load(path.read_text())
    callbacks = {entry["class_path"].rpartition(".")[2]: entry["init_args"] for entry in saved["trainer"]["callbacks"]}
    assert list(callbacks) == ["EarlyStopping", "ModelSummary"]
    assert callbacks["EarlyStopping"]["patience"] == 9
    assert saved["logger"] == "csv,tensorboard"
