"""A run's record is written once nothing can refuse the command any more: a refused command changes no byte."""

import hashlib
import shutil

import pytest
import torch
import yaml

from tasks.cli import main
from tasks.vision.module import VisionTask

TINY = [
    "task=vision",
    "logger=tensorboard,csv",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "model.optim.warmup_steps=0",
    "model.backbone.dim=16",
    "model.backbone.depth=1",
    "model.backbone.expand_ratio=4",
    "model.backbone.glu_width=8",
]


def fit(*argv):
    """A command line in this process; returns its status."""
    try:
        main([*TINY, *argv])
    except SystemExit as leave:
        return leave.code
    except ValueError:  # Lightning's refusal in its own words
        return 2
    return 0


def checksums(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished run of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert fit(f"run_root={folder / 'runs'}") == 0
    return folder


@pytest.fixture
def root(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


REFUSED = {
    "model": ["model.backbone.dim=32"],
    "model and data": ["model.num_classes=9"],
    "kernel": ["model.backbone.impl=triton"],
    "monitor": ["checkpoint.monitor=val/los"],
    "a callback's monitor": ["trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/los}}]"],
    "nothing to do": ["trainer.max_epochs=0"],
    "Lightning, epochs too short": ["trainer.val_check_interval=1000", "trainer.check_val_every_n_epoch=1"],
    "Lightning, strategy": ["trainer.strategy=foo"],
    "Lightning, clipping": ["trainer.gradient_clip_algorithm=x"],
    "logger": ["logger=nope"],
    "type": ["trainer.max_steps=many"],
    "key": ["trainer.max_step=6"],
}
FRESH = ["model and data", "kernel", "monitor", "Lightning, epochs too short", "Lightning, strategy", "nothing to do"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_resume_changes_no_byte(name, trained):
    root = trained / "runs"
    (run,) = (root / "vision").iterdir()
    before = checksums(root)
    assert fit(f"run_root={root}", f"run={run}", "trainer.max_steps=6", *REFUSED[name]) == 2
    assert checksums(root) == before


def test_after_a_refusal_the_run_is_as_usable_as_it_was(root):
    (run,) = (root / "vision").iterdir()
    assert fit(f"run_root={root}", f"run={run}", "trainer.max_steps=6", "data.batch_size=32") == 2
    assert fit(f"run_root={root}", f"run={run}", "trainer.max_steps=6") == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 6


@pytest.mark.parametrize("name", FRESH)
def test_a_refused_new_run_leaves_nothing(name, trained):
    root = trained / "runs"
    before = checksums(root)
    assert fit(f"run_root={root}", *REFUSED[name]) == 2
    assert checksums(root) == before
    assert len(list((root / "vision").iterdir())) == 1


def test_a_resume_that_fails_in_its_first_step_keeps_the_settings(root, monkeypatch):
    """What does not fit into memory, say: the next resume starts from what is known to work."""
    (run,) = (root / "vision").iterdir()
    before = (run / "config.yaml").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(VisionTask, "training_step", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            fit(f"run_root={root}", f"run={run}", "trainer.max_steps=6", "trainer.precision=bf16-mixed")
    assert (run / "config.yaml").read_bytes() == before
    assert fit(f"run_root={root}", f"run={run}", "trainer.max_steps=6", "trainer.precision=bf16-mixed") == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


def test_a_finished_run_that_is_resumed_stays_as_it_is(root):
    before = checksums(root)
    assert fit(f"run_root={root}", "ckpt_path=last") == 0
    assert checksums(root) == before
