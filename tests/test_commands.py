"""Every command that README.md, docs/ and --help show is run, with tiny settings after its own; or is listed here."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from in_process import run
from launch import REPO
from PIL import Image

import tasks
from tasks.cli.compose import merge
from tasks.cli.help import OVERVIEW
from tasks.cli.python import nested
from tasks.cli.python import run as real

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
PROGRAMS = ("python", "hgrn2", "make", "tensorboard", "torchrun", "pip", "bash", "pytest")
# pattern: why it is not run here, and what is checked in its place
SKIPPED = {
    r"NAME|\[fit\|": "a synopsis",
    r"^pip install": "installing is the first thing that .ci/run does",
    r"^tensorboard --logdir runs$": "a server",
    r"^make [a-z-]+$": "hours, or everything; its target exists",
    r"^bash \.ci/run$": "runs these tests; the file exists",
    r"^pytest -m ": "needs a GPU, or hours",
    r"^python benchmarks/": "needs a GPU, or an idle machine; the script exists",
    r"^torchrun|trainer\.devices=[2-9]|trainer\.strategy=ddp": "several processes: test_resume.py, test_ddp.py",
    r"trainer\.accelerator=(gpu|cuda)": "needs a GPU",
}
SMALL = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "logger=csv", "model.backbone.dim=16"]
SMALL += ["model.backbone.expand_ratio=4", "model.backbone.depth=1", "model.backbone.glu_width=8"]
SMALL += ["trainer.val_check_interval=2", *(f"trainer.limit_{kind}_batches=1" for kind in ("val", "test", "predict"))]
DATA = {
    "lm": ["data.seq_len=32", "data.batch_size=4", "data.eval_batch_size=4", "model.sample_tokens=2"],
    "vision": ["data.batch_size=32"],
    "lra": ["data.train_size=64", "data.eval_size=16", "data.batch_size=16"],
}


def commands(text: str) -> list[str]:
    """The commands of a page: lines of its shell blocks, indented lines of --help, and code in the running text."""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^  (\S.*?)(?:   .*)?$", rest, re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    parts = [part.strip() for line in lines for part in re.sub(r"\s#.*", "", line).split("&&")]
    return [part for part in parts if part.split(" ")[0] in PROGRAMS and " " in part]


def shown() -> dict[str, str]:
    """Every command -> the page that has it first."""
    found: dict[str, str] = {}
    for name, text in [("--help", OVERVIEW), *((str(p.relative_to(REPO)), p.read_text()) for p in PAGES)]:
        for command in commands(text):
            found.setdefault(command, name)
    return found


SHOWN = shown()
REASONS = {command: next((why for p, why in SKIPPED.items() if re.search(p, command)), None) for command in SHOWN}
RUN = [command for command, reason in REASONS.items() if reason is None]


def test_commands_are_found():
    text = "a `make lint` b\n```bash\npython train.py \\\n  task=x  # why\npip x && make y\n```\n"
    text += "```python\nmake = 1\n```\n"
    assert commands(text) == ["python train.py    task=x", "pip x", "make y", "make lint"]
    assert len(RUN) > 12
    assert SHOWN["python train.py test task=vision"] == "--help"


@pytest.mark.parametrize("command", [command for command, reason in REASONS.items() if reason])
def test_what_is_not_run_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        if word.endswith((".py", "/run")):
            assert (REPO / word).is_file()


def small(task: str, folder: Path) -> list[str]:
    corpus = [f"data.path={folder / 'code'}"] if task == "lm" else []
    return [*SMALL, *DATA[task], *corpus]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of each demo, the task files that the pages show, the examples, and some code and images."""
    folder = tmp_path_factory.mktemp("trained")
    for page in PAGES:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if name := re.match(r"# (\w+\.yaml)", block):
                (folder / name[1]).write_text(block)
    shutil.copytree(REPO / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "my.yaml").write_text("parent: vision\n")
    (folder / "code").mkdir()
    for i in range(150):
        (folder / "code" / f"module_{i}.py").write_text(f"x = {i}\n" * 100)
        image = folder / "images" / "ab"[i % 2] / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (i, i, i)).save(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for task in DATA:
            run(f"task={task}", *small(task, folder), "trainer.max_steps=2")
    return folder


def domain(task: str, folder: Path) -> str:
    if task in DATA:
        return task
    return domain(re.search(r"^(?:parent|domain): (\S+)", (folder / task).read_text(), re.MULTILINE)[1], folder)


@pytest.mark.parametrize("command", RUN)
def test_shown_commands_run(command, trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    program, *words = shlex.split(command)
    if program == "python":
        assert words.pop(0) == "train.py", f"neither run nor listed in SKIPPED: {command}"
    else:
        assert program == "hgrn2", f"neither run nor listed in SKIPPED: {command}"
    task = next((word.removeprefix("task=") for word in words if word.startswith("task=")), None)
    if task is not None:
        runs = folder / "runs" / Path(task).stem
        words = [word.replace("TIMESTAMP", (runs.is_dir() and next(runs.iterdir()).name) or "") for word in words]
        continues = any(word.startswith(("resume=", "run=", "ckpt_path=")) for word in words)
        typed = {word.partition("=")[0].removeprefix("--") for word in words}
        # another data set has options of its own
        data = ["data.batch_size=16"] if "data.dataset" in typed else DATA[domain(task, folder)]
        # what a command is about stays: its own data, and the model where it has to fit another
        tiny = [
            word
            for word in [*SMALL, *data]
            if not word.startswith(("data.", "logger")) or word.partition("=")[0] not in typed
        ]
        words += tiny + [f"trainer.max_steps={3 if continues else 2}"]
    before = len(list(folder.glob("runs/*/*")))
    run(*words)
    out = capsys.readouterr().out
    fits = task is not None and not {"--help", "--print_config", "validate", "test", "predict"} & set(words)
    if fits:
        assert "run folder: " in out
        assert list(folder.glob("runs/*/*/checkpoints/last.ckpt"))
    assert len(list(folder.glob("runs/*/*"))) - before == (fits and not continues)
    assert out


PYTHON = {
    f"{page.stem}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
}


@pytest.mark.parametrize("name", PYTHON)
def test_shown_python_runs(name, trained, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    text = PYTHON[name]
    for task in DATA:
        text = text.replace(f"runs/{task}/TIMESTAMP", next((folder / "runs" / task).iterdir()).as_posix())

    def tiny(command, *, task, **overrides):
        own = SMALL + DATA[task] if command == "fit" else SMALL[:3]
        settings = dict(word.split("=", 1) for word in own) | {"trainer.limit_test_batches": 1, "data.path": "code"}
        given = nested(overrides)
        if command == "fit":
            given = merge(given, {"trainer": {"max_steps": 2}})
        return real(command, task=task, **merge(nested(settings), given))

    monkeypatch.setattr(tasks, "run", tiny, raising=False)
    exec(compile(text, name, "exec"), {"__name__": "shown"})
