"""What a run leaves behind and says: TensorBoard, config.yaml, progress, summaries, results."""

from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from tasks.cli import compose, main

SMALL = [
    "task=vision",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "trainer.limit_val_batches=1",
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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*SMALL, "trainer.max_steps=6", "logger=tensorboard,csv"])
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
    assert set(steps(run, "val/acc_best")) <= {1, 3, 5}
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
        "trainer.limit_val_batches": 1,
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
    assert sorted(kept) == sorted([*nulls, "trainer.check_val_every_n_epoch"])
    (tmp_path / "again.yaml").write_text(first)
    assert yaml.safe_load(saved_config(capsys, f"task={tmp_path / 'again.yaml'}")) == saved
