"""Which exceptions are words about a person's settings, and which are bugs that need their traceback.

Before the first step of this process, what Lightning, torch or the system raise by themselves (no frame of ours or of a
person's own callback in between) is about settings: devices, ports, precision, folders, the batch system. So is memory
that does not suffice, and a file that cannot be read or written, whoever asked for it.
"""

import os
import re
import sysconfig
from pathlib import Path
from types import TracebackType

from lightning.pytorch.utilities.exceptions import MisconfigurationException

import hgrn2
import tasks

ABOUT_SETTINGS = (
    MisconfigurationException,
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    ImportError,
    KeyError,
    AssertionError,
)
OURS = tuple(Path(package.__file__).parent for package in (hgrn2, tasks))
CLI = Path(__file__).parent
STARTERS = tuple(CLI / name for name in ("execute.py", "build.py", "settings.py"))  # what calls Lightning
OS = ("<frozen os>", os.__file__)
STDLIB = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


def refusal(error: BaseException, stepped: bool) -> str | None:
    """One line for the person where an exception is about settings, else None.

    Args:
        error: what came out of building or running the Trainer
        stepped: whether this process has taken a step (or evaluated a batch); after that, only what Lightning itself
            calls a misconfiguration, and a lack of memory, is not a bug
    """
    text = _one_line(error)
    if isinstance(error, RuntimeError | MemoryError) and OUT_OF_MEMORY.search(text):
        return f"{_beginning(text)} (lower data.batch_size, or choose a smaller model)"
    files = _files(error.__traceback__)
    if not stepped and all(_is_ours(file) or _is_library(file) for file in files):
        if isinstance(error, OSError):
            return f"{error.filename}: {error.strerror}" if error.filename else text
        if text.startswith("DataLoader worker"):  # killed, or without shared memory
            return text
    if text.startswith("Caught ") or not all(map(_is_library, files)):  # torch says so where a data worker raised
        return None
    if stepped:
        known = isinstance(error, MisconfigurationException) or "lightning/pytorch/callbacks/" in files[-1]
    else:
        known = isinstance(error, ABOUT_SETTINGS)
    if isinstance(error, KeyError) and known:  # torchrun and srun set what Lightning reads
        return f"the environment variable {error.args[0]} is missing" if files[-1] in OS else None
    return text if known else None


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    # jsonargparse's, among its reasons against every class that was not meant
    if made := re.search(r"Problem with given class_path '(.*?)':\s*(.*?)(?=\n\s*- |\Z)", text, re.DOTALL):
        text = f"{made[1].rpartition('.')[2]}: {made[2]}"
    return " ".join(text.split()) or type(error).__name__


def _beginning(text: str) -> str:
    """What was asked for: CPU's text begins in its source code, CUDA's goes on about its allocator for lines."""
    return ". ".join(re.sub(r"^.*(?=DefaultCPUAllocator)", "", text).split(". ")[:2]).rstrip(".")


def _files(trace: TracebackType | None) -> list[str]:
    """The files that an exception came through, without those of ours that call Lightning to build and run."""
    files = []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return [*(file for file in files[:-1] if Path(file) not in STARTERS), *files[-1:]]


def _is_ours(file: str) -> bool:
    return any(folder in Path(file).parents for folder in OURS)


def _is_library(file: str) -> bool:
    """Of an installed package or of Python itself."""
    if _is_ours(file):
        return False  # also where we are installed
    return file.startswith(("<frozen", *STDLIB)) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
