"""Mistakes in settings, and what the system lacks, are one line with status 2; bugs keep their traceback."""

import os
import signal
import socket
from functools import partial

import pytest
import torch
from in_process import VISION, fit_once, refused, run

from tasks.cli.refusals import refusal

SLURM = {"SLURM_JOB_NAME": "job", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("argv", "environment", "fragment"),
    [
        ([], SLURM | {"SLURM_NTASKS": "2"}, "--ntasks-per-node=2"),
        ([], SLURM | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, "the 2 processes that SLURM starts"),
        ([], SLURM | {"SLURM_NTASKS": "x"}, "'x'"),
        ([], TORCHRUN | {"WORLD_SIZE": "2"}, "the 2 processes that torchrun starts"),
        (["trainer.devices=3"], TORCHRUN | {"WORLD_SIZE": "2"}, "devices=3"),
        (["trainer.strategy=ddp"], TORCHRUN | {"WORLD_SIZE": "1", "LOCAL_RANK": ""}, "''"),
        (["trainer.strategy=ddp"], {"MASTER_PORT": "99999"}, "99999"),
        (["trainer.plugins=SLURMEnvironment"], {}, "environment variable SLURM_NTASKS is missing"),
        (["trainer.plugins=MPIEnvironment"], {}, "mpi4py"),
        (["trainer.strategy=xla"], {}, "torch_xla"),
        (["trainer.precision=transformer-engine"], {}, "transformer_engine"),
        (["trainer.devices=-1"], {}, "devices"),
        (["trainer.devices=[0,1]"], {}, "devices"),
        (["model.backbone.dim=1048576"], {}, "lower data.batch_size"),
    ],
)
def test_before_the_first_step(argv, environment, fragment, tmp_path, monkeypatch, capsys):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert fragment in refused(capsys, *VISION, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(tmp_path, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "EADDRINUSE" in refused(capsys, *VISION, "trainer.strategy=ddp")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    profiler = ["trainer.profiler=SimpleProfiler", "trainer.profiler.dirpath=file", "trainer.profiler.filename=x"]
    assert "dirpath=file cannot be written" in refused(capsys, *VISION, *profiler)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_of_a_run_that_has_steps(command, tmp_path, monkeypatch, capsys):
    """Restored steps are not steps of this process."""
    run_folder = fit_once(tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert "--ntasks-per-node=2" in refused(capsys, command, *VISION, f"run={run_folder}")
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("MASTER_PORT", "99999")  # refused later, when the processes meet
    assert "99999" in refused(capsys, command, *VISION, f"run={run_folder}", "trainer.strategy=ddp")


def test_a_lack_of_memory_later_keeps_the_run(tmp_path, monkeypatch, capsys):
    from tasks.vision.module import VisionTask

    compute = VisionTask.compute

    def too_much(self, batch):
        if self.trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 3. ...")
        return compute(self, batch)

    monkeypatch.setattr(VisionTask, "compute", too_much)
    message = refused(capsys, *VISION, "trainer.max_steps=4")
    assert message == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB (lower data.batch_size, or choose a smaller model)\n"
    )
    assert len(list(tmp_path.glob("runs/vision/*"))) == 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, KeyError, AttributeError])
def test_a_bug_of_ours_keeps_its_traceback(kind, tmp_path, monkeypatch):
    from tasks.vision.module import VisionTask

    def broken(self, batch):
        raise kind("a bug")

    monkeypatch.setattr(VisionTask, "compute", broken)
    with pytest.raises(kind, match="a bug"):
        run(*VISION)
    assert list(tmp_path.iterdir()) == []


def in_data_workers(monkeypatch, act):
    """`act` takes the place of reading a sample, but not in the main process, which looks at one itself."""
    from tasks.dataset import KeyedDataset

    read = KeyedDataset._get
    in_worker = torch.utils.data.get_worker_info
    monkeypatch.setattr(KeyedDataset, "_get", lambda self, key: act() if in_worker() else read(self, key))


def test_so_does_one_in_a_data_worker(monkeypatch):
    in_data_workers(monkeypatch, lambda: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        run(*VISION, "data.num_workers=1")


def test_a_data_worker_that_is_killed(tmp_path, monkeypatch, capsys):
    in_data_workers(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert "DataLoader worker" in refused(capsys, *VISION, "data.num_workers=1")
    assert list(tmp_path.iterdir()) == []


def test_a_data_worker_that_cannot_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fork", partial(os.read, -1, 1))  # an OSError without a file's name
    assert "[Errno 9]" in refused(capsys, *VISION, "data.num_workers=1")
    assert list(tmp_path.iterdir()) == []


def test_what_a_persons_own_code_raises_is_theirs():
    def theirs():
        os.stat("/nowhere/file")

    with pytest.raises(OSError, match="nowhere") as raised:
        theirs()
    assert refusal(raised.value, stepped=False) is None
