"""The command line: ``python train.py [fit|validate|test|predict] task=NAME key=value ...``.

One path through this file: ``main`` -> ``execute`` -> ``TaskCLI`` (configuration, objects, run folder) -> Trainer.
"""

import os
import sys
import time

from hgrn2.config import ConfigError
from tasks import compose
from tasks.arguments import overview, read_request


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A person's mistake ends with one message on stderr and status 2, a bug with a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        request = read_request(argv)
        if request.help and request.task is None:
            sys.stdout.write(overview())
            return
        if request.task is None:
            raise ConfigError(f"task=NAME is missing. Tasks: {', '.join(compose.shipped_tasks())} (--help says more)")
        compose.load_task(request.task)  # a mistake in the task's name is answered before the slow imports
    except ConfigError as error:
        _fail(error)

    from tasks.execute import execute  # lightning and torch: seconds

    try:
        code = execute(request)
    except ConfigError as error:
        _fail(error)
    if code:
        sys.exit(code)


def _fail(error: ConfigError) -> None:
    rank = next((int(os.environ[k]) for k in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if os.environ.get(k)), 0)
    if rank:
        time.sleep(3)  # the same mistake on rank 0 is reported there, and ends us before we repeat it
    sys.stderr.write(f"error: {error}\n")
    sys.exit(2)
