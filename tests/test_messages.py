"""What a person reads when a command line is wrong, or asks for help: the key, the value, what is valid."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from launch import launch

from hgrn2.config import ConfigError
from tasks.cli import arguments, compose, explain, main
from tasks.cli.help import IMPORTANT
from tasks.cli.text import command, one_line
from tasks.lm.data import LMData

VISION = ["task=vision", "trainer.accelerator=cpu", "model.backbone.dim=16", "model.backbone.expand_ratio=4"]


def refused(capsys, *argv):
    """The message of a command line that is refused before anything runs."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def printed(capsys, *argv):
    """The configuration that --print_config shows."""
    main([*argv, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


# -- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model.backbone.expand_ratio=32"], "model.backbone.expand_ratio=32 must divide model.backbone.dim=16"),
        (["model.backbone.dropout=1.5"], "model.backbone.dropout=1.5 must be in [0, 1)"),
        (["model.optim.lr=-1"], "model.optim.lr=-1.0 must not be negative"),
        (["model.optim.total_steps=5", "model.optim.warmup_steps=5"], "model.optim.total_steps=5 must exceed model."),
        (["trainer.precision=fp16"], "trainer.precision=fp16: did you mean 16-mixed? Valid: "),
        (["trainer.precision=bf16-mixd"], "did you mean bf16-mixed?"),
        (["trainer.precision=float32"], "did you mean 32-true?"),
        (["trainer.callbacks=EarlyStopping"], "trainer.callbacks: EarlyStopping needs monitor (trainer.callbacks.moni"),
        (["trainer.callbacks+=[EarlyStopping]"], "EarlyStopping needs monitor"),
        (["trainer.callbacks=EarlyStoping"], "trainer.callbacks=EarlyStoping: no such class. Nearest: EarlyStopping"),
        (["trainer.callbacks=Timer", "trainer.callbacks.durration=1"], "Timer has no such argument. Nearest: duration"),
        (["trainer.callbacks=ModelSummary", "trainer.callbacks.max_depth=x"], "callbacks.max_depth=x: expected int"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu: "),
        (["trainer.max_time=5"], "trainer.max_time=5: "),
        (["trainer.devices=-5"], "trainer.devices=-5: "),
        (["trainer.profiler=foo"], "trainer.profiler=foo: "),
        (["trainer.limit_val_batches=-1"], "trainer.limit_val_batches=-1"),
        (["trainer.max_steps"], "trainer.max_steps: a value is missing (write trainer.max_steps=VALUE)"),
        (["trainer.max_steps="], "trainer.max_steps=: a value is missing"),
        (["trainer.max_steps=", "3"], "trainer.max_steps=: a value is missing (no space after =)"),
        (["--trainer.max_steps"], "trainer.max_steps: a value is missing"),
        (["--trainer.max_steps", "--seed=3"], "trainer.max_steps: a value is missing"),
        (["--trainer.max_steps", "seed=3"], "trainer.max_steps: a value is missing"),
        (["seed"], "seed: a value is missing"),
        (["trian"], "did you mean fit? (fit is the default)"),
        (["train"], "did you mean fit? (fit is the default)"),
        (["evaluate"], "did you mean test?"),
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5: expected int"),
        (["trainer.max_steps=1e-3"], "expected int"),
        (["trainer.logger=true"], "trainer.logger=true: write logger=NAME, a comma list of tensorboard, csv"),
        (["trainer.logger=true", "logger=csv"], "trainer.logger=true: write logger=NAME"),
        (["trainer.logger=false", "logger=csv"], "trainer.logger=false and logger=csv contradict each other"),
        (["seed+=3"], "seed+=3: += adds to trainer.callbacks"),
        (["trainer=3"], "trainer=3: trainer is a group of settings, each set by trainer.NAME=VALUE"),
        (["model.backbone=tiny"], "model.backbone=tiny: model.backbone is a group of settings"),
        (["run=no\nwhere"], "run=no where: no run folder there"),
        (["run=\udcff\x1b[0m"], r"run=\udcff"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_name_key_and_value(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *VISION, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["task="], ["--task"], ["--task", ""]])
def test_a_task_without_a_name(argv, capsys):
    assert "task" in refused(capsys, *argv)


def test_the_loggers_switch_of_a_file(capsys, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("parent: vision\ntrainer: {logger: true}\n")
    assert "trainer.logger=true: write logger=NAME" in refused(capsys, f"task={own}")
    own.write_text("parent: vision\ntrainer: {logger: false}\n")
    assert "contradict each other" in refused(capsys, f"task={own}", "logger=csv")
    assert printed(capsys, f"task={own}", "logger=csv", "trainer.logger=null")["logger"] == "csv"
    assert printed(capsys, f"task={own}")["trainer"]["logger"] is False


def test_each_precision_is_listed_once(capsys):
    valid = refused(capsys, *VISION, "trainer.precision=fp16").partition("Valid: ")[2].split(", ")
    assert len(valid) == len(set(valid)) > 8
    assert {"16-mixed", "bf16-true", "32"} <= set(valid)


def test_every_name_of_a_precision_leads_to_a_valid_one():
    from lightning.pytorch import Trainer

    hint = Trainer.__init__.__annotations__["precision"]
    assert set(explain.SYNONYMS.values()) <= set(explain.choices(hint))


def test_messages_of_a_dataclass_get_full_keys():
    fields = ["dim", "depth"]
    text = "dim=3 must divide depth=4; other.dim=1 and xdim=2 stay, as does dim"
    assert (
        explain.full_keys(text, fields, "m")
        == "m.dim=3 must divide m.depth=4; other.dim=1 and xdim=2 stay, as does dim"
    )


def test_the_trainers_words_get_their_settings():
    settings = {"max_time": "5", "accelerator": "gpu", "max_steps": 30, "fast_dev_run": True}
    assert (
        explain.by_setting("Timer(duration='5') is bad", settings) == "trainer.max_time=5: Timer(duration='5') is bad"
    )
    assert explain.by_setting("no gpu", settings) == "trainer.accelerator=gpu: no gpu"
    assert explain.by_setting("`max_steps` and `fast_dev_run`", settings).startswith(
        "trainer.max_steps=30, trainer.fast_dev_run=true: "
    )
    assert explain.by_setting("trainer.max_steps=30 is bad", settings) == "trainer.max_steps=30 is bad"
    assert explain.by_setting("something else", settings) == "something else"
    callbacks = {"callbacks": [{"class_path": "a.b.Timer"}, {"class_path": "a.Bar"}]}
    assert explain.by_setting("two `callbacks`", callbacks) == "trainer.callbacks=[Timer,Bar]: two `callbacks`"


def test_whole_numbers_in_another_spelling(capsys, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("parent: vision\ntrainer: {max_steps: 2e3, log_every_n_steps: 5.0}\n")
    read = printed(capsys, f"task={own}", "model.optim.warmup_steps=1e2", "trainer.limit_val_batches=1.0")
    assert (read["trainer"]["max_steps"], read["trainer"]["log_every_n_steps"]) == (2000, 5)
    assert read["model"]["optim"]["warmup_steps"] == 100
    assert isinstance(read["trainer"]["limit_val_batches"], float)  # all of them, not one batch
    read = printed(capsys, "task=vision", "trainer.max_steps=1e3", "--trainer.accumulate_grad_batches", "4.0")
    assert (read["trainer"]["max_steps"], read["trainer"]["accumulate_grad_batches"]) == (1000, 4)
    assert isinstance(read["trainer"]["max_steps"], int)


# -- help ------------------------------------------------------------------------------------------------------------


def test_the_overview_has_a_line_for_each_task(capsys):
    main(["--help"])
    lines = capsys.readouterr().out.partition("\ntasks:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == compose.shipped_tasks()
    assert all(len(line.split()) > 4 for line in lines)


def test_help_of_a_task_marks_what_matters_and_what_is_changed(capsys):
    main(["task=vision", "--help", "data.num_workers=3"])
    top, _, rest = capsys.readouterr().out.partition("\nrun:\n")
    assert tuple(re.findall(r"^  ([\w.]+)=", top, re.MULTILINE)) == IMPORTANT
    assert len(IMPORTANT) == 10
    marks = {key: line[47:48] for line in rest.splitlines() if (key := line[2:].partition("=")[0]) and line[47:48]}
    assert marks["model.backbone.dim"] == marks["data.num_workers"] == marks["trainer.max_steps"] == "*"
    assert marks["model.backbone.bias"] == marks["trainer.max_time"] == " "


def test_version_without_the_slow_imports(tmp_path):
    code = "import sys; from tasks.cli import main; main(['--version']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["hgrn2", "torch", "triton", "lightning", "python"]
    assert lines[1].split()[1].partition("+")[0] == torch.__version__.partition("+")[0]


# -- text that a shell or a terminal gets ----------------------------------------------------------------------------

WORDS = st.binary(max_size=8).map(lambda raw: os.fsdecode(raw.replace(b"\0", b""))) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8
)


@given(st.lists(WORDS, min_size=1, max_size=30))
def test_a_shell_reads_the_same_words(words):
    line = command(*words)
    assert line.isprintable()
    assert one_line(line) == line


def test_bash_reads_the_same_words():
    words = ["a b", "it's", "ü", "\udcff.py", "new\nline", "\t\\", '$x `y` "z"', "", "*", "~", "\x1b[0m", "\ud800"]
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command(*words)}"], capture_output=True, check=True)
    *rest, lone = words
    assert done.stdout.split(b"\0")[:-1] == [*map(os.fsencode, rest), lone.encode("utf-8", "surrogatepass")]


def test_printed_commands_work_with_any_folder(tmp_path):
    root = tmp_path / "my runs"
    small = [
        "model.backbone.glu_width=8",
        "trainer.max_steps=1",
        "trainer.enable_progress_bar=false",
        "logger=tensorboard,csv",
    ]
    status, out = launch(tmp_path, *VISION, *small, f"run_root={root}")
    assert status == 0, out
    (run,) = root.glob("vision/*")
    assert f"python train.py test task=vision 'run={run}'" in out
    assert f"tensorboard --logdir '{root}'" in out
    assert f"# command: {command(*VISION, *small, f'run_root={root}')}\n" in (run / "config.yaml").read_text()


def test_any_command_line_leaves_a_readable_config(tmp_path):
    text = compose.heading("own\udcff\nname", ["model.prompt=a\nb: c", "x=\udcff"]) + compose.to_yaml({"domain": "lm"})
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    assert compose.read(path) == {"domain": "lm"}
    assert compose.task_name(str(path)) == "own\udcff\nname"
    assert compose.heading("vision", ["seed=1"]) == "# task: vision\n# command: seed=1\n"


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["checkpoint.monitor=val/los"], "checkpoint.monitor=val/los is not logged"),
        (["model.optim.warmup_steps=5000"], "model.optim.warmup_steps=5000 must be below the cosine's 1000 steps"),
    ],
)
def test_nothing_announces_a_folder_that_it_then_deletes(argv, message, tmp_path):
    status, out = launch(tmp_path, *VISION, *argv)
    assert status == 2, out
    assert message in out
    assert "run folder" not in out
    assert not (tmp_path / "runs").exists()


def test_a_bug_in_the_first_step_announces_no_folder_either(tmp_path):
    hook = "trainer.callbacks=[{class_path: recorder.Recorder, init_args: {path: /nowhere/losses}}]"
    status, out = launch(tmp_path, *VISION, "model.backbone.glu_width=8", "logger=csv", hook)
    assert status == 1
    assert "FileNotFoundError" in out
    assert ("run folder" in out) == (tmp_path / "runs").exists()


def test_home(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("parent: lm\n")
    argv = ["task=~/own.yaml", "trainer.default_root_dir=~/a", "trainer.callbacks=ModelCheckpoint"]
    argv += [
        "trainer.callbacks.dirpath=~/b",
        "trainer.logger=CSVLogger",
        "trainer.logger.save_dir=~/c",
        "model.prompt=~/d",
    ]
    read = printed(capsys, *argv)
    assert read["trainer"]["default_root_dir"] == f"{tmp_path}/a"
    assert read["trainer"]["callbacks"][0]["init_args"]["dirpath"] == f"{tmp_path}/b"
    assert read["trainer"]["logger"][0]["init_args"]["save_dir"] == f"{tmp_path}/c"
    assert read["model"]["prompt"] == "~/d"  # text
    (tmp_path / "corpus").mkdir()
    assert LMData(path="~/corpus").path == tmp_path / "corpus"
    assert f"{tmp_path}/nowhere.ckpt" in refused(capsys, "task=lm", "ckpt_path=~/nowhere.ckpt")
    assert f"{tmp_path}/root" in refused(capsys, "test", "task=lm", "run_root=~/root")


def test_a_request_knows_flags_from_values():
    request = arguments.read_request(["--version"])
    assert request.version
    assert not arguments.read_request(["task=vision"]).version
    with pytest.raises(ConfigError, match="x: expected key=value"):
        arguments.read_request(["task=vision", "x"])
