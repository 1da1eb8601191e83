"""Builds what a command line asks for: its configuration, then model and data, then the run folder and the Trainer."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from hgrn2.config import ConfigError, check
from tasks.base import left_to_data, misfits, plain
from tasks.callbacks import CALLBACKS
from tasks.cli import arguments as args
from tasks.cli import compose
from tasks.cli.checkpoints import Checkpoints
from tasks.cli.choice import Choice, choose
from tasks.cli.classes import arguments_of, choose_classes, class_paths
from tasks.cli.explain import by_setting, full_keys
from tasks.cli.help import settings
from tasks.cli.lists import read_lists
from tasks.cli.loggers import LOGGERS, make_loggers
from tasks.cli.record import Record
from tasks.cli.reliability import Guard
from tasks.cli.report import already_done
from tasks.cli.resume import Resumed, check_changes, other_experiment
from tasks.cli.runs import AtomicCheckpointIO, check_fits, new_run, read_checkpoint, run_around
from tasks.cli.settings import check_built, check_trainer
from tasks.cli.signals import Leave, Signals
from tasks.compilation import Compile, CompileMode
from tasks.internals import forks
from tasks.plots import printable
from tasks.progress import say

DECISION = "HGRN2_RUN"  # what rank 0 decided, for the children that Lightning's launcher starts
OURS = ("ckpt_path", "run", "resume")  # settings of one command line, not of a configuration
# what earlier versions wrote into a run's config.yaml; it only concerned the display
RETIRED = ("lr_monitor", "progress.refresh_rate", "progress.leave")


class Done(Exception):
    """--help or --print_config has said everything."""


class Afresh(Exception):
    """The run that resume=auto found is not this experiment's: a new one has to be made, for the reason it says."""


class TaskCLI(LightningCLI):
    """LightningCLI with our composition of files, run folders and checkpoints. It builds; tasks/cli/execute.py runs."""

    def __init__(self, request: args.Request, signals: Signals, choice: Choice | None = None) -> None:
        self.request, self.signals = request, signals
        self.task = compose.task_name(request.task)
        domain, self.layers = compose.load_task(request.task)
        self.layers = compose.renamed(self.layers, rank_zero_info)
        self.tokens, paths = args.without_class_paths(args.renamed(request.tokens, rank_zero_info))
        self.given = compose.renamed(request.given, rank_zero_info)
        self.folder: Path | None = None
        self.root = Path(self._early("run_root") or "runs").expanduser()
        self.choice = choice or self._decide()
        self._choose_classes(domain, paths)
        self.fresh = False
        self.start_step = 0
        self.guard: Guard | None = None
        self.nothing_left: str | None = None
        with self.full_keys():
            super().__init__(
                *self.classes.described(),
                save_config_callback=None,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "parser_mode": "core"},
                args=[],
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # tasks keep their own hyper-parameters (tasks/base.py)
            )

    @contextmanager
    def full_keys(self) -> Iterator[None]:
        """A dataclass names its fields in its own messages; here they get the keys of the command line."""
        try:
            yield
        except ConfigError as error:
            owned = {name: argument.annotation for name, argument in arguments_of(self.classes.model).items()}
            names = [name for name, hint in owned.items() if hint is error.of and dataclasses.is_dataclass(hint)]
            if not names:
                raise
            fields = [field.name for field in dataclasses.fields(error.of)]
            raise ConfigError(full_keys(str(error), fields, f"model.{names[0]}")) from error

    def _early(self, key: str, *files: dict[str, Any]) -> Any:
        """A setting whose value decides what other settings there are, before all of them are typed."""
        typed = args.peek(self.tokens, key)
        if typed is not None:
            return None if typed in ("null", "") else typed
        section, _, name = key.rpartition(".")
        for config in (self.given, *(files or (compose.resolve(self.layers),))):
            for spelling in (key, f"{section}.init_args.{name}"):
                if (value := compose.at(config, spelling)) is not None:
                    return value
        return None

    def _choose_classes(self, domain: str | None, typed_paths: dict[str, Any]) -> None:
        """The classes that files and command line name; what is left are their settings."""
        given_paths = {key: {"class_path": path} for key, path in class_paths(self.given).items()}
        for paths in (typed_paths, given_paths):
            self.layers = compose.merge(self.layers, paths)
        saved = compose.renamed(self.choice.saved() or {}, str)
        dataset = self._early("data.dataset", saved, self.layers)
        self.classes = choose_classes(domain, self.layers, compose.task_file(self.request.task).parent, dataset)
        self.layers = self.classes.compose([*compose.load_layers(self.request.task), typed_paths, given_paths])
        self.layers.pop("domain", None)
        self.given = self.classes.flat(self.given, "settings")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return self.parser_class(prog=f"python train.py task={self.task}", description=None, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed", type=int, default=0, help="seed of weights, sample order and noise")
        parser.add_argument("--run_root", type=str, default="runs", help="where run folders are made and looked for")
        parser.add_argument("--logger", type=str, default="tensorboard", help=f"comma list of {', '.join(LOGGERS)}")
        parser.add_argument("--compile", type=CompileMode, default="auto", help="what torch.compile compiles")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="last, best or a file")
        parser.add_argument("--run", type=str | None, default=None, help="a run folder; default: the task's newest")
        parser.add_argument("--resume", type=str | None, default=None, help="auto: continue the newest run, if any")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        for name, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)

    def parse_arguments(self, parser: LightningArgumentParser, _: Any) -> None:
        """Layers files and flags, then types the whole. Interpolations are resolved after the last layer."""
        flags = args.to_flags(self.tokens, args.known_keys(parser))
        args.unknown_in(self.given, parser, "")
        lists = read_lists(flags)
        typed = args.typed_overrides(parser, lists.flags)
        typed = compose.escape(compose.merge(typed, plain(self.given, "")))
        for key in OURS:
            typed.pop(key, None)
        args.unknown_in(self.layers, parser, f"task={self.request.task}: ")
        under = self._over_run()

        def final(under: dict[str, Any]) -> dict[str, Any]:
            return lists.add_names(compose.merge(lists.under(under, partial(args.typed_overrides, parser)), typed))

        config = final(under)
        if self.choice.auto:
            self._check_experiment(under, config)
        self._check_loggers(config, typed)
        resolved = compose.resolve(config)
        self.config = args.typed(parser, resolved)
        self.resolved = args.plain(parser, self.config)
        defaults = args.plain(parser, parser.get_defaults())
        self.changed = compose.changed(config, self.layers, defaults)
        if self.request.help:
            sys.stdout.write(settings(parser, self.task, self.resolved, defaults))
            raise Done
        for key in OURS:
            self.resolved.pop(key, None)
        self.settings = self.resolved
        self.resolved = compose.without_nulls(self.resolved, self.layers, defaults)
        if self.request.print_config:
            sys.stdout.write(compose.to_yaml(self.classes.saved(self.resolved)))
            raise Done

    def _decide(self) -> Choice:
        """Rank 0's choice of checkpoint and run: its children inherit it, ranks of other launchers see the same."""
        if _is_child() and DECISION in os.environ:
            decided = {key: value and Path(value) for key, value in json.loads(os.environ[DECISION]).items()}
            self.folder = decided["folder"]
            return Choice(decided["checkpoint"], decided["run"])
        if self.request.help or self.request.print_config:
            return Choice()
        return choose(self.request.command, self.task, self.root, **{key: self._early(key, {}) for key in OURS})

    def _check_loggers(self, config: dict[str, Any], typed: dict[str, Any]) -> None:
        """``logger`` and trainer.logger are one setting, and must not contradict each other."""
        switch, names = compose.at(config, "trainer.logger"), typed.get("logger")
        if switch is True:
            raise ConfigError(f"trainer.logger=true: write logger=NAME, a comma list of {', '.join(LOGGERS)}")
        if switch is False and names not in (None, "none"):
            raise ConfigError(f"trainer.logger=false and logger={names} contradict each other (trainer.logger=null)")

    def _over_run(self) -> dict[str, Any]:
        """The files under a run's configuration: all of it to continue the run, its model and data to evaluate it."""
        saved, source = self.choice.saved(), str(self.choice.checkpoint or self.choice.run)
        if saved is None:
            return self.layers
        saved = self.classes.flat(compose.renamed(saved, rank_zero_info), source)
        saved = compose.without(saved, RETIRED)
        saved = compose.merge(compose.nulls(args.plain(self.parser, self.parser.get_defaults())), saved)
        if saved.pop("domain", self.classes.domain) != self.classes.domain:
            raise ConfigError(f"{source}: of another domain than task={self.task}")
        if self.request.command != "fit":
            saved = {key: saved[key] for key in ("model", "data", "seed") if key in saved}
        return compose.over_saved(self.layers, saved)

    def _check_experiment(self, *configs: dict[str, Any]) -> None:
        """What was typed must not make another experiment of the run that resume=auto found: it is never continued."""
        then, now = (args.plain(self.parser, args.typed(self.parser, compose.resolve(config))) for config in configs)
        if not (other := other_experiment(then, now)):
            return
        run = self.choice.run
        if self.choice.checkpoint:
            raise ConfigError(
                f"resume=auto: the newest run {run} is another experiment: {other}. run={run} continues it with "
                "these settings; without resume=auto a new run starts"
            )
        raise Afresh(f"{run} has no checkpoint and is another experiment ({other}): starting a new run")

    def _set_seed(self) -> None:
        seed = self.config["seed"]
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed}: must be from 0 to 2**32 - 1")
        seed_everything(seed, workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        """Data, then the model that fits them; the Trainer comes later (``make_trainer``), when both are valid."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self.classes.make_data(self.config_init["data"].values)
        self.datamodule.setup(self.request.command)
        values, info = self.config_init["model"].values, self.datamodule.info
        check(misfits(values, info, f"data.dataset={self.datamodule.dataset}"))
        said = left_to_data(values, info)
        for config in (self.resolved, self.settings):
            config["model"] |= said
        self.model = self.classes.model(**values | said)

    @property
    def stepped(self) -> bool:
        """Whether this process has taken a step, or evaluated a batch."""
        return self.guard is not None and self.guard.stepped

    def make_trainer(self) -> Trainer:
        fit = self.request.command == "fit"
        settings, start = self.config_init["trainer"], self.choice.checkpoint
        names = [] if settings["logger"] is False else self.config["logger"].split(",")
        make_loggers(names, self.task, None, None)  # a wrong name is refused before a folder is made
        where = self.choice.run or self.root / self.task
        if fit and "tensorboard" in names and printable(str(where)) != str(where):
            raise ConfigError(f"{where}: TensorBoard writes to no folder whose name is not UTF-8; try logger=csv")
        check_trainer(self.request.command, settings, resumes=start is not None)
        if start:
            checkpoint = read_checkpoint(start, training=fit)
            check_fits(self.model, checkpoint, start)
            self.start_step = checkpoint.get("global_step", 0)
            if fit:
                self._check_continues(checkpoint, settings)
            self.nothing_left = already_done(checkpoint, settings) if fit else None
            if self.nothing_left and not self.choice.run:  # of a run that is continued, what is refused comes first
                raise Leave(0, self.nothing_left if rank_zero_only.rank == 0 else "")
        if fit and not settings["fast_dev_run"]:
            self._make_folder()
        checkpoints: Checkpoints = self.config_init["checkpoint"]
        if self.folder and settings["enable_checkpointing"] is not False:
            checkpoints.folder = self.folder / "checkpoints"
        # Where Lightning would look for a SLURM checkpoint of anybody's, and put what has no other place.
        settings["default_root_dir"] = self.folder or (start and run_around(start)) or self.root
        checkpoints.config = self.classes.saved(self.settings)
        self.guard = Guard(self.signals, checkpoints, start)
        changed = {key: compose.at(self.resolved, key) for key in self.changed}
        saved = self.classes.saved(self.resolved)
        record = Record(self.folder, self.root, self.task, self.request.words, saved, changed, self.fresh)
        own = [self.guard, Resumed(self.settings), record, Compile(self.config["compile"])]
        settings["callbacks"] = [*own, *compose.listed(settings["callbacks"])]
        settings["plugins"] = [*compose.listed(settings["plugins"]), AtomicCheckpointIO()]
        step = self.start_step if self.choice.run else None
        own = [] if isinstance(settings["logger"], bool) else compose.listed(settings["logger"])
        settings["logger"] = make_loggers(names if fit else [], self.task, self.folder, step) + own or False
        # Lightning refuses what is switched off.
        unfit = (ProgressBar,) if settings["enable_progress_bar"] is False else ()
        unfit += (ModelSummary,) if settings["enable_model_summary"] is False else ()
        unfit += (Checkpoints,) if settings["enable_checkpointing"] is False else ()
        keys = self.parser.callback_keys
        self.parser.callback_keys = [key for key in keys if not isinstance(self.config_init[key], unfit)]
        if settings["accelerator"] == "auto" and MPSAccelerator.is_available():
            settings["accelerator"] = "cpu"
            if rank_zero_only.rank == 0:
                say("trainer.accelerator=auto takes the CPU: Apple's GPU (MPS) does not run hgrn2_scan yet")
        trainer = super().instantiate_trainer()
        if forks(trainer):
            raise ConfigError(
                f"trainer.strategy={self.config['trainer']['strategy']}: use ddp, which starts processes anew"
            )
        check_built(trainer, settings)
        return trainer

    def with_settings(self, message: str) -> str:
        """Lightning's words about the Trainer with the key and value of the settings that they are about in front."""
        defaults = args.plain(self.parser, self.parser.get_defaults())["trainer"]
        given = {key: value for key, value in self.resolved["trainer"].items() if value != defaults.get(key)}
        return by_setting(message, given)

    def _check_continues(self, checkpoint: dict[str, Any], settings: dict[str, Any]) -> None:
        """Refuses settings with which a checkpoint cannot be trained on from."""
        source = self.choice.run or self.choice.checkpoint
        steps, limit = self.start_step, settings["max_steps"]
        if 0 < limit < steps:  # a job that is started again with less to do has not done its work
            raise ConfigError(f"{source} is already at step {steps} of {limit}: raise trainer.max_steps")
        then = self.classes.flat(compose.renamed(checkpoint.get("config", {}), lambda _: None), str(source))
        changes = check_changes(then, self.settings, source)
        self.choice.note = "; ".join(filter(None, [self.choice.note, changes]))

    def _make_folder(self) -> None:
        if self.folder is not None:
            return  # inherited
        if rank_zero_only.rank != 0:
            self.folder = self.root  # only rank 0 writes; Checkpoints learns the real name from it
        elif self.choice.run:
            self.folder = self.choice.run
        else:
            self.folder, self.fresh = new_run(self.root, self.task), True


def _is_child() -> bool:
    return os.environ.get("LOCAL_RANK", "0") != "0"
