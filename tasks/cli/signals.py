"""The signals that ask a run to stop, from its first moment: nothing here waits for torch to be imported.

SIGTERM and Ctrl-C are demands. What batch systems send before a job's time is up (SIGUSR1, SIGUSR2, SIGXCPU) and what a
closing terminal sends (SIGHUP) are warnings: they stop a run as SIGTERM does and end it with SIGTERM's status, so that
whatever requeues on 143 does so after each of them, but they never cut short the step that is being finished.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEMANDS = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP)


def status(signum: int) -> int:
    """The exit status of a run that a signal has stopped."""
    return 128 + (signal.SIGTERM if signum in WARNINGS else signum)


class Leave(SystemExit):
    """Ends the program with a status and one message for the person."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message
        self.result: Any = None  # of a run that had nothing left to do, for Python


class Signals:
    """Remembered while training (``deferred``), obeyed at once elsewhere and where a second demand comes."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self.many = False  # one of several ranks
        self.children: list[subprocess.Popen] = []  # ranks that this process launched
        self._pid = os.getpid()
        self._demanded: float | None = None  # when the first demand came

    @contextmanager
    def installed(self) -> Iterator["Signals"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # A warning that is ignored at start (nohup) stays ignored.
        heard = [*DEMANDS, *(signum for signum in WARNINGS if signal.getsignal(signum) != signal.SIG_IGN)]
        before = {signum: signal.signal(signum, self._handle) for signum in heard}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a child forked from us, before it has handlers of its own
        first_demand = signum in DEMANDS and self._demanded is None
        if first_demand:
            self._demanded = time.monotonic()
        if self.received is None:
            self.received = signum
            if not self.deferred:
                raise Leave(status(signum))
        if first_demand or signum in WARNINGS:
            return
        # Launchers pass a signal on that also reached us directly: one signal, not two.
        if self.many and time.monotonic() - self._demanded < 0.3:
            return
        for child in self.children:
            child.kill()
        os._exit(status(signum))

    def end_children(self, orderly: bool) -> None:
        """Waits for the launched ranks; those that should not or will not end are killed."""
        for child in self.children:
            if not orderly:
                child.kill()
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.kill()
        self.children = []


def outlive_signals(worker_id: int) -> None:
    """For data workers (``worker_init_fn``): they end when their parent tells them to, or ends, and not before.

    A signal to the whole group (Ctrl-C, ``timeout``, SLURM) must not take the data away from the step that the trainer
    is about to finish.
    """
    for signum in (signal.SIGINT, *WARNINGS):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
