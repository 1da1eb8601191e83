"""Runs the command line in processes of their own, quickly: a server imports torch and the tasks once and forks."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tasks.cli.execute", "recorder"])
REPO = Path(__file__).resolve().parent.parent


def _child(argv: list[str], cwd: str, out: str) -> None:
    os.setsid()  # signals to its process group must not reach the tests
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.chdir(cwd)
    with open(out, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a run of train.py on Linux
    sys.argv = [str(REPO / "train.py"), *argv]
    import torch

    torch.set_num_threads(1)
    from tasks.cli import main

    main(argv)


class Launched:
    """A command line that runs in a process of its own."""

    def __init__(self, cwd: Path, *argv: str) -> None:
        self.out = cwd / f"out-{len(list(cwd.glob('out-*')))}.txt"
        self.process = SERVER.Process(target=_child, args=(list(argv), str(cwd), str(self.out)))
        self.process.start()

    def wait(self, timeout: float = 120) -> tuple[int, str]:
        """(exit status, negative for a signal; everything it wrote)."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
        with contextlib.suppress(FileNotFoundError):
            return self.process.exitcode, self.out.read_text()
        return self.process.exitcode, ""


def launch(cwd: Path, *argv: str) -> tuple[int, str]:
    return Launched(cwd, *argv).wait()
