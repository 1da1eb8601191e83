"""Which classes a configuration means: a domain's own, or a person's by `model.class_path` and `data.class_path`."""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.config import ConfigError
from tasks import TASKS
from tasks.base import Task
from tasks.cli.compose import merge
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
    described_data: type[TaskData]  # `data` as the parser sees it

    def make_data(self, values: dict[str, Any]) -> TaskData:
        """The data module, out of its own arguments and its data set's options side by side."""
        own = inspect.signature(self.data).parameters
        mine = {key: value for key, value in values.items() if key in own}
        options = {key: value for key, value in values.items() if key not in own}
        return self.data(**mine, **({"options": options} if options else {}))

    def flat(self, config: dict[str, Any], source: str) -> dict[str, Any]:
        """A configuration without class_path and init_args: `model.dim`, whoever wrote the model."""
        if found := {key: path for key, path in class_paths(config).items() if self.paths.get(key) != path}:
            key, path = next(iter(found.items()))
            raise ConfigError(f"{source}: its {key}.class_path={path}, the task's is {self.paths.get(key, 'our own')}")
        flat = {key: _flat(value) if key in SECTIONS else value for key, value in config.items()}
        for key in self.paths:  # base.yaml's, which a changed class has dropped
            if "seed" in inspect.signature(getattr(self, key)).parameters:
                flat[key] = {"seed": "${seed}"} | flat.get(key, {})
        return flat

    def saved(self, config: dict[str, Any]) -> dict[str, Any]:
        """`flat` undone, for a file."""
        own = {key: {"class_path": path, "init_args": config[key]} for key, path in self.paths.items()}
        return ({"domain": self.domain} if self.domain else {}) | config | own


def class_paths(config: dict[str, Any]) -> dict[str, str]:
    """section -> class_path, where one is given."""
    sections = {key: config[key] for key in SECTIONS if isinstance(config.get(key), dict)}
    return {key: section["class_path"] for key, section in sections.items() if "class_path" in section}


def _flat(section: Any) -> Any:
    if not isinstance(section, dict):
        return section
    rest = {key: value for key, value in section.items() if key not in ("class_path", "init_args")}
    return merge(section.get("init_args") or {}, rest)


def choose_classes(domain: str | None, config: dict[str, Any], near: Path, dataset: str | None) -> Classes:
    """The classes that a configuration names; `near` is the folder of its file, where modules are looked for too."""
    if domain is not None and domain not in TASKS:
        raise ConfigError(f"domain={domain}: must be one of {', '.join(TASKS)}")
    paths = class_paths(config)
    if paths and str(near) not in sys.path:
        sys.path.append(str(near))
    model, data = TASKS[domain] if domain else (Task, TaskData)
    found = {"model": model, "data": data}
    for key, path in paths.items():
        found[key] = find_class(path, f"{key}.class_path")
        if not issubclass(found[key], SECTIONS[key]):
            base = SECTIONS[key]
            raise ConfigError(f"{key}.class_path={path}: must be a subclass of {base.__module__}.{base.__name__}")
    return Classes(domain, paths, found["model"], found["data"], described(found["data"], dataset))


def described(data: type[TaskData], dataset: str | None) -> type[TaskData]:
    """A data module for the parser to look at: its constructor has the data set's options beside its own."""
    own = inspect.signature(data, eval_str=True).parameters
    if not {"dataset", "options"} <= own.keys():
        return data
    name, dataset_class = data.choose(own["dataset"].default if dataset is None else dataset)
    options = options_of(dataset_class)
    if both := options.keys() & own.keys():
        raise ConfigError(f"data.dataset={name}: its option {', '.join(both)} has the name of one of data's own")

    def init(self, **values: Any) -> None: ...

    parameters = [parameter for key, parameter in own.items() if key != "options"] + [*map(_typed, options.values())]
    init.__name__, init.__signature__ = (
        "__init__",
        inspect.Signature(
            [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
            + [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        ),
    )
    body = {"__init__": init, "__doc__": dataset_class.__doc__, "__module__": data.__module__}
    return type(data)(data.__name__, (data,), body)


def _typed(parameter: inspect.Parameter) -> inspect.Parameter:
    """An option that its author gave no type takes that of its default."""
    if parameter.annotation is not parameter.empty or parameter.default in (None, parameter.empty):
        return parameter
    return parameter.replace(annotation=type(parameter.default))
