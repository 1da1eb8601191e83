"""Settings that are lists of objects, and what a command line adds to them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hgrn2.config import ConfigError
from tasks.cli.compose import OBJECT_LISTS, at, escape, listed, merge, nearest, nest, resolve, without
from tasks.cli.explain import argument_types

RULE = (
    "what is given for trainer.callbacks, trainer.plugins or trainer.logger, by = or +=, is added to what task file or "
    "resumed run have there; an entry of the same class replaces the old one, a key below "
    "(trainer.callbacks.patience=3) changes the last entry that has it, and null empties the list. "
    "logger=a,b sets the loggers, logger+=c adds one."
)
NAMES = "logger"  # a comma list


@dataclass
class Lists:
    """The flags of one command line that are about lists."""

    flags: list[str] = field(default_factory=list)  # all flags in a form that leaves only typing to be done
    emptied: set[str] = field(default_factory=set)
    below: list[tuple[str, str]] = field(default_factory=list)  # (list, flag) for an entry that is there already
    names: list[str] = field(default_factory=list)  # to be added to NAMES

    def under(self, config: dict[str, Any], typed: Callable[[list[str]], dict[str, Any]]) -> dict[str, Any]:
        """What the typed overrides are merged over: ``config`` as these flags leave it."""
        config = without(config, self.emptied)
        for key, flag in self.below:
            entries = listed(at(resolve(config), key))
            config = merge(without(config, [key]), nest(key, escape(_changed(key, flag, entries, typed))))
        return config

    def add_names(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config`` with the loggers that += adds."""
        if not self.names:
            return config
        there = [name for name in str(at(config, NAMES) or "").split(",") if name not in ("", "none")]
        return merge(config, {NAMES: ",".join(dict.fromkeys([*there, *self.names]))})


def read_lists(flags: list[str]) -> Lists:
    """Sorts ``--key=value`` and ``--key+=value`` flags."""
    lists = Lists()
    for flag in flags:
        key, _, value = flag.removeprefix("--").partition("=")
        adds, key = key.endswith("+"), key.removesuffix("+")
        owner = next((name for name in OBJECT_LISTS if key == name or key.startswith(f"{name}.")), None)
        if owner is None:
            _plain(lists, key, value, adds)
        elif key != owner:
            there = any(other.startswith(f"--{owner}+=") for other in lists.flags)
            lists.flags.append(flag) if there else lists.below.append((owner, flag))
        elif value.strip() in ("null", "[]", "true", "false") and not adds:
            lists.flags = [other for other in lists.flags if not other.startswith((f"--{owner}=", f"--{owner}+="))]
            lists.below = [(other, flag) for other, flag in lists.below if other != owner]
            lists.emptied.add(owner)
            lists.flags.append(flag.replace("=[]", "=null"))
        else:
            lists.flags = [other for other in lists.flags if not other.startswith(f"--{owner}=")]
            lists.flags.append(f"--{owner}+={value}")
    return lists


def _plain(lists: Lists, key: str, value: str, adds: bool) -> None:
    if not adds:
        lists.names = [] if key == NAMES else lists.names
        lists.flags.append(f"--{key}={value}")
    elif key == NAMES:
        lists.names += [name.strip() for name in value.split(",") if name.strip()]
    else:
        raise ConfigError(f"{key}+={value}: += adds to {', '.join(OBJECT_LISTS)} or {NAMES}; write {key}={value}")


def _changed(key: str, flag: str, entries: list[Any], typed: Callable[[list[str]], dict[str, Any]]) -> list[Any]:
    """The entries with ``flag`` applied to the last one that has its argument."""
    if entries:  # short names become full ones
        entries = at(typed([f"--{key}+={json.dumps(entries)}"]), key)
    argument = flag.removeprefix(f"--{key}.").partition("=")[0].removeprefix("init_args.").partition(".")[0]
    for i in reversed(range(len(entries))):
        if argument in argument_types(entries[i]["class_path"]):
            (changed,) = at(typed([f"--{key}+={json.dumps(entries[i])}", flag]), key)
            return [*entries[:i], changed, *entries[i + 1 :]]
    classes = ", ".join(entry["class_path"].rpartition(".")[2] for entry in entries)
    has = f"none of its entries ({classes}) has {argument}" if classes else "the list is empty"
    known = [name for entry in entries for name in argument_types(entry["class_path"])]
    has += f" (nearest: {', '.join(close)})" if (close := nearest(argument, known)) else ""
    raise ConfigError(f"{flag.removeprefix('--')}: {has}; name the class first: {key}=CLASS {flag.removeprefix('--')}")
