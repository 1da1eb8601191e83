"""Every byte sequence as a file's name, a file, a token or a typed text."""

import csv
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import launch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hgrn2 import ConfigError
from tasks.cli import compose
from tasks.cli.loggers import _ContinuingWriter
from tasks.cli.runs import read_checkpoint
from tasks.lm import python_source
from tasks.lm.python_source import END_OF_FILE, PythonSource, read_sources
from tasks.lra.listops import VOCABULARY, ListOps
from tasks.plots import image_grid, printable
from tasks.vision.imagefolder import ImageFolder

NAMES = st.binary(min_size=1, max_size=30).map(lambda raw: raw.replace(b"\0", b"0").replace(b"/", b"_"))
TEXTS = st.text(st.characters(codec=None), max_size=12) | st.binary(max_size=12).map(os.fsdecode)
BAD = os.fsdecode(b"\xff\xfe$x^$ \x1b\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return os.fsencode(tmp_path_factory.mktemp("names"))


@given(st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=4))
def test_any_name_and_content_of_a_file(folder, files):
    for old in os.listdir(folder):
        os.unlink(os.path.join(folder, old))
    for name, content in files.items():
        with open(os.path.join(folder, name + b".py"), "wb") as file:
            file.write(content)
    splits = [read_sources(Path(os.fsdecode(folder)), split).tobytes() for split in ("train", "val", "test")]
    end = bytes([END_OF_FILE])
    assert sum(map(len, splits)) == sum(len(content) + len(end) for content in files.values())
    assert all(any(content + end in part for part in splits) for content in files.values())


def test_names_that_are_utf8_keep_their_split():
    """A constant of the data set: measured with the names as UTF-8, on any machine."""
    assert [python_source.split_of(name) for name in ("json/decoder.py", "ü.py", "module_7.py", "module_12.py")] == [
        "train", "train", "train", "train",
    ]  # fmt: skip
    assert python_source.split_of("module_4.py") == "train"


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x")

    def fail(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ConfigError, match=r"a\.py: cannot be read: Permission denied"):
        read_sources(tmp_path, python_source.split_of("a.py"))


@given(st.lists(st.integers(-3, 700), max_size=12))
def test_any_tokens_are_text(tokens):
    text = PythonSource.decode(np.array(tokens, dtype=np.int64))
    text.encode()
    if all(0 <= token < 256 for token in tokens):
        assert text == bytes(tokens).decode(errors="replace")
    assert text.count("\ufffd") >= sum(not 0 <= token < 256 for token in tokens)


@given(st.binary(max_size=12))
def test_any_bytes_of_a_prompt_are_its_tokens(raw):
    assert PythonSource.encode(os.fsdecode(raw)).tolist() == list(raw)


@given(TEXTS)
def test_any_text_has_tokens(text):
    tokens = PythonSource.encode(text)
    assert ((tokens >= 0) & (tokens < 256)).all()
    if printable(text) == text:
        assert PythonSource.decode(tokens) == text


@given(st.lists(st.integers(-2, 20), max_size=8))
def test_any_ids_of_an_expression(tokens):
    words = ListOps.decode(np.array(tokens)).split()
    assert len(words) == len([token for token in tokens if token not in (0, 1)])
    assert all(word in VOCABULARY or word.strip("<>").lstrip("-").isdigit() for word in words)


@given(TEXTS)
def test_any_text_in_a_configuration_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    config = {"domain": "lm", "model": {"prompt": text}, "data": {"path": text}, "list": [text]}
    path.write_bytes((compose.heading(text, [text]) + compose.to_yaml(config)).encode())
    assert compose.resolve(compose.read(path)) == config


def test_figures_take_any_class_name():
    figure = image_grid(torch.zeros(3, 1, 4, 4), [("$x^$", True), (BAD, False), ("a\0", True)])
    FigureCanvasAgg(figure).draw()


def test_image_folders_take_any_name(tmp_path):
    for kind in (b"\xff", b"b$^$"):
        for i in range(40):
            path = os.path.join(os.fsencode(tmp_path), kind, b"\xfe%d.png" % i)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.new("L", (9, 9), i).save(os.fsdecode(path))
    data = ImageFolder("train", tmp_path, img_size=8, in_chans=1)
    assert sorted(map(os.fsencode, data.class_names)) == [b"b$^$", b"\xff"]
    assert data.get(0, None)["image"].shape == (1, 8, 8)
    assert data.fingerprint() == ImageFolder("train", tmp_path, img_size=8, in_chans=1).fingerprint()


CHANGES = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 20)), min_size=1, max_size=4)


def damaged(content: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """`content` with bytes put in and left out at some places."""
    for place, new, removed in changes:
        at = int(place * len(content))
        content = content[:at] + new + content[at + removed :]
    return content


def refusal(call, *args, **kwargs) -> str | None:
    """What a ConfigError says, if one is raised."""
    try:
        call(*args, **kwargs)
    except ConfigError as error:
        return str(error)
    return None


@given(st.sampled_from(["zip", "pickle", "none"]), CHANGES, st.booleans())
def test_any_bytes_are_a_checkpoint_or_refused(tmp_path_factory, kind, changes, look):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    contents = {"state_dict": {"w": torch.zeros(3)}, "loops": {}, "list": [1, (2, 3)]}
    if kind == "zip":
        torch.save(contents, path)
    original = {"zip": path.read_bytes, "pickle": lambda: pickle.dumps({"a": [1, {}]}, 2), "none": bytes}[kind]()
    path.write_bytes(damaged(original, changes))
    assert str(path) in (refusal(read_checkpoint, path, look=look) or str(path))


@given(CHANGES)
def test_any_bytes_are_a_configuration_or_refused(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(damaged(b"parent: lm\nx: 2020-01-01\na: &a [1, 0x1f, 1:30]\nb: *a\nc: !!binary aGk=\n", changes))
    message = refusal(lambda: compose.resolve(compose.load_task(str(path))[1]))
    assert "\n" not in (message or "")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["png", "jpeg", "ppm", "tiff", "bmp", "gif"])
@given(changes=CHANGES)
def test_any_bytes_are_an_image_or_refused(tmp_path_factory, kind, changes):
    folder = tmp_path_factory.getbasetemp() / f"images-{kind}"
    if not folder.exists():
        for name in ("a", "b"):
            (folder / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (5, 5), (i, 2, 3)).save(folder / name / f"{i}.png")
    data = ImageFolder("train", folder, img_size=4)
    buffer = io.BytesIO()
    Image.new("RGB", (5, 5), (1, 2, 3)).save(buffer, kind)
    file = Path(data.samples[0][0])
    file.write_bytes(damaged(buffer.getvalue(), changes))
    assert str(file) in (refusal(data.get, 0, None) or str(file))


@given(CHANGES, st.sampled_from([None, 0, 2, 9]))
def test_any_bytes_are_a_metrics_file(tmp_path_factory, changes, purge_step):
    folder = tmp_path_factory.getbasetemp() / "csv"
    folder.mkdir(exist_ok=True)
    path = folder / "metrics.csv"
    path.write_bytes(damaged(b'epoch,step,"a,b"\r\n0,0,1.5\r\n0,1,\r\n1,2,3e-5\r\n', changes))
    _ContinuingWriter(str(folder), purge_step)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(purge_step is None or int(row["step"]) < purge_step for row in rows)


def test_a_metrics_file_is_continued(tmp_path):
    text = 'epoch,step,"a,b"\r\n0,0,1.5\r\n0,1,\r\n'
    (tmp_path / "metrics.csv").write_bytes((text + "1,2,3e-5\r\n1,").encode())  # cut short by a kill
    assert _ContinuingWriter(str(tmp_path), 2).metrics_keys == ["epoch", "step", "a,b"]
    assert (tmp_path / "metrics.csv").read_bytes().decode() == text


def test_a_data_workers_refusal_is_one_line(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.png").write_bytes(b"no image")
    argv = ["data.dataset=imagefolder", f"data.path={tmp_path}", "data.img_size=8", "data.num_workers=1"]
    small = ["model.backbone.dim=16", "model.backbone.expand_ratio=4", "data.batch_size=4", "trainer.accelerator=cpu"]
    status, out = launch(tmp_path, "task=vision", *argv, *small)
    assert status == 2, out
    (line,) = (line for line in out.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {tmp_path}")
    assert "cannot be read as an image" in line


def test_a_run_with_names_that_are_no_utf8(tmp_path):
    """Corpus, task file, run folder and prompt: trained, tested, and continued."""
    corpus = tmp_path / BAD
    corpus.mkdir()
    for i in range(100):
        (corpus / os.fsdecode(b"\xff%d.py" % i)).write_bytes(bytes(range(256)))
    (tmp_path / os.fsdecode(b"own\xff.yaml")).write_text("parent: lm\n")
    small = ["model.backbone.dim=16", "model.backbone.depth=1", "model.backbone.expand_ratio=4", "trainer.max_steps=2"]
    small += ["data.seq_len=16", "data.batch_size=4", "model.sample_tokens=4", "trainer.val_check_interval=2"]
    small += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "model.vocab_size=300", "logger=csv"]
    named = [f"task={os.fsdecode(b'own')}\udcff.yaml", f"data.path={corpus}", f"model.prompt={BAD}", f"run_root=r{BAD}"]
    status, out = launch(tmp_path, "trainer.accelerator=cpu", *small, *named)
    assert status == 0, out
    (run,) = (tmp_path / f"r{BAD}" / "own\udcff").iterdir()
    assert r"test task=own" not in out  # but quoted, for a shell: below
    assert r"python train.py test $'task=own\xff.yaml' $'run=r\xff\xfe$x^$ \x1b\x0a/own\xff/" in out
    for tail in (["test"], ["resume=auto", "trainer.max_steps=3"]):
        status, out = launch(tmp_path, "trainer.accelerator=cpu", named[0], f"run_root=r{BAD}", *tail)
        assert status == 0, out
    saved = compose.resolve(compose.read(run / "config.yaml"))
    assert (saved["data"]["path"], saved["model"]["prompt"]) == (str(corpus), BAD)
    assert compose.task_name(str(run / "config.yaml")) == "own\udcff"
    status, out = launch(tmp_path, "trainer.accelerator=cpu", *small, *named, "logger=tensorboard")
    assert status == 2
    assert "TensorBoard writes to no folder whose name is not UTF-8; try logger=csv" in out


def test_tensorboard_shows_text_that_is_no_utf8(tmp_path):
    (tmp_path / BAD).mkdir()
    for i in range(100):
        (tmp_path / BAD / f"{i}.py").write_bytes(bytes(range(256)))
    small = ["model.backbone.dim=16", "model.backbone.depth=1", "model.backbone.expand_ratio=4", "trainer.max_steps=2"]
    small += ["data.seq_len=16", "data.batch_size=4", "model.sample_tokens=4", "trainer.val_check_interval=2"]
    named = [f"data.path={tmp_path / BAD}", f"model.prompt={BAD}", "trainer.limit_val_batches=1"]
    status, out = launch(tmp_path, "task=lm", "trainer.accelerator=cpu", *small, *named)
    assert status == 0, out
    (run,) = tmp_path.glob("runs/lm/*")
    events = EventAccumulator(str(run), size_guidance={"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("viz/generated/text_summary")
    assert event.tensor_proto.string_val[0].startswith(b"    ")
