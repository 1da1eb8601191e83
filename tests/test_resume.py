"""A killed and resumed run repeats every loss and every weight of the uninterrupted run, to the bit."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from launch import REPO, Launched, launch
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
    "lra": [
        "data.batch_size=8",
        "data.eval_batch_size=8",
        "data.train_size=96",
        "data.eval_size=16",
        "data.max_length=16",
        "data.max_depth=3",
    ],
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
# validations inside accumulations: a best.ckpt of that moment is no point to continue from
INSIDE = [
    "trainer.max_steps=4",
    "trainer.accumulate_grad_batches=8",
    "trainer.val_check_interval=10",
    "checkpoint.every_n_steps=100",
]
KILLS = {
    "lm, by steps, workers": ("lm", BY_STEPS + WORKERS, dict(at=10, where="backward")),
    "lm, by epochs, accumulation": ("lm", BY_EPOCHS + ACCUMULATE, dict(at=11, where="start")),
    "vision, by steps, accumulation, workers": ("vision", BY_STEPS + ACCUMULATE + WORKERS, dict(at=23, where="end")),
    "vision, by epochs": ("vision", BY_EPOCHS, dict(at=13, where="backward")),
    "vision, by epochs, after one": ("vision", BY_EPOCHS, dict(at=14, where="start")),
    "vision, by epochs, validation within": (
        "vision",
        [*BY_EPOCHS, "trainer.val_check_interval=0.5", *ACCUMULATE],
        dict(at=9, where="end"),
    ),
    "vision, averaged weights": (
        "vision",
        [*BY_STEPS, "trainer.callbacks=EMAWeightAveraging"],
        dict(at=10, where="end"),
    ),
    "vision, after a validation inside an accumulation": ("vision", INSIDE, dict(at=12, where="start")),
    "lra, in a validation inside an accumulation": ("lra", INSIDE, dict(at=1, where="val")),
    "lra, after one inside the first accumulation": (
        "lra",
        [*INSIDE, "trainer.val_check_interval=5"],
        dict(at=6, where="start"),
    ),
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
    own = [f"data.path={corpus}"] if task == "lm" else []
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


@pytest.mark.parametrize(
    ("extra", "shorter"), [(BY_STEPS, "trainer.max_steps=10"), (BY_EPOCHS, "trainer.max_epochs=2")]
)
def test_a_finished_run_goes_on_as_if_it_had_been_longer(extra, shorter, tmp_path, tmp_path_factory, corpus):
    extra = [*extra, "model.optim.total_steps=20"]
    expected = straight(tmp_path_factory, "lra", extra, corpus)
    status, out = launch(tmp_path, *flags("lra", [*extra, shorter], corpus, tmp_path / "losses"))
    assert status == 0, out
    status, out = launch(tmp_path, *flags("lra", extra, corpus, tmp_path / "losses"), "resume=auto")
    assert status == 0, out
    assert read(tmp_path / "losses") == read(expected / "losses")
    lines = len((tmp_path / "losses").read_text().splitlines())
    assert lines == len(read(tmp_path / "losses"))  # nothing was done twice


@pytest.mark.parametrize("task", SMALL)
def test_sigterm_saves_and_resumes(task, tmp_path, tmp_path_factory, corpus):
    extra = BY_STEPS + ACCUMULATE if task == "lm" else BY_STEPS
    expected = straight(tmp_path_factory, task, extra, corpus)
    record = tmp_path / "losses"
    status, out = launch(tmp_path, *flags(task, extra, corpus, record, at=6, where="start", send="SIGTERM"))
    assert status == 143, out
    assert "SIGTERM: stopped after optimizer step" in out
    assert "checkpoints/last.ckpt" in out
    # the step in flight is finished, accumulation included, and nothing after it has begun
    assert max(read(record)) == (7 if task == "lm" else 6)
    assert last_checkpoint(tmp_path, task)["global_step"] == (4 if task == "lm" else 7)
    status, out = launch(
        tmp_path, *flags(task, extra, corpus, record, at=1, where="val", send="SIGTERM"), "resume=auto"
    )
    assert status == 143, out  # during a validation, with last.ckpt from just before it
    assert max(read(record)) == 9
    status, out = launch(tmp_path, *flags(task, extra, corpus, record), "resume=auto")
    assert status == 0, out
    compare(task, expected, tmp_path)


@pytest.mark.parametrize(("send", "ends"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143), ("SIGHUP", 143)])
def test_a_signal_to_the_whole_group_spares_the_data_workers(send, ends, tmp_path, tmp_path_factory, corpus):
    extra = BY_STEPS + ACCUMULATE + WORKERS
    expected = straight(tmp_path_factory, "vision", extra, corpus)
    record, stop = tmp_path / "losses", dict(at=6, where="start", send=send, group="true")
    began = time.monotonic()
    status, out = launch(tmp_path, *flags("vision", extra, corpus, record, **stop))
    assert status == ends, out
    assert f"{send}: stopped after optimizer step 4" in out
    assert time.monotonic() - began < 60
    status, out = launch(tmp_path, *flags("vision", extra, corpus, record), "resume=auto")
    assert status == 0, out
    compare("vision", expected, tmp_path)


def test_sigterm_before_training_leaves_no_run(tmp_path):
    running = Launched(tmp_path, "task=lm", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
    time.sleep(0.3)
    os.kill(running.process.pid, signal.SIGTERM)
    status, out = running.wait()
    assert status in (143, -signal.SIGTERM), out  # the second: before any of our code ran
    assert not list(tmp_path.glob("runs/lm/*/checkpoints"))


def test_second_sigterm_exits_at_once(tmp_path, corpus):
    extra = [*BY_STEPS, "trainer.max_steps=100000"]
    running = Launched(tmp_path, *flags("lm", extra, corpus, tmp_path / "losses", at=5, where="end", send="SIGSTOP"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "losses").exists() or max(read(tmp_path / "losses")) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(running.process.pid, signal.SIGTERM)
    os.kill(running.process.pid, signal.SIGINT)  # not the same signal, which would merge while stopped
    os.kill(running.process.pid, signal.SIGCONT)
    status, _ = running.wait(20)
    assert status in (130, 143)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, corpus):
    record = tmp_path / "losses"
    status, out = launch(tmp_path, *flags("lra", BY_STEPS, corpus, record, at=6, where="start", send="SIGINT"))
    assert status == 130, out
    assert "SIGINT: stopped after optimizer step 7" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("extra", [[], ["trainer.log_every_n_steps=50", "checkpoint.every_n_steps=3"]])
def test_nan_stops_and_keeps_the_last_good_checkpoint(extra, tmp_path, corpus):
    settings = [*BY_STEPS, *extra]
    status, out = launch(tmp_path, *flags("lra", settings, corpus, tmp_path / "losses", poison=7))
    assert status == 1, out
    assert "Traceback" not in out
    assert "the loss is not finite (NaN or inf) at optimizer step 8" in out
    step = 6 if extra else 5
    assert f"last.ckpt (step {step})" in out
    (run,) = (tmp_path / "runs/lra").iterdir()
    for path in (run / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())
    status, out = launch(tmp_path, *flags("lra", settings, corpus, tmp_path / "again"), "resume=auto")
    assert status == 0, out
    assert min(read(tmp_path / "again")) == step


def test_tensorboard_shows_no_step_twice(tmp_path, corpus):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record, extra = tmp_path / "losses", [*BY_STEPS, "logger=tensorboard,csv"]
    status, out = launch(tmp_path, *flags("lra", extra, corpus, record, at=11, where="end"))
    assert status == -signal.SIGKILL, out
    status, out = launch(tmp_path, *flags("lra", extra, corpus, record), "resume=auto")
    assert status == 0, out
    (run,) = (tmp_path / "runs/lra").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    for tag in ("train/loss", "val/loss"):
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    assert [event.step for event in events.Scalars("train/loss")] == list(range(17))
    with next(run.glob("csv/metrics.csv")).open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(17))


@pytest.mark.parametrize(
    ("every", "extra"),
    [(12, []), (5, []), (7, BY_EPOCHS), (7, [*BY_EPOCHS, "trainer.check_val_every_n_epoch=2"]), (6, BY_EPOCHS)],
)
def test_lightnings_own_checkpoints_resume_exactly(every, extra, tmp_path, corpus):
    """Written in the middle of a batch's hooks: also at an epoch's last batch, also where a validation follows."""
    argv = flags("lra", [*BY_STEPS, "trainer.max_steps=26", *extra], corpus, tmp_path / "losses")
    saved = tmp_path / "saved"
    settings = f"dirpath: {saved}, every_n_train_steps: {every}, save_top_k: -1"
    hook = f"{{class_path: ModelCheckpoint, init_args: {{{settings}}}}}"
    both = argv[-1][:-1] + f", {hook}]"
    status, out = launch(tmp_path, *argv[:-1], both)
    assert status == 0, out
    file = min(saved.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    before = len((tmp_path / "losses").read_text().splitlines())
    status, out = launch(tmp_path, *argv, f"ckpt_path={file}")
    assert status == 0, out
    rows = (tmp_path / "losses").read_text().splitlines()[before:]
    everything = read(tmp_path / "losses")  # raises where a loss was not repeated
    step = torch.load(file, weights_only=True)["global_step"]
    assert [int(row.split()[0]) for row in rows] == list(range(step, len(everything)))


def command(cwd, *argv, env=None):
    """train.py itself, as a person starts it: Lightning starts its children by running the same command again."""
    paths = os.pathsep.join([str(REPO / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


TWO = ["trainer.devices=2", "trainer.strategy=ddp", "data.eval_batch_size=2"]  # validates the samples of one rank's 4


def samples(path):
    """position -> the samples that all ranks saw there together."""
    seen: dict[int, set[str]] = {}
    for part in [path] if path.exists() else sorted(path.parent.glob(path.name + ".*")):
        for position, row in read(part).items():
            seen.setdefault(position, set()).update(row[-1].split(","))
    return seen


@pytest.mark.ddp
def test_resume_on_two_ranks_sees_the_same_samples(tmp_path, tmp_path_factory, corpus):
    extra = BY_STEPS + ACCUMULATE
    expected = straight(tmp_path_factory, "lm", extra, corpus)
    status, out = launch(tmp_path, *flags("lm", extra, corpus, tmp_path / "one", at=10, where="end"))
    assert status == -signal.SIGKILL, out
    stop = flags("lm", extra + TWO, corpus, tmp_path / "two", at=16, where="end", send="SIGTERM")
    status, out = command(tmp_path, *stop, "resume=auto")
    assert status == 143, out
    assert out.count("SIGTERM: stopped after optimizer step 9") == 1
    assert out.count("run folder:") == 2, out  # at start and at the end, by rank 0
    status, out = command(tmp_path, *flags("lm", extra + TWO, corpus, tmp_path / "two"), "resume=auto")
    assert status == 0, out
    (run,) = (tmp_path / "runs/lm").iterdir()
    assert {path.name for path in run.glob("checkpoints/*")} == {"last.ckpt", "best.ckpt"}
    together = samples(tmp_path / "one") | samples(tmp_path / "two")
    assert together == samples(expected / "losses")
