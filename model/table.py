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
    """Return the entry of a table, importing it if the entry is text of the form `module:NAME`."""
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    # In an exported model, all modules are in one package, and their names are relative.
    return getattr(importlib.import_module(module, __package__), name)
