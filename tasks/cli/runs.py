"""Run folders ``RUN_ROOT/TASK/TIMESTAMP/``: making them, finding the checkpoint that a person means, and its files.

A run folder holds config.yaml (resolved), TensorBoard events, checkpoints/last.ckpt and checkpoints/best.ckpt.
"""

import contextlib
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import nn

from hgrn2.config import ConfigError

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


def read_checkpoint(path: Path, training: bool = False, look: bool = True) -> dict[str, Any]:
    """Opens a checkpoint (``look``: tensors stay on disk); a missing, truncated or foreign file is a ConfigError."""
    if path.is_dir() and (path / ".metadata").is_file():
        return {}  # sharded by its strategy, which checks it on loading
    if not path.is_file():
        raise ConfigError(f"ckpt_path={path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=look)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path}: not loaded: it holds more than tensors and plain values, or is damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: truncated, or not a checkpoint") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ConfigError(f"{path}: not a checkpoint of this trainer (it has no state_dict)")
    if training and not {"loops", "optimizer_states"} <= checkpoint.keys():
        raise ConfigError(f"{path}: holds weights only, no optimiser state: it can be tested, not resumed")
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


@dataclass
class Choice:
    """What a command starts from."""

    checkpoint: Path | None = None  # loaded before the command runs
    run: Path | None = None  # continued by fit; None: a new run folder
    note: str = ""  # said to the person at start

    @property
    def config(self) -> Path | None:
        """The configuration of the run that the checkpoint comes from."""
        run = self.checkpoint and run_around(self.checkpoint)
        return run / "config.yaml" if run else None


def _loadable(run: Path, training: bool) -> tuple[Path | None, str]:
    """The newest checkpoint of a run that loads (last, else the newest other), and what was wrong with newer ones."""
    files = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    problems = []
    for path in sorted(files, key=lambda path: path.name != "last.ckpt"):
        try:
            read_checkpoint(path, training)
            return path, "".join(f"{problem}; using {path.name} instead" for problem in problems)
        except ConfigError as error:
            problems.append(str(error))
    return None, "; ".join(problems)


def choose(command: str, task: str, root: Path, ckpt_path: str | None, run: str | None, resume: str | None) -> Choice:
    """The checkpoint that ``ckpt_path=last|best|PATH``, ``run=PATH`` and ``resume=auto`` mean. Only reads.

    fit without any of them starts fresh; the other commands take ``best`` of the newest run and say so: random weights
    are never evaluated. ``last``, ``run=`` and ``resume=auto`` continue in the run's folder; ``best`` and any other
    file start a new one.
    """
    if resume not in (None, "auto"):
        raise ConfigError(f"resume={resume}: the only value is resume=auto (or name a run: run=PATH)")
    if resume and ckpt_path:
        raise ConfigError(f"resume={resume} and ckpt_path={ckpt_path} exclude each other")
    if resume and command != "fit":
        raise ConfigError(f"resume={resume} is for fit; {command} takes ckpt_path=last|best|PATH")
    if ckpt_path not in (None, "last", "best"):
        return _from_file(command, Path(ckpt_path).expanduser(), run)
    if command == "fit" and not (ckpt_path or run or resume):
        return Choice()

    candidates = [_named_run(root, task, run)] if run else runs_of(root, task)
    started = [path for path in candidates if any((path / "checkpoints").glob("*.ckpt"))]
    if not started:
        if resume and not run:
            return Choice(note=f"no run of task={task} to resume under {root}: starting a new one")
        where = f"run={run} has no checkpoint yet" if run else f"no run of task={task} with a checkpoint under {root}"
        hint = "" if command == "fit" else "; train it first, or give ckpt_path=PATH"
        raise ConfigError(f"{f'ckpt_path={ckpt_path}' if ckpt_path else command}: {where}{hint}")
    chosen = started[0]
    best = chosen / "checkpoints" / "best.ckpt"
    if ckpt_path == "best":
        if not best.is_file():
            raise ConfigError(f"ckpt_path=best: {chosen} has no best.ckpt (no validation has finished); try last")
        read_checkpoint(best, command == "fit")
        return Choice(best)
    if command != "fit" and ckpt_path is None and best.is_file():
        read_checkpoint(best)
        return Choice(best, note=f"no ckpt_path given: {command} uses {best}")
    checkpoint, problem = _loadable(chosen, command == "fit")
    if checkpoint is None:
        raise ConfigError(f"no checkpoint of {chosen} can be loaded: {problem}")
    if command != "fit" and ckpt_path is None:
        problem += f"{'; ' * bool(problem)}no ckpt_path given and no best.ckpt there: {command} uses {checkpoint}"
    return Choice(checkpoint, chosen if command == "fit" else None, problem)


def _from_file(command: str, path: Path, run: str | None) -> Choice:
    if run:
        raise ConfigError(f"run={run} and ckpt_path={path} exclude each other (ckpt_path=last|best goes with run=)")
    read_checkpoint(path, command == "fit")
    continued = run_around(path) if command == "fit" and path.name == "last.ckpt" else None
    return Choice(path, continued)


def _named_run(root: Path, task: str, run: str) -> Path:
    for folder in (Path(run).expanduser(), root / task / run, root / run):
        if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"run={run}: no run folder there (looked for config.yaml and checkpoints/)")


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
