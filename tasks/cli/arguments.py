"""What a person typed: ``[fit|validate|test|predict] task=NAME key=value ...``, in any of three spellings."""

import json
import re
import shutil
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader

from hgrn2.config import ConfigError
from tasks.cli.compose import RENAMED, at, flatten, nearest, shipped_tasks

COMMANDS = ("fit", "validate", "test", "predict")
ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.]*\+?)=(.*)", re.DOTALL)
BOOLS = {"true": "true", "yes": "true", "on": "true", "1": "true"} | dict.fromkeys(("false", "no", "off", "0"), "false")

OVERVIEW = """Trains HGRN2 for language modelling, image classification and Long Range Arena.

usage: python train.py [fit|validate|test|predict] task=NAME [key=value ...]

  python train.py task=vision                            train on the data that comes with the installation
  python train.py task=lm trainer.max_epochs=2 seed=1    change any setting; --key=value and --key value work too
  python train.py test task=vision                       test the best checkpoint of the newest run
  python train.py test task=vision ckpt_path=last        ckpt_path=last|best|PATH, of the newest run or of run=PATH
  python train.py task=vision resume=auto                continue the newest run where it stopped, or start one
  python train.py task=vision --help                     every setting of a task, with its value
  python train.py task=vision --print_config             the resolved configuration as YAML (a task file: task=my.yaml)
  tensorboard --logdir runs

precedence: class default < configs/base.yaml < task file (parents first) < command line
            (a run that is resumed or tested adds its own configuration just below the command line)
"""


@dataclass
class Request:
    """The command line, taken apart but not yet typed."""

    command: str = "fit"
    task: str | None = None
    help: bool = False
    print_config: bool = False
    tokens: list[str] = field(default_factory=list)  # the overrides as typed


def overview() -> str:
    return f"{OVERVIEW}\ntasks:\n" + "".join(f"  {name}\n" for name in shipped_tasks())


def read_request(argv: list[str]) -> Request:
    """Finds command, task and flags; everything else stays as typed until the settings' types are known."""
    request, rest = Request(), list(argv)
    command_seen = False
    while rest:
        token = rest.pop(0)
        match = ASSIGNMENT.fullmatch(token)
        if token in ("-h", "--help", "help"):
            request.help = True
        elif token == "--print_config":
            request.print_config = True
        elif token == "--task":
            request.task = rest.pop(0) if rest else ""
        elif match and match[1] == "task":
            request.task = match[2]
        elif token.startswith("--") and not match:
            request.tokens.append(token)
            # Its value is the next word, unless that is the task (a bool needs none; to_flags knows which are bools).
            if rest and not rest[0].startswith(("--", "task=")):
                request.tokens.append(rest.pop(0))
        elif match:
            request.tokens.append(token)
        elif token in COMMANDS and not command_seen:
            request.command, command_seen = token, True
        else:
            close = nearest(token, [*COMMANDS, *shipped_tasks()], 1)
            hint = f"; did you mean {'task=' if close[0] not in COMMANDS else ''}{close[0]}?" if close else ""
            raise ConfigError(f"{token}: expected key=value, or one of {', '.join(COMMANDS)}{hint}")
    return request


def renamed(tokens: list[str], say: Callable[[str], Any]) -> list[str]:
    """Old names of settings replaced by today's, each with a line."""
    tokens = list(tokens)
    for i, token in enumerate(tokens):
        dashes, name, rest = re.fullmatch(r"(-*)([\w.]*)(.*)", token, re.DOTALL).groups()
        if name in RENAMED and (rest.startswith("=") or (dashes and not rest)):
            tokens[i] = f"{dashes}{RENAMED[name]}{rest}"
            say(f"{name} is called {RENAMED[name]} now")
    return tokens


def peek(tokens: list[str], key: str) -> str | None:
    """The last value that was typed for a key, before its type is known; None where it was not typed."""
    value = None
    for token, following in zip_longest(tokens, tokens[1:], fillvalue=""):
        if (match := ASSIGNMENT.fullmatch(token)) and match[1] == key:
            value = match[2]
        elif token == f"--{key}":
            value = following
    return value


def _hint(action: Any) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _is_bool(hint: Any) -> bool:
    parts = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    return bool in parts and parts <= {bool, type(None)}


def known_keys(parser: ArgumentParser) -> dict[str, Any]:
    """Every key of the parser with its type."""
    skipped = ("help", "print_config", "print_shtab")  # also --trainer.profiler.help and its like
    return {a.dest: _hint(a) for a in parser._actions if a.dest.rsplit(".", 1)[-1] not in skipped}


def to_flags(tokens: list[str], hints: dict[str, Any]) -> list[str]:
    """All spellings as ``--key=value``; a bool may stand alone, any other key takes the next word whatever it is."""
    flags, rest = [], list(tokens)
    while rest:
        token = rest.pop(0)
        if match := ASSIGNMENT.fullmatch(token):
            key, value = match[1], match[2]
        elif token.startswith("--"):
            key = token.removeprefix("--")
            check_known([key.removesuffix("+")], hints)
            hint = hints.get(key)
            alone = not rest or rest[0].startswith("--") or ASSIGNMENT.fullmatch(rest[0])
            if _is_bool(hint):
                value = rest.pop(0) if rest and rest[0].lower() in BOOLS else "true"
            elif bool in get_args(hint) and alone:
                value = "true"
            elif rest:
                value = rest.pop(0)
            else:
                raise ConfigError(f"{key}: a value is missing (write {key}=VALUE)")
        else:
            raise ConfigError(f"{token}: expected key=value")
        check_known([key.removesuffix("+")], hints)
        if _is_bool(hints.get(key)):
            value = BOOLS.get(value.lower(), value)
        flags.append(f"--{key}={value}")
    return flags


def check_known(keys: list[str], hints: dict[str, Any], source: str = "") -> None:
    """Refuses a key that no setting has; below one that holds an object (a callback, ...) jsonargparse decides."""
    for key in keys:
        parts = key.split(".")
        above = (".".join(parts[:end]) for end in range(1, len(parts)))
        if key in hints or any(known.startswith(f"{key}.") for known in hints):
            continue
        if any(part in hints and not _is_group(part, hints) and _holds_objects(hints[part]) for part in above):
            continue
        close = nearest(key, list(hints))
        hint = f" Nearest: {', '.join(close)}" if close else " --help lists all keys"
        raise ConfigError(f"{source}{key}: unknown key.{hint}")


def _is_group(key: str, hints: dict[str, Any]) -> bool:
    return any(known.startswith(f"{key}.") for known in hints)


def _holds_objects(hint: Any) -> bool:
    return any(part not in (str, int, float, bool, type(None)) for part in (get_args(hint) or (hint,)))


def typed_overrides(parser: ArgumentParser, flags: list[str]) -> dict[str, Any]:
    """The overrides as plain values of their settings' types. Text for a text setting is never read as YAML."""
    given = call(parser, parser.parse_args, flags, defaults=False)
    return json.loads(parser.dump(given, skip_validation=True, skip_unset=False, format="json"))


def typed(parser: ArgumentParser, config: dict[str, Any]) -> Namespace:
    """The whole configuration, typed, with class defaults where it is silent."""
    return call(parser, parser.parse_object, config)


def plain(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    return json.loads(parser.dump(config, skip_validation=True, skip_unset=False, format="json"))


def call(parser: ArgumentParser, parse: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a jsonargparse function; its refusal becomes one line for the person."""
    try:
        return parse(*args, **kwargs)
    except ArgumentError as error:
        raise ConfigError(short(str(error), known_keys(parser))) from error


def short(message: str, hints: dict[str, Any]) -> str:
    """One line out of jsonargparse's several."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    if key is None:
        return " ".join(lines)
    got = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    name = key[1]
    if got is None or name not in hints:
        return f"{name}: {' '.join(lines[1:]) or lines[0]}"
    return f"{name}={got[1]}: expected {describe(hints[name])}"


def describe(hint: Any) -> str:
    """A type as a person would say it."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in get_args(hint)))
    if hint is type(None):
        return "null"
    if str(get_origin(hint)) == "typing.Literal":
        return " or ".join(str(value) for value in get_args(hint))
    if get_origin(hint) is not None:
        return re.sub(r"\b\w+\.", "", str(hint))
    return getattr(hint, "__name__", str(hint))


def settings(parser: ArgumentParser, task: str, values: dict[str, Any]) -> str:
    """Every setting with its value for this task, its type and the first sentence of its help; the Trainer's last."""
    hints = known_keys(parser)
    helps = {action.dest: action.help or "" for action in parser._actions}
    keys = [key for key in hints if not _is_group(key, hints)]
    width = max(shutil.get_terminal_size().columns, 100)
    lines = [f"usage: python train.py [{'|'.join(COMMANDS)}] task={task} [key=value ...]", ""]
    group = None
    for key in sorted(keys, key=lambda key: ("." in key, key.startswith("trainer."))):
        if (above := key.partition(".")[0] if "." in key else "") != group:
            group = above
            lines += [f"{group}:" if group else "run:"]
        value = at(values, key)
        plain_text = isinstance(value, str) and value and " " not in value
        left = f"  {key}={value if plain_text else json.dumps(value, ensure_ascii=False)}"
        right = f"{describe(hints[key])}. {' '.join(helps[key].split()).split('. ')[0]}".rstrip(". ")
        lines += textwrap.wrap(f"{left:<46} {right}", width, subsequent_indent=" " * 47, break_long_words=False)
    return "\n".join(lines) + "\n"


class _CoreLoader(yaml.SafeLoader):
    """YAML without its surprises: yes stays text, 0123 and 12:30 are not numbers."""


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
    ("null", r"null|Null|NULL|", "nN"),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first, ""])


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_CoreLoader)


set_loader("core", _load, exceptions=(yaml.YAMLError,), json_superset=True)


def unknown_in(config: dict[str, Any], parser: ArgumentParser, source: str) -> None:
    check_known(flatten(config), known_keys(parser), source)
