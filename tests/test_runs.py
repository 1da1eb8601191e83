"""Run folders and the choice of a checkpoint, on small files: nothing is trained here."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hgrn2.config import ConfigError
from tasks.cli import choice, runs

OLD, MIDDLE, NEW = "2026-01-01_00-00-00", "2026-01-02_00-00-00", "2026-01-02_00-00-00-2"


def save(path, step=1, **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {"state_dict": {"w": torch.zeros(2)}, "global_step": step, "loops": {}, "optimizer_states": []}
    contents |= {"inexact": ""} | extra
    torch.save(contents, path)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def root(tmp_path):
    """Two runs with checkpoints and a newer one that was killed before its first."""
    for name in (OLD, MIDDLE):
        for kind in ("last", "best"):
            save(tmp_path / "runs" / "lm" / name / "checkpoints" / f"{kind}.ckpt")
        (tmp_path / "runs" / "lm" / name / "config.yaml").write_text("domain: lm\n")
    (tmp_path / "runs" / "lm" / NEW / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "lm" / "wikitext103" / OLD).mkdir(parents=True)  # another task's folder, not a run of lm
    return tmp_path / "runs"


def choose(root, command="fit", task="lm", ckpt_path=None, run=None, resume=None):
    return choice.choose(command, task, root, ckpt_path, run, resume)


def test_new_runs_never_collide(tmp_path, monkeypatch):
    made = [runs.new_run(tmp_path, "lm/big") for _ in range(20)]
    assert len(set(made)) == 20
    assert all(path.is_dir() and path.parent == tmp_path / "lm" / "big" for path in made)

    at(monkeypatch, 2026, 1, 1)
    same = [runs.new_run(tmp_path, "x") for _ in range(12)]
    assert [path.name for path in same[:3]] == [OLD, f"{OLD}-1", f"{OLD}-2"]
    assert runs.runs_of(tmp_path, "x") == same[::-1]


def at(monkeypatch, *when):
    class Frozen(runs.datetime):
        @classmethod
        def now(cls):
            return cls(*when)

    monkeypatch.setattr(runs, "datetime", Frozen)


def test_a_new_run_is_the_newest_whatever_the_clock_says(tmp_path, monkeypatch):
    at(monkeypatch, 2026, 1, 2)
    first, second = runs.new_run(tmp_path, "x"), runs.new_run(tmp_path, "x")
    at(monkeypatch, 2026, 1, 1)  # the clock went back
    assert runs.new_run(tmp_path, "x").name == f"{MIDDLE}-2"
    first.rmdir()
    assert [path.name for path in (runs.new_run(tmp_path, "x"), second)] == [f"{MIDDLE}-3", f"{MIDDLE}-1"]


def test_runs_of_earlier_versions_are_found_and_sorted(tmp_path, monkeypatch):
    """They were named to the microsecond."""
    names = [f"{OLD}.000001", f"{OLD}.000001-2", f"{OLD}.000001-10", f"{OLD}.500000", OLD, f"{MIDDLE}.000000"]
    for name in names[::-1]:
        (tmp_path / "x" / name).mkdir(parents=True)
    assert [path.name for path in runs.runs_of(tmp_path, "x")] == names[::-1]
    at(monkeypatch, 2026, 1, 2)
    assert runs.runs_of(tmp_path, "x")[0] != runs.new_run(tmp_path, "x") == runs.runs_of(tmp_path, "x")[0]


def test_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run_root="):
        runs.new_run(tmp_path / "file", "lm")


def test_discard_removes_only_what_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = runs.new_run(Path("runs"), "lm/big"), runs.new_run(Path("runs"), "lm")
    runs.discard(first)
    assert not Path("runs/lm/big").exists()
    assert second.is_dir()
    runs.discard(second)
    assert not Path("runs").exists()


def test_fit_starts_fresh_unless_asked(root):
    assert choose(root) == choice.Choice()


@pytest.fixture
def unstarted(root):
    return root / "lm" / NEW


@pytest.fixture
def newest(root, unstarted):
    """The newest run has checkpoints."""
    unstarted.joinpath("checkpoints").rmdir()
    unstarted.rmdir()
    return root / "lm" / MIDDLE


def test_last_is_of_the_newest_run(root, newest):
    chosen = choose(root, ckpt_path="last")
    assert chosen.checkpoint == newest / "checkpoints" / "last.ckpt"
    assert chosen.run == newest
    assert chosen.config == newest.absolute() / "config.yaml"
    auto = choose(root, resume="auto")
    assert (auto.checkpoint, auto.run, auto.auto) == (chosen.checkpoint, newest, True)
    assert choose(root, run=MIDDLE, resume="auto") == chosen
    assert choose(root, "test", ckpt_path="last").run is None


def test_an_older_run_is_never_continued_in_place_of_the_newest(root, unstarted):
    chosen = choose(root, resume="auto")
    assert (chosen.checkpoint, chosen.run) == (None, None)  # not even a configuration: nothing to start anew
    assert f"{unstarted} ended before it began: starting a new run" in chosen.note
    (unstarted / "config.yaml").write_text("domain: lm\n")
    chosen = choose(root, resume="auto")
    assert (chosen.checkpoint, chosen.run) == (None, unstarted)
    assert chosen.config == unstarted.absolute() / "config.yaml"
    assert f"{unstarted} has no checkpoint yet: starting it anew" in chosen.note
    for which in ("last", "best"):
        with pytest.raises(ConfigError, match=NEW):
            choose(root, ckpt_path=which)
    evaluated = choose(root, "test", ckpt_path="last")
    assert evaluated.checkpoint.parent.parent.name == MIDDLE
    assert f"{unstarted} has no checkpoint yet" in evaluated.note


@pytest.mark.parametrize("files", [["best.ckpt"], ["last.ckpt", "epoch=0.ckpt"]])
def test_nothing_continues_from_inside_an_accumulation(root, newest, files):
    """Nor from weights alone, nor from a file that says nothing about its state."""
    folder = newest / "checkpoints"
    for path in folder.iterdir():
        path.unlink()
    why = "written inside an accumulation of gradients"
    for name in files:
        save(folder / name, inexact=why)
    chosen = choose(root, resume="auto")
    assert (chosen.checkpoint, chosen.run) == (None, newest)
    assert why in chosen.note
    assert "starting it anew" in chosen.note
    for asked in ({"run": MIDDLE}, {"ckpt_path": "last"}, {"ckpt_path": str(folder / files[0])}):
        with pytest.raises(ConfigError, match=why):
            choose(root, **asked)
    if "best.ckpt" in files:
        with pytest.raises(ConfigError, match=why):
            choose(root, ckpt_path="best")
        assert choose(root, "test", ckpt_path="best").checkpoint == folder / "best.ckpt"
    assert choose(root, "test", ckpt_path="last").checkpoint == folder / files[0]
    exact = save(folder / "epoch=1.ckpt")
    chosen = choose(root, resume="auto")
    assert chosen.checkpoint == exact
    assert (why in chosen.note) == ("last.ckpt" in files)  # which comes first
    truncate(exact)
    with pytest.raises(ConfigError, match="truncated"):  # somebody should look at it first
        choose(root, resume="auto")
    torch.save({"state_dict": {}}, exact)
    assert choose(root, resume="auto").checkpoint is None
    torch.save({"state_dict": {}, "loops": {}, "optimizer_states": []}, exact)
    assert choose(root, resume="auto").checkpoint is None


def test_best_starts_a_new_run(root, newest):
    chosen = choose(root, ckpt_path="best")
    assert chosen.checkpoint.name == "best.ckpt"
    assert chosen.run is None
    (newest / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"has no best\.ckpt"):
        choose(root, ckpt_path="best")


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_takes_the_best_and_says_so(root, newest, command):
    chosen = choose(root, command)
    assert chosen.checkpoint == root / "lm" / MIDDLE / "checkpoints" / "best.ckpt"
    assert "best.ckpt" in chosen.note
    with pytest.raises(ConfigError, match="no run of task=vision"):
        choose(root, command, task="vision")
    chosen.checkpoint.unlink()
    fallback = choose(root, command)
    assert fallback.checkpoint.name == "last.ckpt"
    assert f"no best.ckpt there: {command} uses {fallback.checkpoint}" in fallback.note
    assert choose(root, command, ckpt_path="last").note == ""


def test_run_names_a_run(root):
    for name in (OLD, str(root / "lm" / OLD), f"lm/{OLD}"):
        chosen = choose(root, run=name)
        assert chosen.run.name == OLD
        assert chosen.checkpoint.parent.parent.name == OLD
    assert choose(root, run=OLD, ckpt_path="best").checkpoint.parent.parent.name == OLD
    with pytest.raises(ConfigError, match="run=nope"):
        choose(root, run="nope")
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        choose(root, run=NEW)


def test_resume_auto_starts_fresh_where_there_is_nothing(root, tmp_path):
    chosen = choose(root, task="vision", resume="auto")
    assert chosen.checkpoint is None
    assert "starting a new one" in chosen.note
    with pytest.raises(ConfigError, match="ckpt_path=last: no run of task=vision"):
        choose(root, task="vision", ckpt_path="last")
    with pytest.raises(ConfigError, match="no run of task=lm"):
        choose(tmp_path / "nowhere", ckpt_path="last")


def test_combinations_that_contradict(root):
    with pytest.raises(ConfigError, match=r"resume=auto and ckpt_path=last exclude"):
        choose(root, ckpt_path="last", resume="auto")
    with pytest.raises(ConfigError, match="resume=yes"):
        choose(root, resume="yes")
    with pytest.raises(ConfigError, match="is for fit"):
        choose(root, "test", resume="auto")
    with pytest.raises(ConfigError, match="exclude"):
        choose(root, ckpt_path=str(root / "lm" / OLD / "checkpoints" / "last.ckpt"), run=OLD)


def test_truncated_last_falls_back_and_says_so(root, newest):
    folder = root / "lm" / MIDDLE / "checkpoints"
    truncate(folder / "last.ckpt")
    chosen = choose(root, ckpt_path="last")
    assert chosen.checkpoint == folder / "best.ckpt"
    assert chosen.run == root / "lm" / MIDDLE
    assert "last.ckpt: truncated" in chosen.note
    assert "using best.ckpt instead" in chosen.note
    truncate(folder / "best.ckpt")
    with pytest.raises(ConfigError, match=r"no checkpoint of .* can be loaded"):
        choose(root, resume="auto")


def test_explicit_files(root, tmp_path):
    last = root / "lm" / OLD / "checkpoints" / "last.ckpt"
    assert choose(root, ckpt_path=str(last)).run.samefile(last.parent.parent)
    copied = save(tmp_path / "elsewhere" / "last.ckpt")
    assert choose(root, ckpt_path=str(copied)) == choice.Choice(copied)
    weights = tmp_path / "weights.ckpt"
    torch.save({"state_dict": {}}, weights)
    assert choose(root, "test", ckpt_path=str(weights)).checkpoint == weights
    with pytest.raises(ConfigError, match="weights only"):
        choose(root, ckpt_path=str(weights))


class Foreign:
    """Something that weights_only refuses."""


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "truncated, or not a checkpoint"),
        (b"not a checkpoint at all", "not loaded|truncated"),
        ([1, 2], "no state_dict"),
        ({"model": 1}, "no state_dict"),
        ({"state_dict": {}, "x": Foreign()}, "more than tensors"),
    ],
)
def test_foreign_files_are_one_clear_error(tmp_path, contents, message):
    path = tmp_path / "file.ckpt"
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    with pytest.raises(ConfigError, match=message) as error:
        runs.read_checkpoint(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no such file"):
        runs.read_checkpoint(tmp_path / "missing.ckpt")
    with pytest.raises(ConfigError, match="no such file"):
        runs.read_checkpoint(tmp_path)


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    runs.check_fits(model, {"state_dict": model.state_dict()}, tmp_path)
    with pytest.raises(ConfigError, match=r"0\.weight is \(3, 4\) there and \(3, 2\) here"):
        runs.check_fits(model, {"state_dict": model.state_dict() | {"0.weight": torch.zeros(3, 4)}}, tmp_path)
    with pytest.raises(ConfigError, match=r"x is only there; 0\.bias is only here \(and 3 more\)"):
        runs.check_fits(model, {"state_dict": {"x": torch.zeros(1)}}, tmp_path)


def test_writing_is_atomic(tmp_path):
    path = tmp_path / "folder" / "last.ckpt"
    io = runs.AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
    before = path.read_bytes()

    class Unwritable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        io.save_checkpoint({"state_dict": {"w": torch.zeros(2)}, "bad": Unwritable()}, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["w"], torch.ones(2))


def test_linked_files_are_independent(tmp_path):
    io = runs.AtomicCheckpointIO()
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {}, "step": 1}, best)
    runs.link_atomically(best, last)
    io.save_checkpoint({"state_dict": {}, "step": 2}, last)
    assert io.load_checkpoint(best)["step"] == 1
    assert io.load_checkpoint(last)["step"] == 2
