"""Run folders ``RUN_ROOT/TASK/TIMESTAMP/``: making them, and reading and writing their checkpoints.

A run folder holds config.yaml (resolved), TensorBoard events, checkpoints/last.ckpt and checkpoints/best.ckpt.
"""

import contextlib
import os
import pickle
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import nn

from hgrn2.config import ConfigError
from tasks.plots import printable

# Earlier versions named runs to the microsecond: these folders are still found.
RUN_NAME = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(\.\d{6})?(?:-(\d+))?")


def new_run(root: Path, task: str) -> Path:
    """Makes the folder of a new run, named by the second; a run of the same second gets a suffix.

    Its name always sorts last: where the clock went back (summer time, another node), it is the newest run's second.
    """
    stamp, taken = datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), -1
    for newest in runs_of(root, task)[:1]:
        second, _, _, suffix = _by_age(newest)
        if second >= stamp:
            stamp, taken = second, suffix
    for number in range(taken + 1, taken + 1000):
        folder = root / task / (f"{stamp}-{number}" if number else stamp)
        with contextlib.suppress(FileExistsError):
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                if not isinstance(error, FileExistsError) or not folder.is_dir():
                    raise ConfigError(f"run_root={root}: cannot make a run folder there: {error}") from error
                raise
            return folder
    raise RuntimeError(f"no free name for a run folder near {folder}")


def discard(folder: Path) -> None:
    """Removes the folder of a run that never trained, with parents that it leaves empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in list(folder.parents)[:3]:
        with contextlib.suppress(OSError):  # not empty: other runs live there
            if not parent.samefile(Path.cwd()):
                parent.rmdir()


def runs_of(root: Path, task: str) -> list[Path]:
    """The runs of a task, newest first."""
    folder = root / task
    found = [path for path in folder.iterdir() if RUN_NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_by_age, reverse=True)


def _by_age(run: Path) -> tuple[str, bool, str, int]:
    second, fraction, suffix = RUN_NAME.fullmatch(run.name).groups()
    return second, fraction is None, fraction or "", int(suffix or 0)


def run_around(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint file lies in, if it does."""
    run = checkpoint.absolute().parent.parent
    return run if checkpoint.absolute().parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


class Inexact(ConfigError):
    """A checkpoint that loads, but that no run can continue from as if nothing had happened."""


def read_checkpoint(path: Path, training: bool = False, look: bool = True) -> dict[str, Any]:
    """Opens a checkpoint (``look``: tensors stay on disk); a missing, truncated or foreign file is a ConfigError."""
    if path.is_dir() and (path / ".metadata").is_file():  # sharded by its strategy, which checks it on loading
        rest = path / "meta.pt"
        return _exact(torch.load(rest, map_location="cpu", weights_only=True), path, training) if rest.is_file() else {}
    if not path.is_file():
        raise ConfigError(f"ckpt_path={path}: no such file")
    try:
        mmap = look and printable(str(path)) == str(path)  # torch maps no file whose name is not UTF-8
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: not loaded: it holds more than tensors and plain values, or is damaged") from error
    except Exception as error:  # the unpickler's, on bytes of any kind: IndexError, struct.error, TypeError, ...
        raise ConfigError(f"{path}: truncated, or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"{path}: not a checkpoint of this trainer (it has no state_dict)")
    if training and not {"loops", "optimizer_states"} <= checkpoint.keys():
        raise Inexact(f"{path}: holds weights only, no optimiser state: it can be tested, not resumed")
    return _exact(checkpoint, path, training)


def _exact(checkpoint: dict[str, Any], path: Path, training: bool) -> dict[str, Any]:
    """Refuses to train on from a state that does not resume exactly (see tasks/cli/checkpoints.py)."""
    if training and (why := checkpoint.get("inexact", "not written by this command line, in a state that it knows")):
        raise Inexact(f"{path}: {why}: it can be tested, but no run that continues from it would be the same run")
    return checkpoint


def check_fits(model: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Refuses a checkpoint of another model before anything is made or started."""
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(getattr(value, "shape", ())) for key, value in checkpoint.get("state_dict", ours).items()}
    if ours == theirs:
        return
    other = sorted(key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key])
    parts = [f"{key} is {theirs[key]} there and {ours[key]} here" for key in other]
    parts += [f"{key} is only there" for key in sorted(theirs.keys() - ours.keys())]
    parts += [f"{key} is only here" for key in sorted(ours.keys() - theirs.keys())]
    more = f" (and {len(parts) - 2} more)" if len(parts) > 2 else ""
    raise ConfigError(f"{path}: a checkpoint of another model: {'; '.join(parts[:2])}{more}")


def write_atomically(path: Path, write: Any) -> None:
    """``write(file)`` to a temporary name beside ``path``, then replace: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def link_atomically(source: Path, path: Path) -> None:
    """``path`` becomes another name of ``source`` (a copy where links don't work)."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(path, lambda file: shutil.copyfileobj(source.open("rb"), file))
        return
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's own goes through the system's temporary folder, which is not atomic across file systems."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options is not supported: checkpoints are local files")
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), look=False)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
