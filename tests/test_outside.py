"""A person's own tasks and data, and runs from Python: everything else is as for ours."""

import sys
import threading

import pytest
import torch
import yaml

from hgrn2 import ConfigError
from tasks import run
from tasks.cli import main
from tasks.cli.python import nested

OWN = '''
import torch
from torch import nn
from hgrn2 import HGRN2Backbone, HGRN2Config
from tasks.base import ClassificationTask
from tasks.data import TaskData
from tasks.optim import OptimConfig


class Steps:
    """Rows of numbers; the label is where the largest stands.

    Args:
        length: numbers in a row.
    """

    def __init__(self, split, length: int = 6):
        self.info = {"num_classes": length}
        generator = torch.Generator().manual_seed(len(split))
        self.rows = torch.randn(32, length, generator=generator)

    def __len__(self):
        return 32

    def get(self, index, rng):
        return {"x": self.rows[index], "label": int(self.rows[index].argmax())}

    def fingerprint(self):
        return f"steps {self.rows.shape}"


class Own(ClassificationTask):
    """Classification.

    Args:
        width: of the projection.
    """

    def __init__(
        self,
        backbone: HGRN2Config = HGRN2Config(dim=8, depth=1, expand_ratio=4),
        optim: OptimConfig = OptimConfig(),
        seed: int = 0,
        num_classes: int | None = None,
        width: int = 3,
    ):
        super().__init__(backbone, optim, seed, num_classes, 0.0)
        self.model = nn.Sequential(nn.Linear(1, 8), HGRN2Backbone(self.backbone_config), nn.Linear(8, num_classes))

    def logits(self, batch):
        return self.model(batch["x"][..., None])[:, -1]


class OwnData(TaskData):
    datasets = {"steps": Steps}

    def __init__(self, flag: bool = False, **settings):
        super().__init__(**settings)


class NoTask:
    pass
'''
YAML = """
model: {class_path: own_task.Own, init_args: {width: 4}}
data: {dataset: "own_task:Steps", batch_size: 8}
trainer: {max_steps: 4, val_check_interval: 2, check_val_every_n_epoch: null, accelerator: cpu}
logger: csv
progress: {style: lines}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with own_task.py and mine.yaml; another is the current one."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own_task.py").write_text(OWN)
    (folder / "mine.yaml").write_text(YAML)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("own_task", None)
    return folder


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    return error


def test_a_task_from_outside_runs_resumes_and_is_tested(own, capsys):
    task = str(own / "mine.yaml")
    result = run("fit", task=task)
    assert result.folder.parent.as_posix() == "runs/mine"
    assert {"val/loss", "val/acc"} <= result.metrics.keys()
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert "domain" not in config
    assert config["model"]["class_path"] == "own_task.Own"
    assert config["model"]["init_args"]["num_classes"] == 6
    assert config["model"]["init_args"]["width"] == 4
    assert config["data"]["length"] == 6
    more = run("fit", task=task, resume="auto", **{"trainer.max_steps": 6})
    assert more.folder == result.folder
    assert torch.load(more.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
    tested = run("test", task=task)
    assert "test/acc" in tested.metrics
    again = run("fit", task=str(result.folder / "config.yaml"), **{"trainer.max_steps": 2})  # its record is a task file
    assert again.folder.parent == result.folder.parent
    loaded = sys.modules["own_task"].Own.load_from_checkpoint(result.checkpoint, weights_only=True)
    assert loaded.hparams["width"] == 4


def test_a_run_brings_the_data_set_that_was_typed_for_it(own, monkeypatch, capsys):
    """A resume and a test need not repeat it, and may change its options."""
    monkeypatch.chdir(own)
    small = {
        "model.backbone": {"dim": 16, "depth": 1, "expand_ratio": 4},
        "trainer.accelerator": "cpu",
        "logger": "csv",
    }
    steps = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "progress.style": "lines", "data.batch_size": 8}
    (own / "own_tokens.py").write_text(
        "from own_task import Steps\n\n\nclass Tokens(Steps):\n"
        "    def __init__(self, split, high: int = 5):\n"
        "        super().__init__(split)\n"
        "        self.info, self.high = {'vocab_size': high, 'num_classes': 6}, high\n\n"
        "    def get(self, index, rng):\n"
        "        return {'tokens': [index % self.high] * 4, 'label': index % 6}\n"
    )
    result = run(task="lra", **small, **steps, **{"data.dataset": "own_tokens:Tokens", "data.high": 4})
    main(["test", "task=lra", "trainer.accelerator=cpu"])
    main(["task=lra", "resume=auto", "trainer.max_steps=3", "data.high=4"])
    assert torch.load(result.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert "data.hihg: unknown key. Nearest: data.high" in refused(capsys, "task=lra", "resume=auto", "data.hihg=3")
    (result.folder / "checkpoints" / "last.ckpt").unlink()
    (result.folder / "checkpoints" / "best.ckpt").unlink()
    other = ["data.dataset=listops", "data.train_size=64", "data.eval_size=10", "data.batch_size=8"]
    main(["task=lra", "resume=auto", "trainer.fast_dev_run=1", *other])
    assert "is another experiment (data.dataset=own_tokens:Tokens there" in capsys.readouterr().out


def test_another_data_set_drops_the_options_of_the_one_before(own, capsys):
    (own / "child.yaml").write_text("parent: lm\ndata: {dataset: 'own_task:Steps', length: 9}\n")
    main([f"task={own / 'child.yaml'}", "--print_config"])  # lm.yaml's seq_len is not for it
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["length"] == 9
    assert data["batch_size"] == 16  # every data set's
    assert "seq_len" not in data
    main([f"task={own / 'child.yaml'}", "data.dataset=python", "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["seq_len"] == 256
    assert "length" not in data
    (own / "child.yaml").write_text("parent: lm\ndata: {dataset: 'own_task:Steps', lenght: 9}\n")
    assert "data.lenght: unknown key. Nearest: data.length" in refused(capsys, f"task={own / 'child.yaml'}")


def test_its_settings_are_settings(own, capsys):
    task = f"task={own / 'mine.yaml'}"
    main([task, "--help"])
    out = capsys.readouterr().out
    for text in ("model.width=4", "of the projection", "data.length=6", "numbers in a row", "model.backbone.dim=8"):
        assert text in out
    assert "model.width=many: expected int" in refused(capsys, task, "model.width=many")
    assert "Nearest: model.width" in refused(capsys, task, "model.widht=3")
    assert "data.lenght: unknown key. Nearest: data.length" in refused(capsys, task, "data.lenght=3")
    main([task, "--model.init_args.width=7", "seed=3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["width"] == 7
    assert printed["model"]["init_args"]["seed"] == printed["data"]["seed"] == 3


def test_own_data_for_our_model_and_by_the_command_line(own, capsys, monkeypatch):
    monkeypatch.chdir(own)
    main(["task=lra", "data.class_path=own_task.OwnData", "data.flag=true", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["class_path"] == "own_task.OwnData"
    assert printed["data"]["init_args"]["flag"] is True
    assert printed["data"]["init_args"]["length"] == 6
    assert "train_size" not in printed["data"]["init_args"]
    assert printed["domain"] == "lra"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {class_path: own_task.NoTask}",
            "model.class_path=own_task.NoTask: must be a subclass of tasks.base.Task",
        ),
        ("model: {class_path: own_task.Owl}", "has no class Owl; classes there: "),
        ("model: {class_path: own_tusk.Own}", "no module own_tusk"),
        ("model: {class_path: own_task.Own}", "data.dataset: a value is missing"),
        ("data: {class_path: own_task.OwnData}", "needs 'parent: NAME', 'domain: lm|vision|lra' or model.class_path"),
        ("domain: sound", "domain=sound: must be one of lm, vision, lra"),
    ],
)
def test_mistakes_are_one_line(own, capsys, text, message):
    (own / "mine.yaml").write_text(text)
    assert message in refused(capsys, f"task={own / 'mine.yaml'}")


def test_a_typed_value_is_checked_and_a_vocabulary_may_be_larger(own, capsys):
    small = ["model.backbone.dim=16", "model.backbone.expand_ratio=4", "trainer.fast_dev_run=1", "data.train_size=64"]
    argv = ["task=lra", *small, "data.eval_size=10", "trainer.accelerator=cpu", "progress.style=lines"]
    message = "model.num_classes=9 does not fit data.dataset=listops, which needs num_classes=10"
    assert message in refused(capsys, *argv, "model.num_classes=9")
    assert "model.vocab_size=16 does not fit" in refused(capsys, *argv, "model.vocab_size=16")
    main([*argv, "model.vocab_size=24"])


def test_old_names_are_read_with_one_line(own, capsys, caplog):
    with caplog.at_level("INFO"):
        main(["task=lra", "data.task=listops", "--print_config"])
        main(["task=lm", f"--data.source={own}", "--print_config"])
    _, second = capsys.readouterr().out.split("seed: 0\n", 1)
    assert f"path: {own}" in second
    said = [record.getMessage() for record in caplog.records]
    assert said == ["data.task is called data.dataset now", "data.source is called data.path now"]


# -- from Python -----------------------------------------------------------------------------------------------------


def test_settings_by_dots_and_by_dicts():
    given = nested({"trainer": {"max_steps": 5, "a.b": 1}, "trainer.a": {"c": 2}, "model.x": None})
    assert given == {"trainer": {"max_steps": 5, "a": {"b": 1, "c": 2}}, "model": {"x": None}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "lram"}, "task=lram: no such task"),
        ({"task": None}, "task=None: expected a name. Tasks: lm"),
        ({"command": "tset", "task": "lra"}, "tset: expected one of fit.*did you mean test"),
        ({"task": "lra", "trainer": {"max_step": 3}}, "trainer.max_step: unknown key. Nearest: trainer.max_steps"),
        ({"task": "lra", "trainer.max_steps": "many"}, "trainer.max_steps=many: expected int"),
        ({"task": "lra", "trainer.max_steps": object()}, "trainer.max_steps: a object cannot be kept"),
        ({"task": "lra", "data": {"batch_size": 0}}, "data.batch_size=0 must be at least 1"),
        ({"task": "lra", "resume": "yes"}, "resume=yes"),
        ({"task": "lra", "trainer..x": 1}, "trainer..x: expected a setting's name"),
    ],
)
def test_mistakes_raise(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(**arguments)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_and_another_thread(own, capsys):
    """A notebook's cells may run outside the main thread, where no signal handler can be installed."""
    results = []
    task = str(own / "mine.yaml")
    thread = threading.Thread(target=lambda: results.append(run(task=task)))
    thread.start()
    thread.join()
    (first,) = results
    assert first.checkpoint.name == "best.ckpt"
    done = run(task=task, resume="auto")  # nothing left to do
    assert "already at 4 of 4" in capsys.readouterr().out
    assert done.folder == first.folder
    assert done.metrics == {}
    predicted = run("predict", task=task)
    assert sum(len(batch["preds"]) for batch in predicted.predictions) == 32


def test_a_loss_that_is_not_finite_raises(own):
    with pytest.raises(RuntimeError, match="the loss is not finite"):
        run(task=str(own / "mine.yaml"), **{"model.optim.lr": 1e30, "trainer.gradient_clip_val": None})
