"""Runs the command line in this very process, which saves its start; what the Trainer sets globally is put back."""

import os
from pathlib import Path

import pytest
import torch

from tasks.cli import main

VISION = [
    "task=vision",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "model.backbone.dim=16",
    "model.backbone.depth=1",
    "model.backbone.expand_ratio=4",
    "model.backbone.glu_width=8",
    "model.optim.warmup_steps=0",
    "data.batch_size=256",
]


def run(*argv: str) -> None:
    environment = dict(os.environ)  # Lightning adds ranks and ports for its children
    try:
        main(list(argv))
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.set_default_dtype(torch.float32)
        torch.autograd.set_detect_anomaly(False)


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    lines = [line for line in error.splitlines(keepends=True) if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    assert len(lines[0]) < 400
    return lines[0]


def fit_once(folder: Path, *argv: str) -> Path:
    """The run folder of a fit below the current folder, which is `folder`."""
    run(*VISION, *argv)
    (made,) = folder.glob("runs/vision/*")
    return made
