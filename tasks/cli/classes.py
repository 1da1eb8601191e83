"""Which classes a configuration means: a domain's own, or a person's by `model.class_path` and `data.class_path`."""

import inspect
import sys
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

from hgrn2.config import ConfigError
from tasks import TASKS
from tasks.base import Task
from tasks.cli.compose import CONFIGS, at, merge, renamed
from tasks.data import TaskData
from tasks.dataset import find_class, options_of

SECTIONS = {"model": Task, "data": TaskData}  # a person's own class is one of these


@dataclass(frozen=True)
class Classes:
    """The classes of one command line, and where they come from."""

    domain: str | None
    paths: dict[str, str]  # section -> class_path, for a person's own
    model: type[Task]
    data: type[TaskData]
    name: str | None  # of the data set
    dataset: type | None
    options: dict[str, Parameter]  # of the data set: settings beside those of `data`

    def described(self) -> tuple[type, type]:
        """Model and data for the parser: classes that only keep what they are given, since the model has to wait for
        the data, which has its data set's options beside its own arguments."""
        own = arguments_of(self.data) | self.options
        if self.dataset is not None:
            del own["options"]
        doc = (self.dataset or self.data).__doc__
        return _described(self.model, arguments_of(self.model), self.model.__doc__), _described(self.data, own, doc)

    def make_data(self, values: dict[str, Any]) -> TaskData:
        """The data module, out of its own arguments and its data set's options side by side."""
        own = {key: value for key, value in values.items() if key not in self.options}
        if self.options:
            own["options"] = {key: values[key] for key in self.options}
        return self.data(**own)

    def flat(self, config: dict[str, Any], source: str) -> dict[str, Any]:
        """A configuration without class_path and init_args: `model.dim`, whoever wrote the model."""
        if found := {key: path for key, path in class_paths(config).items() if self.paths.get(key) != path}:
            key, path = next(iter(found.items()))
            raise ConfigError(f"{source}: its {key}.class_path={path}, the task's is {self.paths.get(key, 'our own')}")
        return self._of_this_data_set(_flat(config))

    def compose(self, layers: list[dict[str, Any]]) -> dict[str, Any]:
        """A task's files on top of each other, flat.

        A changed class_path drops the settings of the class before it, unless the last class is derived from the
        domain's own; a changed data set drops the options of the one before it.
        """
        config: dict[str, Any] = {}
        before: dict[str, str] = {}
        kept = {key for key, own in zip(SECTIONS, TASKS.get(self.domain, ()), strict=False) if self._derives(key, own)}
        for layer in layers:
            layer = renamed(layer, str)
            for key, path in class_paths(layer).items():
                if path != before.setdefault(key, "") and key not in kept:
                    config[key] = {}
                before[key] = path
            layer = _flat(layer)
            if at(layer, "data.dataset") not in (None, at(config, "data.dataset")) and "data" in config:
                config["data"] = self._without_options(config["data"])
            config = merge(config, layer)
        seeds = {key: {"seed": "${seed}"} for key in self.paths if "seed" in arguments_of(getattr(self, key))}
        return self._of_this_data_set(merge(seeds, config))

    def _derives(self, key: str, own: type) -> bool:
        return issubclass(getattr(self, key), own)

    def _of_this_data_set(self, config: dict[str, Any]) -> dict[str, Any]:
        if self.dataset is None or at(config, "data.dataset", self.name) == self.name:
            return config
        return config | {"data": self._without_options(config["data"])}

    def _without_options(self, data: dict[str, Any]) -> dict[str, Any]:
        """The settings of another data set, without those that only it has: files and options."""
        known = {*arguments_of(self.data), *self.options} - {"path"}
        return {key: value for key, value in data.items() if key in known}

    def saved(self, config: dict[str, Any]) -> dict[str, Any]:
        """`flat` undone, for a file."""
        own = {key: {"class_path": path, "init_args": config[key]} for key, path in self.paths.items()}
        return ({"domain": self.domain} if self.domain else {}) | config | own


def class_paths(config: dict[str, Any]) -> dict[str, str]:
    """section -> class_path, where one is given."""
    sections = {key: config[key] for key in SECTIONS if isinstance(config.get(key), dict)}
    return {key: section["class_path"] for key, section in sections.items() if "class_path" in section}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat = dict(config)
    for key in SECTIONS:
        if isinstance(section := config.get(key), dict):
            rest = {name: value for name, value in section.items() if name not in ("class_path", "init_args")}
            flat[key] = merge(section.get("init_args") or {}, rest)
    return flat


def choose_classes(domain: str | None, config: dict[str, Any], near: Path, dataset: str | None) -> Classes:
    """The classes that a configuration names; `near` is the folder of its file, where modules are looked for too."""
    if domain is not None and domain not in TASKS:
        raise ConfigError(f"domain={domain}: must be one of {', '.join(TASKS)}")
    paths = class_paths(config)
    if near != CONFIGS and str(near) not in sys.path:
        sys.path.append(str(near))
    model, data = TASKS[domain] if domain else (Task, TaskData)
    found = {"model": model, "data": data}
    for key, path in paths.items():
        found[key] = find_class(path, f"{key}.class_path")
        if not issubclass(found[key], SECTIONS[key]):
            base = SECTIONS[key]
            raise ConfigError(f"{key}.class_path={path}: must be a subclass of {base.__module__}.{base.__name__}")
    return Classes(domain, paths, found["model"], found["data"], *_choose_dataset(found["data"], dataset))


def _choose_dataset(data: type[TaskData], name: str | None) -> tuple[str | None, type | None, dict[str, Parameter]]:
    """The data set's name, class and options; none where a person's data module takes no `dataset`."""
    own = arguments_of(data)
    if not {"dataset", "options"} <= own.keys():
        return None, None, {}
    name, found = data.choose(own["dataset"].default if name is None else name)
    options = options_of(found)
    if both := options.keys() & own.keys():
        raise ConfigError(f"data.dataset={name}: its option {', '.join(both)} has the name of one of data's own")
    return name, found, options


def _described(kind: type, arguments: dict[str, Parameter], doc: str | None) -> type:
    """A class in the place of `kind`, for the parser: it takes `arguments` and only keeps their `values`."""

    def init(self, **values: Any) -> None:
        self.__dict__["values"] = values

    parameters = [_typed(parameter).replace(kind=Parameter.KEYWORD_ONLY) for parameter in arguments.values()]
    this = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    init.__name__, init.__signature__ = "__init__", inspect.Signature([this, *parameters])
    return type(kind)(kind.__name__, (kind,), {"__init__": init, "__doc__": doc, "__module__": kind.__module__})


def arguments_of(kind: type) -> dict[str, Parameter]:
    """The arguments of a class's constructor, with those that it hands on to its parents by **kwargs."""
    found: dict[str, Parameter] = {}
    for parent in kind.__mro__:
        if "__init__" not in vars(parent):
            continue
        own = list(inspect.signature(parent.__init__, eval_str=True).parameters.values())[1:]
        named = [p for p in own if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
        found = {p.name: p for p in named} | found
        if not any(p.kind is Parameter.VAR_KEYWORD for p in own):
            break
    return found


def _typed(parameter: Parameter) -> Parameter:
    """An option that its author gave no type takes that of its default."""
    if parameter.annotation is not parameter.empty or parameter.default in (None, parameter.empty):
        return parameter
    return parameter.replace(annotation=type(parameter.default))
