"""The examples run, are as short as they promise, and do what they say."""

import runpy
import shutil
import tokenize

import numpy as np
import pytest
import torch
import yaml
from launch import REPO
from PIL import Image

from tasks import run
from tasks.cli import main
from tasks.lm.module import LMTask

EXAMPLES = REPO / "examples"
SMALL = {
    "logger": "csv",
    "trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1},
    "model.backbone": {"dim": 16, "depth": 2, "expand_ratio": 4, "glu_width": 16},
    "data.batch_size": 8,
    "progress.style": "lines",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A copy of the examples as the current folder."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "examples")
    return tmp_path / "examples"


def code_lines(name):
    """Lines that hold code: no blank lines, comments or docstrings."""
    with (EXAMPLES / name).open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.string.strip()]
    skipped = (tokenize.COMMENT, tokenize.ENCODING)
    return len({t.start[0] for t in tokens if t.type not in skipped and not t.string.startswith('"""')})


def saved(result):
    return yaml.safe_load((result.folder / "config.yaml").read_text())


def test_a_sequence_task_of_ones_own():
    assert code_lines("parity.py") <= 25
    result = run("fit", task="lra", **SMALL, **{"data.dataset": "parity:Parity", "data.length": 10, "data.size": 80})
    config = saved(result)
    assert (config["model"]["vocab_size"], config["model"]["num_classes"]) == (2, 2)  # what the data says
    assert config["data"]["length"] == 10
    tested = run("test", task="lra", run=str(result.folder), **{"data.dataset": "parity:Parity"})
    assert tested.metrics["test/loss"] > 0


def test_images_of_ones_own(folder):
    rng = np.random.default_rng(0)
    for i in range(60):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)
    result = run("fit", task="images.yaml", **SMALL)
    config = saved(result)
    assert {key: config["model"][key] for key in ("num_classes", "img_size", "in_chans")} == {
        "num_classes": 2, "img_size": 32, "in_chans": 3,
    }  # fmt: skip


def test_a_mixer_option_of_ones_own():
    result = run("fit", task="head_scale.yaml", **SMALL, **{"data.seq_len": 16})
    config = saved(result)
    assert config["model"]["class_path"] == "head_scale.HeadScaleTask"
    assert config["model"]["init_args"]["backbone"]["norm"] == "rmsnorm"  # of configs/lm.yaml: it is an LMTask still
    from head_scale import HeadScaleTask

    task = HeadScaleTask.load_from_checkpoint(result.checkpoint, weights_only=True, map_location="cpu").eval()
    scales = [block.mixer.head_scale for block in task.model.backbone.blocks]
    assert all(not torch.equal(scale, torch.ones(4)) for scale in scales)  # trained
    with torch.no_grad():
        for scale in scales:
            scale.copy_(torch.rand(4) + 0.5)
        tokens = torch.randint(256, (2, 9))
        state = task.model.backbone.init_state(2)
        steps = torch.stack([task.model.step(tokens[:, t], state) for t in range(9)], 1)
        torch.testing.assert_close(steps, task.model(tokens), rtol=1e-4, atol=1e-4)  # decoding knows it
        for scale in scales:
            scale.fill_(1)
        assert not torch.allclose(task.model(tokens), steps, atol=1e-3)
    settings = dict(task.hparams)
    off = HeadScaleTask(**settings | {"head_scale": False})
    del settings["head_scale"]
    assert off.state_dict().keys() == LMTask(**settings).state_dict().keys()


def test_its_settings_are_listed(capsys):
    main(["task=head_scale.yaml", "--help"])
    out = capsys.readouterr().out
    assert "model.head_scale=true" in out
    assert "scale each head's output by a learnt factor" in out


def test_plain_pytorch():
    assert code_lines("plain_pytorch.py") <= 15
    assert runpy.run_path("plain_pytorch.py")["loss"].item() < 1.4  # from log 8 = 2.08
