"""Runs a command line that has been read: composes its configuration, builds the objects, fits or evaluates."""

import importlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from hgrn2.config import ConfigError
from tasks import TASKS, compose
from tasks import arguments as args
from tasks.callbacks import CALLBACKS
from tasks.checkpoints import Checkpoints
from tasks.loggers import LOGGERS, make_loggers
from tasks.reliability import Guard, say
from tasks.runs import (
    AtomicCheckpointIO,
    Choice,
    check_fits,
    choose,
    discard,
    new_run,
    read_checkpoint,
    run_around,
    write_atomically,
)
from tasks.signals import Leave, Signals

DECISION = "HGRN2_RUN"  # what rank 0 decided, for the children that Lightning's launcher starts
OURS = ("ckpt_path", "run", "resume")  # settings of one command line, not of a configuration


class Done(Exception):
    """--help or --print_config has said everything."""


class TaskCLI(LightningCLI):
    """LightningCLI with our composition of files, run folders and checkpoints. It builds; ``execute`` runs."""

    def __init__(self, request: args.Request, signals: Signals) -> None:
        self.request, self.signals = request, signals
        self.task = compose.task_name(request.task)
        domain, self.layers = compose.load_task(request.task)
        if domain not in TASKS:
            raise ConfigError(f"domain={domain}: must be one of {', '.join(TASKS)}")
        self.domain = domain
        self.choice = Choice()
        self.folder: Path | None = None
        self.fresh = False
        self.start_step = 0
        model_class, data_class = (_imported(it) for it in TASKS[domain])
        super().__init__(
            model_class,
            data_class,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "parser_mode": "core"},
            args=[],
            run=False,
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return self.parser_class(prog=f"python train.py task={self.task}", description=None, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed", type=int, default=0, help="seed of weights, sample order and noise")
        parser.add_argument("--run_root", type=str, default="runs", help="where run folders are made and looked for")
        parser.add_argument("--logger", type=str, default="tensorboard", help=f"comma list of {', '.join(LOGGERS)}")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="last, best or a file")
        parser.add_argument("--run", type=str | None, default=None, help="a run folder; default: the task's newest")
        parser.add_argument("--resume", type=str | None, default=None, help="auto: continue the newest run, if any")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        for name, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)

    def parse_arguments(self, parser: LightningArgumentParser, _: Any) -> None:
        """Layers files and flags, then types the whole. Interpolations are resolved after the last layer."""
        flags = args.to_flags(self.request.tokens, args.known_keys(parser))
        typed = compose.escape(args.typed_overrides(parser, flags))
        once = {key: typed.pop(key, None) for key in OURS}
        args.unknown_in(self.layers, parser, f"task={self.request.task}: ")
        config = compose.merge(self.layers, typed)
        root = Path(compose.resolve(config)["run_root"]).expanduser()
        if not (self.request.help or self.request.print_config):
            self.choice = self._decide(root, once)
            if self.choice.config is not None:
                config = self._over_run(config, typed)
        resolved = compose.resolve(config)
        self.root = root
        self.config = args.typed(parser, resolved)
        self.resolved = {"domain": self.domain} | args.plain(parser, self.config)
        if self.request.help:
            sys.stdout.write(args.settings(parser, self.task, self.resolved))
            raise Done
        for key in OURS:
            self.resolved.pop(key, None)
        if self.request.print_config:
            sys.stdout.write(compose.to_yaml(self.resolved))
            raise Done

    def _decide(self, root: Path, once: dict[str, Any]) -> Choice:
        """Rank 0's choice of checkpoint and run: its children inherit it, ranks of other launchers see the same."""
        if _is_child() and DECISION in os.environ:
            decided = {key: value and Path(value) for key, value in json.loads(os.environ[DECISION]).items()}
            self.folder = decided["folder"]
            return Choice(decided["checkpoint"], decided["run"])
        return choose(self.request.command, self.task, root, **once)

    def _over_run(self, config: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
        """A run that is continued brings its whole configuration, one that is evaluated its model and data."""
        saved = compose.read(self.choice.config)
        if saved.pop("domain", self.domain) != self.domain:
            raise ConfigError(f"{self.choice.checkpoint}: of another domain than task={self.task}")
        if self.request.command != "fit":
            saved = {key: saved[key] for key in ("model", "data", "seed") if key in saved}
        return compose.merge(compose.over_saved(config, saved), typed)

    def _set_seed(self) -> None:
        seed = self.config["seed"]
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed}: must be from 0 to 2**32 - 1")
        seed_everything(seed, workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        """Model and data; the Trainer comes later (``make_trainer``), when they are known to be valid."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]

    def make_trainer(self) -> Trainer:
        fit = self.request.command == "fit"
        settings, start = self.config_init["trainer"], self.choice.checkpoint
        names = [] if settings["logger"] is False else self.config["logger"].split(",")
        make_loggers(names, self.task, None, None)  # a wrong name is refused before a folder is made
        if start:
            checkpoint = read_checkpoint(start, training=fit)
            check_fits(self.model, checkpoint, start)
            self.start_step = checkpoint.get("global_step", 0)
        if fit and not settings["fast_dev_run"]:
            self._make_folder()
        checkpoints: Checkpoints = self.config_init["checkpoint"]
        if self.folder and settings["enable_checkpointing"] is not False:
            checkpoints.folder = self.folder / "checkpoints"
        guard = Guard(self.signals, checkpoints, start)
        settings["callbacks"] = [guard, *_listed(settings["callbacks"])]
        settings["plugins"] = [*_listed(settings["plugins"]), AtomicCheckpointIO()]
        step = self.start_step if self.choice.run else None
        own = [] if isinstance(settings["logger"], bool) else _listed(settings["logger"])
        settings["logger"] = make_loggers(names if fit else [], self.task, self.folder, step) + own or False
        # Lightning refuses what is switched off, and a monitor without a logger.
        unfit = (ProgressBar,) if settings["enable_progress_bar"] is False else ()
        unfit += () if settings["logger"] else (LearningRateMonitor,)
        unfit += (Checkpoints,) if settings["enable_checkpointing"] is False else ()
        keys = self.parser.callback_keys
        self.parser.callback_keys = [key for key in keys if not isinstance(self.config_init[key], unfit)]
        trainer = super().instantiate_trainer()
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ConfigError(
                f"trainer.strategy={self.config['trainer']['strategy']}: use ddp, which starts processes anew"
            )
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.num_nodes > 1 and not environment.creates_processes_externally:
            raise ConfigError(f"trainer.num_nodes={trainer.num_nodes}: start every node with torchrun or srun")
        return trainer

    def _make_folder(self) -> None:
        if self.folder is not None:
            return  # inherited
        if rank_zero_only.rank != 0:
            self.folder = self.root  # only rank 0 writes; Checkpoints learns the real name from it
        elif self.choice.run:
            self.folder = self.choice.run
        else:
            self.folder, self.fresh = new_run(self.root, self.task), True

    def run(self) -> None:
        """Fits or evaluates, between the lines that say where everything is."""
        command, start = self.request.command, self.choice.checkpoint
        self._tell(self.choice.note, start and f"checkpoint: {start}")
        if self.folder:
            self._tell(f"run folder: {self.folder}", f"  watch:  tensorboard --logdir {self.root}")
        os.environ[DECISION] = json.dumps(
            {"folder": _text(self.folder), "checkpoint": _text(start), "run": _text(self.choice.run)}
        )
        arguments = {"datamodule": self.datamodule, "ckpt_path": start, "weights_only": True}
        try:
            if command == "fit" and self.folder and rank_zero_only.rank == 0:
                self._save_config(self.folder / "config.yaml")
            result = getattr(self.trainer, command)(self.model, **arguments)
        except Leave:
            self._tell(*self._where_next())
            raise
        finally:
            os.environ.pop(DECISION, None)
        if command == "predict" and result is not None:
            self._save_predictions(result)
        self._tell(*self._where_next())

    def _save_config(self, path: Path) -> None:
        text = compose.to_yaml(self.resolved)
        head = f"# task: {self.task}\n# command: {' '.join(sys.argv[1:])}\n"
        write_atomically(path, lambda file: file.write((head + text).encode()))
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "), self.start_step)

    def _save_predictions(self, result: Any) -> None:
        run = run_around(self.choice.checkpoint)
        folder = run or self.choice.checkpoint.parent
        rank = f".rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = folder / f"predictions{rank}.pt"
        write_atomically(path, lambda file: torch.save(result, file))
        self._tell(f"predictions: {path}")

    def _where_next(self) -> list[str]:
        if not self.folder or not (self.folder / "checkpoints").is_dir():
            return []
        return [
            f"run folder: {self.folder}",
            f"  test:   python train.py test task={self.request.task} run={self.folder}",
            f"  resume: python train.py task={self.request.task} run={self.folder}",
        ]

    def _tell(self, *lines: Any) -> None:
        if rank_zero_only.rank == 0:
            for line in filter(None, lines):
                say(str(line))

    def close(self, completed: bool) -> None:
        """After a failure: no child lives on, and no folder of a run that never trained stays behind."""
        self.signals.end_children(orderly=completed)
        if self.fresh and not completed and not self.trained:
            discard(self.folder)

    @property
    def trained(self) -> bool:
        return getattr(self, "trainer", None) is not None and self.trainer.global_step > 0


def _imported(it: Any) -> type:
    """A class, or the class that ``module.Class`` names: one domain's imports need not wait for the others'."""
    if not isinstance(it, str):
        return it
    module, _, name = it.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _text(path: Path | None) -> str | None:
    return path and str(path.absolute())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_child() -> bool:
    return os.environ.get("LOCAL_RANK", "0") != "0"


def _is_noise(record: logging.LogRecord) -> bool:
    """Advertising, and what our own start line says better."""
    return record.getMessage().startswith(("💡", "GPU available", "TPU available", "`weights_only`"))


def execute(request: args.Request, signals: Signals) -> None:
    """Builds and runs."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: not _is_noise(record))
    try:
        _run(TaskCLI(request, signals))
    except Done:
        return


def _run(cli: TaskCLI) -> None:
    completed = False
    try:
        cli.trainer = cli.make_trainer()
        cli.run()
        completed = True
    except Leave:
        completed = cli.trained  # all ranks leave together
        raise
    except RuntimeError as error:
        # Where workers are not forked (macOS, Python 3.14), a signal to the whole group ends them and then us.
        if cli.signals.received is None or "DataLoader worker" not in str(error):
            raise
        name = signal.Signals(cli.signals.received).name
        raise Leave(128 + cli.signals.received, f"{name}: stopped, a data worker had ended") from error
    except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
        # Before the first step these are Lightning's words for settings that don't go together.
        if isinstance(error, ConfigError) or cli.trained or not _about_settings(error):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
    finally:
        cli.close(completed)


def _about_settings(error: Exception) -> bool:
    """Whether Lightning's Trainer itself refused, not the model's or the data's code."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "lightning" in Path(trace.tb_frame.f_code.co_filename).parts
