"""Refusals in a person's words: which key, which value, what is valid and what was probably meant."""

import difflib
import importlib
import inspect
import re
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

# what other tools call them
PRECISIONS = {
    "16-mixed": ("fp16", "float16", "half", "amp", "mixed", "fp16-mixed"),
    "16-true": ("fp16-true",),
    "bf16-mixed": ("bfloat16", "bf16-amp", "bfloat16-mixed"),
    "32-true": ("fp32", "float32", "float", "full", "tf32"),
    "64-true": ("fp64", "float64", "double"),
}
SYNONYMS = {name: precision for precision, names in PRECISIONS.items() for name in names}


def parts(hint: Any) -> list[Any]:
    """The alternatives of a type."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def choices(hint: Any) -> list[str]:
    """The values of a type that lists them, each once; empty where there are others."""
    found = [part for part in parts(hint) if part is not type(None)]
    if not all(str(get_origin(part)) == "typing.Literal" for part in found):
        return []
    return list(dict.fromkeys(str(value) for part in found for value in get_args(part)))


def describe(hint: Any) -> str:
    """A type as a person would say it."""
    if len(parts(hint)) > 1:
        literals = [str(value) for part in parts(hint) for value in choices(part)]
        others = [describe(part) for part in parts(hint) if not choices(part)]
        return " or ".join(dict.fromkeys([*literals, *others]))
    if hint is type(None):
        return "null"
    if choices(hint):
        return " or ".join(choices(hint))
    if get_origin(hint) is not None:
        return re.sub(r"\b\w+\.", "", str(hint))
    return getattr(hint, "__name__", str(hint))


def short(message: str, hints: dict[str, Any]) -> str:
    """One line out of jsonargparse's several."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if group := re.search(r"Parser key \"([^\"]+)\": *Unable to load config [\"'](.*)[\"']", message):
        return f"{group[1]}={group[2]}: {group[1]} is a group of settings, each set by {group[1]}.NAME=VALUE"
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    if key is None:
        return " ".join(lines)
    got = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    name = key[1]
    if got is None or name not in hints:
        return f"{name}: {' '.join(lines[1:]) or lines[0]}"
    if problem := _inside(name, message) or _no_such_class(name, got[1], hints[name]):
        return problem
    if valid := choices(hints[name]):
        close = SYNONYMS.get(got[1].lower()) if name.endswith("precision") else None
        close = close or next(iter(difflib.get_close_matches(got[1], valid, n=1, cutoff=0.4)), None)
        meant = f"did you mean {close}? " if close in valid else ""
        return f"{name}={got[1]}: {meant}Valid: {', '.join(valid)}"
    return f"{name}={got[1]}: expected {describe(hints[name])}"


def _inside(name: str, message: str) -> str | None:
    """What is wrong with an object's own arguments."""
    found = re.findall(r"Problem with given class_path '([\w.]+)':\s*\n\s*(.+(?:\n {10,}.+)?)", message)
    for path, problem in found:
        known = list(argument_types(path))
        who = path.rpartition(".")[2]
        if missing := re.search(r"following arguments are required: (.*)", problem):
            first = missing[1].split(",")[0]
            return f"{name}: {who} needs {missing[1]} ({name}.{first}=VALUE after {name}={who})"
        if wrong := re.search(r'[Kk]ey "([^"]+)":?\s*(.*?)\. (?:Got|Given) value: (.*)', problem, re.DOTALL):
            expected = re.sub(r"(an? )?<class '(\w+)'>", r"\2", " ".join(wrong[2].split()))
            return f"{name}.{wrong[1]}={wrong[3]}: {expected[:1].lower()}{expected[1:]}"
        if (other := re.search(r"Option '([^']+)' is not accepted", problem)) and other[1] not in known:
            close = difflib.get_close_matches(other[1], known, n=3)
            return f"{name}.{other[1]}: {who} has no such argument. {_nearest(close or known)}"
    return None


def _no_such_class(name: str, value: str, hint: Any) -> str | None:
    bases = [part for whole in parts(hint) for part in (get_args(whole) or [whole]) if isinstance(part, type)]
    known = sorted({sub.__name__ for base in bases for sub in _subclasses(base)})
    if not known or not re.fullmatch(r"[A-Za-z_][\w.]*", value):
        return None
    close = difflib.get_close_matches(value, known, n=3)
    return f"{name}={value}: no such class. {_nearest(close or known)}" if value not in known else None


def _nearest(names: list[str]) -> str:
    return f"Nearest: {', '.join(names[:12])}" if names else "It takes none"


def _subclasses(base: type) -> set[type]:
    if base.__module__ in ("builtins", "types", "typing"):
        return set()
    below = {sub for sub in base.__subclasses__() if not sub.__name__.startswith("_")}
    return below.union(*(_subclasses(sub) for sub in below))


def argument_types(cls: type | str) -> dict[str, Any]:
    """The arguments of a class, or of what its path names, with their types; empty where that cannot be told."""
    try:
        if isinstance(cls, str):
            module, _, name = cls.rpartition(".")
            cls = getattr(importlib.import_module(module), name)
        hints = get_type_hints(cls.__init__)
        return {key: hints.get(key, Any) for key in inspect.signature(cls).parameters}
    except (ImportError, AttributeError, ValueError, TypeError, NameError):
        return {}


def full_keys(message: str, fields: list[str], key: str) -> str:
    """The fields of a dataclass in its own message as keys of the command line: ``dim=`` -> ``model.backbone.dim=``."""
    names = "|".join(map(re.escape, fields))
    return re.sub(rf"(?<![\w.])({names})(?==)", rf"{key}.\1", message)


def by_setting(message: str, settings: dict[str, Any]) -> str:
    """Lightning's words about the Trainer with the settings (not at their defaults) that they are about in front."""

    def said(text: str) -> bool:
        return bool(text) and re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w.-])", message) is not None

    if any(f"trainer.{key}=" in message for key in settings):
        return message
    about = [key for key in settings if said(key)]
    about = about or [key for key, value in settings.items() if not isinstance(value, bool) and said(str(value))]
    shown = ", ".join(f"trainer.{key}={_plain(settings[key])}" for key in about)
    return f"{shown}: {message}" if shown else message


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    if isinstance(value, dict) and "class_path" in value:
        return value["class_path"].rpartition(".")[2]
    return str(value) if isinstance(value, str | int | float) else type(value).__name__
