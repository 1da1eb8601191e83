"""--help and --version: the tasks, every setting of one with its value, and what is installed."""

import importlib.metadata
import json
import platform
import shutil
import textwrap
from typing import Any

from jsonargparse import ArgumentParser

from tasks.cli.arguments import COMMANDS, is_group, known_keys
from tasks.cli.compose import CONFIGS, at, shipped_tasks
from tasks.cli.explain import describe
from tasks.cli.lists import RULE
from tasks.cli.parser_internals import actions

OVERVIEW = """Trains HGRN2 for language modelling, image classification and Long Range Arena.

usage: python train.py [fit|validate|test|predict] task=NAME [key=value ...]

  python train.py task=vision                            train on the data that comes with the installation
  python train.py task=lm trainer.max_steps=200 seed=1   change any setting; --key=value and --key value work too
  python train.py test task=vision                       test the best checkpoint of the newest run
  python train.py test task=vision ckpt_path=last        ckpt_path=last|best|PATH, of the newest run or of run=PATH
  python train.py task=vision resume=auto                continue the newest run where it stopped, or start one
  python train.py task=vision --help                     every setting of a task, with its value
  python train.py task=vision --print_config             the resolved configuration as YAML (a task file: task=my.yaml)
  python train.py --version                              versions of hgrn2, torch, triton, lightning and Python
  tensorboard --logdir runs

precedence: class default < configs/base.yaml < task file (parents first) < command line
            (a run that is resumed or tested adds its own configuration just below the command line)
"""
# of the many, those that one changes first
IMPORTANT = (
    "trainer.max_steps", "trainer.devices", "trainer.precision", "data.batch_size", "seed",
    "model.optim.lr", "model.optim.warmup_steps", "model.backbone.dim", "model.backbone.depth",
    "model.backbone.expand_ratio",
)  # fmt: skip
PACKAGES = ("hgrn2", "torch", "triton", "lightning")


def overview() -> str:
    """What --help shows without a task."""
    width = max(len(name) for name in shipped_tasks())
    tasks = "".join(f"  {name:<{width}}  {summary(name)}".rstrip() + "\n" for name in shipped_tasks())
    lists = textwrap.fill(f"lists: {RULE}", 118, subsequent_indent="       ")
    first = textwrap.fill(f"settings to change first: {', '.join(IMPORTANT)}", 118, subsequent_indent="       ")
    return f"{OVERVIEW}{lists}\n\n{first}\n\ntasks:\n{tasks}"


def summary(task: str) -> str:
    """The first line of a task's file, a comment that says what it is."""
    with (CONFIGS / f"{task}.yaml").open() as file:
        first = file.readline()
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def version() -> str:
    """Installed versions, without the slow imports."""
    lines = [f"{name} {_installed(name)}" for name in PACKAGES]
    return "\n".join([*lines, f"python {platform.python_version()}"]) + "\n"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def settings(parser: ArgumentParser, task: str, values: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The ten settings that matter, then all of them, the Trainer's last: value, type, and first sentence of the help.

    ``*`` marks what is not the class's default.
    """
    hints = known_keys(parser)
    helps = {action.dest: action.help or "" for action in actions(parser)}
    keys = [key for key in hints if not is_group(key, hints)]
    width = max(shutil.get_terminal_size().columns, 100)

    def line(key: str) -> list[str]:
        value = at(values, key)
        plain_text = isinstance(value, str) and value and " " not in value
        mark = "*" if value != at(defaults, key) else " "
        left = f"  {key}={value if plain_text else json.dumps(value, ensure_ascii=False)}"
        right = f"{describe(hints[key])}. {' '.join(helps[key].split()).split('. ')[0]}".rstrip(". ")
        return textwrap.wrap(f"{left:<46} {mark} {right}", width, subsequent_indent=" " * 49, break_long_words=False)

    lines = [f"usage: python train.py [{'|'.join(COMMANDS)}] task={task} [key=value ...]", ""]
    lines += ["what matters most (*: set by the task's files or by you, not the class's default):"]
    lines += [text for key in IMPORTANT if key in keys for text in line(key)]
    group = None
    for key in sorted(keys, key=lambda key: ("." in key, key.startswith("trainer."))):
        if (above := key.partition(".")[0] if "." in key else "") != group:
            group = above
            lines += ["", f"{group}:" if group else "run:"]
        lines += line(key)
    return "\n".join(lines) + "\n"
