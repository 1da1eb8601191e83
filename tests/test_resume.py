"""A killed and resumed run repeats every loss and every weight of the uninterrupted run, to the bit."""

import signal

import pytest
import torch
from launch import launch
from recorder import read, same_state

COMMON = [
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=2",
    "trainer.num_sanity_val_steps=0",
    "model.backbone.depth=2",
    "model.backbone.dim=16",
    "model.backbone.expand_ratio=4",
    "model.backbone.dropout=0.1",
    "model.backbone.drop_path=0.1",
    "model.optim.warmup_steps=2",
]
SMALL = {
    "lm": ["data.seq_len=16", "data.batch_size=4", "checkpoint.monitor=val/loss", "checkpoint.mode=min"],
    "vision": ["data.batch_size=64", "data.eval_batch_size=64"],
    "lra": ["data.batch_size=8", "data.eval_batch_size=8", "data.train_size=96", "data.eval_size=16", "data.max_length=16", "data.max_depth=3"],
}
# by steps, validation every 5 micro-batches counted over epochs: what the shipped tasks do
BY_STEPS = ["trainer.max_steps=17", "trainer.val_check_interval=5", "checkpoint.every_n_steps=4"]
# by epochs of 7 micro-batches, validation at each epoch's end
BY_EPOCHS = [
    "trainer.max_steps=-1",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=7",
    "trainer.val_check_interval=1.0",
    "trainer.check_val_every_n_epoch=1",
    "model.optim.total_steps=20",
    "checkpoint.every_n_steps=3",
]
WORKERS = ["data.num_workers=2"]
ACCUMULATE = ["trainer.accumulate_grad_batches=2"]
KILLS = {
    "lm, by steps, workers": ("lm", BY_STEPS + WORKERS, dict(at=10, where="backward")),
    "lm, by epochs, accumulation": ("lm", BY_EPOCHS + ACCUMULATE, dict(at=11, where="start")),
    "vision, by steps, accumulation, workers": ("vision", BY_STEPS + ACCUMULATE + WORKERS, dict(at=23, where="end")),
    "vision, by epochs": ("vision", BY_EPOCHS, dict(at=13, where="backward")),
    "vision, by epochs, after one": ("vision", BY_EPOCHS, dict(at=14, where="start")),
    "lra, by steps, in validation": ("lra", BY_STEPS, dict(at=1, where="val")),
    "lra, by epochs, in validation": ("lra", BY_EPOCHS, dict(at=0, where="val")),
    "lra, by steps, across an epoch": ("lra", BY_STEPS, dict(at=14, where="start")),
    "lra, by steps, after an epoch's last checkpoint": (
        "lra",
        BY_STEPS + ["checkpoint.every_n_steps=12", "trainer.val_check_interval=100"],
        dict(at=15, where="end"),
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(150):
        (folder / f"module_{i}.py").write_text(f"def function_{i}(x):\n    return x * {i} + {i * i}\n" * 2)
    return folder


def flags(task, extra, corpus, record, **recorder):
    init = "".join(f", {key}: {value}" for key, value in recorder.items())
    own = [f"data.source={corpus}"] if task == "lm" else []
    hook = f'trainer.callbacks=[{{class_path: recorder.Recorder, init_args: {{path: "{record}"{init}}}}}]'
    return [f"task={task}", *COMMON, *SMALL[task], *own, *extra, hook]


def last_checkpoint(folder, task):
    (run,) = (folder / "runs" / task).iterdir()
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


_straight = {}


def straight(tmp_path_factory, task, extra, corpus):
    """The uninterrupted run of the same settings, made once."""
    key = (task, *extra)
    if key not in _straight:
        folder = tmp_path_factory.mktemp("straight")
        status, out = launch(folder, *flags(task, extra, corpus, folder / "losses"))
        assert status == 0, out
        _straight[key] = folder
    return _straight[key]


def compare(task, left, right):
    assert read(left / "losses") == read(right / "losses")
    a, b = last_checkpoint(left, task), last_checkpoint(right, task)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "epoch"):
        if part == "callbacks":
            assert a[part]["Checkpoints"] == b[part]["Checkpoints"]
        elif part == "loops":
            same_state(
                a[part]["fit_loop"]["epoch_loop.batch_progress"], b[part]["fit_loop"]["epoch_loop.batch_progress"]
            )
            same_state(a[part]["fit_loop"]["epoch_progress"], b[part]["fit_loop"]["epoch_progress"])
            same_state(a[part]["fit_loop"]["epoch_loop.state_dict"], b[part]["fit_loop"]["epoch_loop.state_dict"])
        else:
            same_state(a[part], b[part], part)
    columns = [metrics(folder, task) for folder in (left, right)]
    assert columns[0] == columns[1]


def metrics(folder, task):
    """The logged rows that do not depend on the clock."""
    import csv

    (path,) = (folder / "runs" / task).glob("*/csv/metrics.csv")
    rows = []
    for row in csv.DictReader(path.open()):
        kept = {k: v for k, v in row.items() if v and not k.endswith("_per_s")}
        if set(kept) - {"step", "epoch"}:
            rows.append(tuple(sorted(kept.items())))
    return rows


@pytest.mark.parametrize("name", KILLS)
def test_kill_9_and_resume(name, tmp_path, tmp_path_factory, corpus):
    task, extra, kill = KILLS[name]
    expected = straight(tmp_path_factory, task, extra, corpus)
    status, out = launch(tmp_path, *flags(task, extra, corpus, tmp_path / "losses", **kill))
    assert status == -signal.SIGKILL, out
    assert len(read(tmp_path / "losses")) < len(read(expected / "losses"))
    status, out = launch(tmp_path, *flags(task, extra, corpus, tmp_path / "losses"), "resume=auto")
    assert status == 0, out
    compare(task, expected, tmp_path)
