"""What a command starts from: the run and the checkpoint that a person means. Nothing is written here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.config import ConfigError
from tasks.cli import compose
from tasks.cli.runs import Inexact, read_checkpoint, run_around, runs_of


@dataclass
class Choice:
    """What a command starts from."""

    checkpoint: Path | None = None  # loaded before the command runs
    run: Path | None = None  # continued by fit, or started anew where no checkpoint is given; None: a new run folder
    note: str = ""  # said to the person at start
    auto: bool = False  # nobody named the run: it has to be the same experiment

    @property
    def config(self) -> Path | None:
        """The configuration of the run that is continued, or that the checkpoint comes from."""
        run = self.run or (self.checkpoint and run_around(self.checkpoint))
        return run.absolute() / "config.yaml" if run and (run / "config.yaml").is_file() else None

    def saved(self) -> dict[str, Any] | None:
        """The configuration that a continued run was last seen with, else the one that the checkpoint was made with."""
        if self.checkpoint and not self.run and (kept := read_checkpoint(self.checkpoint).get("config")):
            return compose.escape(kept)
        return compose.read(self.config) if self.config else None


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
    runs = [_named_run(root, task, run)] if run else runs_of(root, task)
    if command != "fit":
        return _evaluated(command, task, root, runs, ckpt_path, bool(run))
    if not runs:
        if resume:
            return Choice(note=f"no run of task={task} to resume under {root}: starting a new one")
        raise ConfigError(f"ckpt_path={ckpt_path}: no run of task={task} under {root}")
    if ckpt_path == "best":
        return Choice(_best(runs[0], training=True))
    return _continued(runs[0], f"run={run}" if run else f"ckpt_path={ckpt_path}", bool(resume), named=bool(run))


def _continued(run: Path, asked: str, resume: bool, named: bool) -> Choice:
    """The newest checkpoint of a run that resumes exactly; with ``resume`` the run starts anew where it has none.

    It is always the newest run: where that died before its first checkpoint, an older one is another experiment.
    """
    files = _newest_first(run)
    checkpoint, problems, lost = _usable(files, training=True)
    note = "; ".join(problems)
    if checkpoint is not None:
        return Choice(checkpoint, run, note and f"{note}; using {checkpoint.name} instead", auto=resume and not named)
    if lost:  # something that a person should look at before it is overwritten
        raise ConfigError(f"no checkpoint of {run} can be loaded: {note}")
    if not resume:
        other = "; resume=auto starts the run anew" if files else ""
        raise ConfigError(f"{asked}: {run} has no checkpoint yet that can be resumed{f' ({note})' * bool(note)}{other}")
    if not (run / "config.yaml").is_file() and not named:
        return Choice(note=f"{run} ended before it began: starting a new run")
    why = f"has no checkpoint that can be resumed ({note})" if files else "has no checkpoint yet"
    return Choice(None, run, f"{run} {why}: starting it anew", auto=not named)


def _evaluated(command: str, task: str, root: Path, runs: list[Path], ckpt_path: str | None, named: bool) -> Choice:
    started = [run for run in runs if _newest_first(run)]
    if not started:
        where = f"{runs[0]} has no checkpoint yet" if named else f"no run of task={task} with a checkpoint under {root}"
        asked = f"ckpt_path={ckpt_path}" if ckpt_path else command
        raise ConfigError(f"{asked}: {where}; train it first, or give ckpt_path=PATH")
    chosen = started[0]
    notes = [] if chosen == runs[0] else [f"{runs[0]} has no checkpoint yet: {command} takes the run before, {chosen}"]
    best = chosen / "checkpoints" / "best.ckpt"
    if ckpt_path == "best" or (ckpt_path is None and best.is_file()):
        notes += [] if ckpt_path else [f"no ckpt_path given: {command} uses {best}"]
        return Choice(_best(chosen, training=False), note="; ".join(notes))
    checkpoint, problems, _ = _usable(_newest_first(chosen), training=False)
    if checkpoint is None:
        raise ConfigError(f"no checkpoint of {chosen} can be loaded: {'; '.join(problems)}")
    notes += [*problems, f"using {checkpoint.name} instead"] if problems else []
    if ckpt_path is None:
        notes.append(f"no ckpt_path given and no best.ckpt there: {command} uses {checkpoint}")
    return Choice(checkpoint, note="; ".join(notes))


def _best(run: Path, training: bool) -> Path:
    best = run / "checkpoints" / "best.ckpt"
    if not best.exists():
        raise ConfigError(f"ckpt_path=best: {run} has no best.ckpt (no validation has finished); try last")
    read_checkpoint(best, training)
    return best


def _newest_first(run: Path) -> list[Path]:
    """A run's checkpoints: last.ckpt, then the newest others."""
    files = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return sorted(files, key=lambda path: path.name != "last.ckpt")


def _usable(files: list[Path], training: bool) -> tuple[Path | None, list[str], bool]:
    """The first that serves, what is wrong with those before it, and whether one of these does not load at all."""
    problems, lost = [], False
    for path in files:
        try:
            read_checkpoint(path, training)
            return path, problems, lost
        except ConfigError as error:
            problems.append(str(error))
            lost |= not isinstance(error, Inexact)
    return None, problems, lost


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
