"""The demos of the README through the real command line: shortened here, at full length with `make demo`."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
TRAIN = REPO / "train.py"
RESULTS = REPO / "benchmarks" / "results" / "demo.json"

# task: (metric of the test split, target, True if larger is better, minutes on 2 cores)
TARGETS = {
    "vision": ("test/acc", 0.97, True, 3),
    "lm": ("test/bpb", 2.5, False, 6),
    "lra": ("test/acc", None, True, 6),  # twice the majority class
}


def train(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(TRAIN), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def read_results(output: str) -> dict[str, float]:
    """The metrics in the table that `test` prints."""
    return {name: float(value) for name, value in re.findall(r"(test/\w+)\s+│\s+([\d.e+-]+)", output)}


def record(task: str, report: dict) -> None:
    """Keep a demo's figures with what they were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=False
    )
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    report |= {
        "device": f"{model[1] if model else platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
        "command": f"python train.py task={task} && python train.py test task={task} ckpt_path=best (make demo)",
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {task: report}, indent=2) + "\n")
    sys.stdout.write(json.dumps({task: report}) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", TARGETS)
def test_the_demo_reaches_its_target_in_time(task, tmp_path):
    metric, target, larger, minutes = TARGETS[task]
    start = time.monotonic()
    train(tmp_path, f"task={task}")
    elapsed = time.monotonic() - start
    results = read_results(train(tmp_path, "test", f"task={task}", "ckpt_path=best"))
    if target is None:
        target = 2 * results["test/majority_acc"]
    report = {"minutes": round(elapsed / 60, 2), "limit": minutes, metric: round(results[metric], 4)}
    record(task, report | {"target": round(target, 4)})
    assert results[metric] >= target if larger else results[metric] <= target
    assert elapsed <= minutes * 60


SHORT = {
    "vision": ("trainer.max_steps=120 trainer.val_check_interval=60", "test/acc", 0.3, True),
    "lm": (
        "trainer.max_steps=60 trainer.val_check_interval=30 trainer.limit_val_batches=2 data.seq_len=128",
        "test/bpb",
        4.0,
        False,
    ),
    "lra": (
        "trainer.max_steps=100 trainer.val_check_interval=50 data.train_size=6400 data.eval_size=500",
        "test/acc",
        0.2,
        True,
    ),
}


@pytest.mark.parametrize("task", SHORT)
def test_a_short_demo_learns(task, tmp_path):
    options, metric, target, larger = SHORT[task]
    train(tmp_path, f"task={task}", *options.split())
    evaluation = [*options.split(), "ckpt_path=best"]
    if task == "lm":
        evaluation.append("trainer.limit_test_batches=4")
    results = read_results(train(tmp_path, "test", f"task={task}", *evaluation))
    assert results[metric] >= target if larger else results[metric] <= target
