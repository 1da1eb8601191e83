"""What we use of jsonargparse beyond its public interface, all of it, in one place (see tasks/internals.py)."""

from collections.abc import Iterator
from typing import Any


def actions(parser: Any) -> Iterator[Any]:
    """The settings of an argument parser (argparse's own list)."""
    return iter(parser._actions)


def type_hint(action: Any) -> Any:
    """The type of a setting as its class's signature has it."""
    return getattr(action, "_typehint", None) or action.type
