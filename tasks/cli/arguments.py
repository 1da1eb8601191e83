"""What a person typed: ``[fit|validate|test|predict] task=NAME key=value ...``, in any of three spellings."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader

from hgrn2.config import ConfigError
from tasks.cli import explain
from tasks.cli.compose import RENAMED, flatten, nearest, shipped_tasks
from tasks.cli.explain import parts, short
from tasks.cli.parser_internals import actions, type_hint

TOP_LEVEL = ("seed", "run_root", "logger", "ckpt_path", "run", "resume")
COMMANDS = ("fit", "validate", "test", "predict")
ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.]*\+?)=(.*)", re.DOTALL)
BOOLS = {"true": "true", "yes": "true", "on": "true", "1": "true"} | dict.fromkeys(("false", "no", "off", "0"), "false")

WORDS = {"train": "fit", "training": "fit", "eval": "test", "evaluate": "test", "val": "validate", "infer": "predict"}
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,2})?")


@dataclass
class Request:
    """The command line, taken apart but not yet typed."""

    command: str = "fit"
    task: str | None = None
    help: bool = False
    version: bool = False
    print_config: bool = False
    tokens: list[str] = field(default_factory=list)  # the overrides as typed
    given: dict[str, Any] = field(default_factory=dict)  # overrides from Python: nested, their values typed already
    words: list[str] = field(default_factory=list)  # all of it, for the record


def read_request(argv: list[str]) -> Request:
    """Finds command, task and flags; everything else stays as typed until the settings' types are known."""
    request, rest = Request(words=list(argv)), list(argv)
    command_seen = False
    while rest:
        token = rest.pop(0)
        match = ASSIGNMENT.fullmatch(token)
        if token in ("-h", "--help", "help"):
            request.help = True
        elif token in ("-V", "--version", "version"):
            request.version = True
        elif token == "--print_config":
            request.print_config = True
        elif token == "--task":
            if not rest:
                raise ConfigError("task: a value is missing (write task=NAME)")
            request.task = rest.pop(0)
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
            raise ConfigError(_stray(token, argv))
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


def without_class_paths(tokens: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(tokens, with `model.NAME` for LightningCLI's `model.init_args.NAME`; the class_paths among them, nested)."""
    kept, found, rest = [], {}, [re.sub(r"^((?:--)?(?:model|data)\.)init_args\.", r"\1", token) for token in tokens]
    while rest:
        token = rest.pop(0)
        section, equals, path = token.removeprefix("--").partition(".class_path=")
        if not equals and token in ("--model.class_path", "--data.class_path"):
            section, equals, path = token[2:].partition(".")[0], "=", rest.pop(0) if rest else ""
        if equals and section in ("model", "data"):
            found[section] = {"class_path": path}
        else:
            kept.append(token)
    return kept, found


def peek(tokens: list[str], key: str) -> str | None:
    """The last value that was typed for a key, before its type is known; None where it was not typed."""
    value = None
    for token, following in zip_longest(tokens, tokens[1:], fillvalue=""):
        if (match := ASSIGNMENT.fullmatch(token)) and match[1] == key:
            value = match[2]
        elif token == f"--{key}":
            value = following
    return value


def _stray(token: str, argv: list[str]) -> str:
    """What to say of a word that is neither a command nor a setting."""
    if (before := argv[argv.index(token) - 1]).endswith("=") and argv[0] != token:
        return f"{before}: a value is missing (no space after =)"
    if re.fullmatch(r"\w+(\.\w+)+", token) or token in TOP_LEVEL:
        return f"{token}: a value is missing (write {token}=VALUE)"
    close = nearest(token, [*COMMANDS, *WORDS, *shipped_tasks()], 1)
    meant = [WORDS.get(name, name) for name in close]
    hint = "".join(f"; did you mean {name if name in COMMANDS else f'task={name}'}?" for name in meant)
    hint += " (fit is the default)" * (meant == ["fit"])
    return f"{token}: expected key=value, or one of {', '.join(COMMANDS)}{hint}"


def _is_bool(hint: Any) -> bool:
    return bool in parts(hint) and set(parts(hint)) <= {bool, type(None)}


def _counts(hint: Any) -> bool:
    """Whether a number of this type is a whole one, so that 1e3 can only be 1000."""
    return int in parts(hint) and not {float, str} & set(parts(hint))


def _native(value: Any, hint: Any, hints: dict[str, Any], key: str = "") -> Any:
    """A value of a configuration as its type means it: 1e3 is a whole number for a count, ~ a folder in a path."""
    if isinstance(value, dict) and "class_path" in value:
        own = explain.argument_types(value["class_path"])
        inner = {name: _native(item, own.get(name), {}) for name, item in (value.get("init_args") or {}).items()}
        return value | ({"init_args": inner} if inner else {})
    if isinstance(value, dict):
        below = {name: f"{key}.{name}".removeprefix(".") for name in value}
        return {name: _native(item, hints.get(below[name]), hints, below[name]) for name, item in value.items()}
    if isinstance(value, list):
        return [_native(item, None, {}) for item in value]
    if isinstance(value, float) and value.is_integer() and _counts(hint):
        return int(value)
    if isinstance(value, str) and value.startswith("~") and Path in parts(hint):
        return os.path.expanduser(value)
    return value


def known_keys(parser: ArgumentParser) -> dict[str, Any]:
    """Every key of the parser with its type."""
    skipped = ("help", "print_config", "print_shtab")  # also --trainer.profiler.help and its like
    return {a.dest: type_hint(a) for a in actions(parser) if a.dest.rsplit(".", 1)[-1] not in skipped}


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
            elif rest and not (alone and hint is not None and str not in parts(hint)):
                value = rest.pop(0)
            else:
                raise ConfigError(f"{key}: a value is missing (write {key}=VALUE)")
        else:
            raise ConfigError(f"{token}: expected key=value")
        check_known([key.removesuffix("+")], hints)
        hint = hints.get(key.removesuffix("+"))
        if value == "" and hint is not None and str not in parts(hint):
            raise ConfigError(f"{key}=: a value is missing")
        if _is_bool(hint):
            value = BOOLS.get(value.lower(), value)
        elif _counts(hint) and NUMBER.fullmatch(value) and (number := Decimal(value)) == int(number):
            value = str(int(number))  # 1e3
        flags.append(f"--{key}={value}")
    return flags


def check_known(keys: list[str], hints: dict[str, Any], source: str = "") -> None:
    """Refuses a key that no setting has; below one that holds an object (a callback, ...) jsonargparse decides."""
    for key in keys:
        parts = key.split(".")
        above = (".".join(parts[:end]) for end in range(1, len(parts)))
        if key in hints or any(known.startswith(f"{key}.") for known in hints):
            continue
        if any(part in hints and not is_group(part, hints) and _holds_objects(hints[part]) for part in above):
            continue
        close = nearest(key, list(hints))
        hint = f" Nearest: {', '.join(close)}" if close else " --help lists all keys"
        raise ConfigError(f"{source}{key}: unknown key.{hint}")


def is_group(key: str, hints: dict[str, Any]) -> bool:
    return any(known.startswith(f"{key}.") for known in hints)


def _holds_objects(hint: Any) -> bool:
    return any(part not in (str, int, float, bool, type(None)) for part in (get_args(hint) or (hint,)))


def typed_overrides(parser: ArgumentParser, flags: list[str]) -> dict[str, Any]:
    """The overrides as plain values of their settings' types. Text for a text setting is never read as YAML."""
    given = call(parser, parser.parse_args, flags, defaults=False)
    return json.loads(parser.dump(given, skip_validation=True, skip_unset=False, format="json"))


def typed(parser: ArgumentParser, config: dict[str, Any]) -> Namespace:
    """The whole configuration, typed, with class defaults where it is silent."""
    return call(parser, parser.parse_object, _native(config, None, known_keys(parser)))


def plain(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    return json.loads(parser.dump(config, skip_validation=True, skip_unset=False, format="json"))


def call(parser: ArgumentParser, parse: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a jsonargparse function; its refusal becomes one line for the person."""
    try:
        return parse(*args, **kwargs)
    except ArgumentError as error:
        raise ConfigError(short(str(error), known_keys(parser))) from error


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
