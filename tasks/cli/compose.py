"""One configuration out of many files: class default < configs/base.yaml < task file (parents first) < command line.

Everything here works on plain dicts. Interpolations such as ``${data.num_classes}`` stay text until ``resolve``, which
runs once, after all layers are merged: that is why they follow an override.
"""

import difflib
import json
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hgrn2.config import ConfigError
from tasks.cli.text import command

TASK_LINE = "# task: "
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHOWN_ONLY = ("run_root", "logger", "progress", "samples")  # settings that change no result
RENAMED = {"data.source": "data.path", "data.task": "data.dataset"}  # old settings, which are still read
OBJECT_LISTS = ("trainer.callbacks", "trainer.logger", "trainer.plugins")  # added to; see tasks/cli/lists.py
YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"}


def shipped_tasks() -> list[str]:
    """Names of the shipped task files, ``vision`` before ``vision/cifar10``."""
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    return sorted(name for name in names if name != "base")


def nearest(name: str, known: list[str], count: int = 3) -> list[str]:
    """The known names that a person most likely meant; a bare last part (``max_epochs``) finds its full key."""
    tail = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    tails: dict[str, list[str]] = {}
    for key in known:
        tails.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    loose = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(tails), n=count, cutoff=0.75)
    found = tail + close + [key for part in loose for key in tails[part]]
    return list(dict.fromkeys(found))[:count]


def task_file(task: str, near: Path | None = None) -> Path:
    """The file of a task: a shipped name, or the path of a person's own ``.yaml`` (also relative to ``near``)."""
    path = CONFIGS / f"{task}.yaml"
    if task != "base" and not Path(task).is_absolute() and ".." not in Path(task).parts and path.is_file():
        return path
    for own in (Path(task).expanduser(), *([near / task] if near else [])):
        if own.suffix in (".yaml", ".yml") and own.is_file():
            return own
    close = nearest(task, shipped_tasks(), 2)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(f"task={task}: no such task or .yaml file.{hint} Tasks: {', '.join(shipped_tasks())}")


def task_name(task: str) -> str:
    """The name that a task's runs are filed under: ``lm/wikitext103``, or the stem of a person's own file."""
    path = task_file(task)
    if path.is_relative_to(CONFIGS):
        return path.relative_to(CONFIGS).with_suffix("").as_posix()
    if path.name == "config.yaml" and (first := path.read_text().partition("\n")[0]).startswith(TASK_LINE):
        name = first.removeprefix(TASK_LINE).strip()  # the saved configuration of a run is filed with that run
        return json.loads(name) if name.startswith('"') else name
    return path.stem


def read(path: Path) -> dict[str, Any]:
    """A YAML file as a plain dict, interpolations unresolved."""
    try:
        content = OmegaConf.load(path)
        return _as_text(OmegaConf.to_container(content)) if OmegaConf.is_dict(content) else _not_a_mapping(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _as_text(value: Any) -> Any:
    """``!!binary`` is how ``to_yaml`` keeps text that no YAML can hold: file names that are no UTF-8."""
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value


def _not_a_mapping(path: Path) -> dict[str, Any]:
    if path.read_text().strip():
        raise ConfigError(f"{path}: expected 'key: value' lines")
    return {}


def merge(under: Any, over: Any, path: str = "") -> Any:
    """``over`` on top of ``under``: dicts merge key by key, lists of objects by the entries' class, and everything else
    (other lists too) is replaced.

    A changed ``class_path`` drops what was there, since its ``init_args`` belong to the old class.
    """
    if path in OBJECT_LISTS and isinstance(under, list | dict | str) and isinstance(over, list | dict | str):
        return _merge_objects(listed(under), listed(over))
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if "class_path" in over and over["class_path"] != under.get("class_path"):
        return over
    below = f"{path}." if path else ""
    merged = {key: merge(under[key], value, below + key) if key in under else value for key, value in over.items()}
    return under | merged


def _merge_objects(under: list[Any], over: list[Any]) -> list[Any]:
    """``over`` added to ``under``, in the place of entries of the same class."""
    merged, rest = [], list(over)
    names = {_class_name(entry) for entry in over}
    for entry in under:
        name = _class_name(entry)
        merged += [entry] if name not in names else [new for new in rest if _class_name(new) == name]
        rest = [new for new in rest if _class_name(new) != name]
    return merged + rest


def _class_name(entry: Any) -> str:
    path = entry.get("class_path", "") if isinstance(entry, dict) else entry
    return str(path).rpartition(".")[2]


def listed(value: Any) -> list[Any]:
    """A setting that takes one thing or a list of them, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def nest(key: str, value: Any) -> dict[str, Any]:
    """A configuration that holds one value at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def load_task(task: str) -> tuple[str | None, dict[str, Any]]:
    """(domain, configs/base.yaml with the task's parents and its own file on top, unresolved).

    A task whose model is a person's own (`model.class_path`) may have no domain.
    """
    config: dict[str, Any] = {}
    for layer in load_layers(task):
        config = merge(config, layer)
    domain = config.pop("domain", None)
    if domain is None and at(config, "model.class_path") is None:
        needs = "'parent: NAME', 'domain: lm|vision|lra' or model.class_path"
        raise ConfigError(f"{task_file(task)}: a task file needs {needs}")
    return domain, config


def load_layers(task: str) -> list[dict[str, Any]]:
    """configs/base.yaml, the task's parents, its own file."""
    layers: list[dict[str, Any]] = []
    seen: list[Path] = []
    path = task_file(task)
    while True:
        if path in seen:
            raise ConfigError(f"{path}: its parents form a circle: {' -> '.join(p.stem for p in [*seen, path])}")
        seen.append(path)
        layers.append(layer := read(path))
        parent = layer.pop("parent", None)
        if parent is None:
            break
        path = task_file(str(parent), near=path.parent)
    return [read(CONFIGS / "base.yaml"), *reversed(layers)]


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """Interpolations replaced by what they point to, after every layer is in place."""
    try:
        return OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from error


def over_saved(config: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """A run's saved configuration on top of the files'. It holds no interpolations; those that explain its values stay,
    so that a further override (more ``trainer.max_steps``) still carries over (``model.optim.total_steps``)."""
    config = without(config, [key for key in OBJECT_LISTS if at(saved, key) is not None])  # whole in the run's
    linked = {key for key in flatten(config) if isinstance(value := at(config, key), str) and "${" in value}
    explained = resolve(merge(config, without(saved, linked)))
    plain = resolve(saved)
    kept = {key for key in linked if at(explained, key) == at(plain, key, at(explained, key))}
    return merge(config, without(saved, kept))


def changed(config: dict[str, Any], files: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Dotted keys with another value than the task's files (else the class) give; what follows from one is left out.

    ``config`` and ``files`` are unresolved; ``defaults`` are the classes'.
    """
    keys = [key for key in flatten(config) if key.partition(".")[0] not in SHOWN_ONLY]
    return [key for key in keys if at(config, key) != at(files, key, at(defaults, key))]


def nulls(defaults: dict[str, Any]) -> dict[str, Any]:
    """The part of the classes' defaults that is null: what ``without_nulls`` may have left out."""
    return {
        key: nulls(value) if isinstance(value, dict) else None
        for key, value in defaults.items()
        if value is None or (isinstance(value, dict) and nulls(value))
    }


def without_nulls(config: dict[str, Any], files: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration without the nulls that are the class's default, where no file says anything."""
    said = flatten(files)
    silent = [key for key in flatten(config) if key not in said and at(config, key) is None]
    return without(config, [key for key in silent if at(defaults, key, said) is None])


def at(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


def without(config: dict[str, Any], keys: Container[str], prefix: str = "") -> dict[str, Any]:
    """The configuration without some dotted keys."""
    return {
        key: without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in keys
    }


def renamed(config: dict[str, Any], say: Callable[[str], Any]) -> dict[str, Any]:
    """Old names of settings replaced by today's, each with a line."""
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if not isinstance(below := config.get(section), dict) or name not in below:
            continue
        rest = {key: value for key, value in below.items() if key != name}
        config = config | {section: {new.partition(".")[2]: below[name]} | rest}
        say(f"{old} is called {new} now")
    return config


def escape(value: Any) -> Any:
    """Text that a person typed, protected so that ``resolve`` returns it unchanged even if it holds ``${``."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def flatten(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all leaves; an empty mapping is a leaf."""
    keys = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        keys += flatten(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return keys


class _Dumper(yaml.SafeDumper):
    """Quotes every string that any YAML reader might take for something else (yes, 0123, 1e3, 12:30)."""


def _text(dumper: yaml.Dumper, value: str) -> yaml.Node:
    if re.search("[\ud800-\udfff]", value):
        return dumper.represent_binary(value.encode("utf-8", "surrogatepass"))
    plain = re.fullmatch(r"[A-Za-z_/][\w./ -]*[\w./-]|[A-Za-z_]", value) and value.lower() not in YAML_WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def heading(task: str, argv: list[str]) -> str:
    """The first two lines of a run's config.yaml; any bytes that a name or an argument has leave them two."""
    name = task if task.isprintable() and not task.startswith('"') else json.dumps(task)
    return f"{TASK_LINE}{name}\n# command: {command(*argv)}\n"


def to_yaml(config: dict[str, Any]) -> str:
    """A resolved configuration as YAML text that ``load_task`` reads back to the same values."""
    return yaml.dump(escape(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
