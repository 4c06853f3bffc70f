"""Tables that name the choices of a recipe field, such as the encoder families. Plug-ins may add entries."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class OneOf:
    """An annotation of a text field whose value must be a key of a table: `Annotated[str, OneOf(TABLE)]`."""

    table: Mapping[str, object]


def load_entry(entry: object) -> object:
    """Return the value of a table's entry: the entry itself, or the object that it names as `module:NAME`."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    # In an exported model the modules lie in one package, and their names are relative.
    return getattr(importlib.import_module(module, __package__), name)
