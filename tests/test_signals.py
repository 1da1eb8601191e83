"""Signals that ask a run to stop, sent to this very process. test_resume.py sends them to runs that train."""

import os
import signal
from contextlib import contextmanager

import pytest

from tasks.cli import signals
from tasks.cli.signals import Leave, Signals, status

ALL = (*signals.DEMANDS, *signals.WARNINGS)


@pytest.fixture(autouse=True)
def _handlers():
    """Whatever runs the tests, no signal is ignored at first, and all is as before in the end."""
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in ALL}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@contextmanager
def training():
    with Signals().installed() as installed:
        installed.deferred = True
        yield installed


@pytest.fixture
def exits(monkeypatch):
    """The statuses of immediate exits, which do not happen."""
    statuses = []
    monkeypatch.setattr(signals.os, "_exit", statuses.append)
    return statuses


def send(*signums):
    for signum in signums:
        os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", ALL)
def test_before_training_each_ends_the_program(signum):
    with pytest.raises(Leave) as leave, Signals().installed():
        send(signum)
    assert leave.value.code == (130 if signum == signal.SIGINT else 143) == status(signum)


@pytest.mark.parametrize("signum", ALL)
def test_in_training_each_is_remembered(signum, exits):
    with training() as installed:
        send(signum)
    assert installed.received == signum
    assert exits == []


def test_a_second_demand_ends_the_program_at_once(exits):
    with training():
        send(signal.SIGTERM, signal.SIGINT)
    assert exits == [130]


@pytest.mark.parametrize("first", [*signals.WARNINGS, signal.SIGTERM])
def test_a_warning_cuts_nothing_short(first, exits):
    """SLURM sends SIGTERM after its warning, and a service manager SIGHUP after SIGTERM."""
    with training() as installed:
        send(first, signal.SIGHUP, signal.SIGUSR1)
        assert exits == []
        if first != signal.SIGTERM:
            send(signal.SIGTERM)
            assert exits == []
        assert installed.received == first
        send(signal.SIGTERM)
    assert exits == [143]


@pytest.mark.parametrize("signum", signals.WARNINGS)
def test_what_is_ignored_at_start_stays_ignored(signum):
    signal.signal(signum, signal.SIG_IGN)  # as nohup does
    with Signals().installed() as installed:
        send(signum)  # ends the program otherwise
        assert signal.getsignal(signum) == signal.SIG_IGN
    assert installed.received is None
    assert signal.getsignal(signum) == signal.SIG_IGN


def test_data_workers_outlive_all():
    """In a child: its handlers change for good."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            signals.outlive_signals(0)
            send(*ALL)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
