"""The command line: ``python train.py [fit|validate|test|predict] task=NAME key=value ...``.

One path through this file: ``main`` -> ``execute`` -> ``TaskCLI`` (configuration, objects, run folder) -> Trainer.
"""

import os
import sys
import time

from hgrn2.config import ConfigError
from tasks.cli import compose
from tasks.cli.arguments import read_request
from tasks.cli.help import overview, version
from tasks.cli.signals import Leave, Signals
from tasks.cli.text import message, write_anything


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A person's mistake ends with one message on stderr and status 2, a bug with a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    write_anything()
    with Signals().installed() as signals:
        try:
            _main(argv, signals)
        except ConfigError as error:
            _wait_for_rank_0()
            sys.stderr.write(f"error: {message(error)}\n")
            sys.exit(2)
        except Leave as leave:
            if leave.message:
                sys.stderr.write(f"{leave.message}\n")
            sys.exit(leave.code)


def _main(argv: list[str], signals: Signals) -> None:
    request = read_request(argv)
    if request.version:
        sys.stdout.write(version())
        return
    if request.help and not request.task:
        sys.stdout.write(overview())
        return
    if not request.task:
        raise ConfigError(f"task=NAME is missing. Tasks: {', '.join(compose.shipped_tasks())} (--help says more)")
    compose.load_task(request.task)  # a mistake in the task's name is answered before the slow imports

    from tasks.cli.execute import execute  # lightning: seconds

    execute(request, signals)


def _wait_for_rank_0() -> None:
    """The same mistake on rank 0 is reported there, and ends us before we repeat it."""
    rank = next((int(os.environ[k]) for k in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if os.environ.get(k)), 0)
    if rank:
        time.sleep(10)
