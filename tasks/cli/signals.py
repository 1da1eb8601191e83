"""SIGTERM and Ctrl-C, from the first moment of a run: nothing here waits for torch to be imported."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Leave(SystemExit):
    """Ends the program with a status and one message for the person."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.message = message


class Signals:
    """SIGTERM and SIGINT: remembered while training (``deferred``), obeyed at once elsewhere and the second time."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.deferred = False
        self.many = False  # one of several ranks
        self.children: list[subprocess.Popen] = []  # ranks that this process launched
        self._pid = os.getpid()
        self._when = 0.0

    @contextmanager
    def installed(self) -> Iterator["Signals"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a child forked from us, before it has handlers of its own
        if self.received is None:
            self.received, self._when = signum, time.monotonic()
            if not self.deferred:
                raise Leave(128 + signum)
            return
        # Launchers pass a signal on that also reached us directly: one signal, not two.
        if self.many and time.monotonic() - self._when < 0.3:
            return
        for child in self.children:
            child.kill()
        os._exit(128 + signum)

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
