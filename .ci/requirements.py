"""Requirements as pyproject.toml states them, one a line, for pip: `lowest | range [NAME ...]`."""

import pathlib
import re
import sys
import tomllib

project = tomllib.loads(pathlib.Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
kind, *names = sys.argv[1:]
for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
    bounds, _, marker = requirement.partition(";")
    if not names or re.match(r"[\w-]+", bounds)[0] in names:
        line = re.sub(r">=([0-9.]+).*", r"==\1", bounds) if kind == "lowest" else bounds
        sys.stdout.write(line + ";" * bool(marker) + marker + "\n")
