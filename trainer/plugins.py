"""Plug-ins: installed packages that add entries to this project's tables through Python entry points.

A recipe names the plug-ins that it needs under `plugins`. Every process that loads the recipe loads them before it
checks the recipe's sections against the tables. Processes that it starts load the same plug-ins with `inherit_plugins`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from model.errors import UserError

VARIABLE = "EARSHOT_PLUGINS"
"""The environment variable that passes the names of the loaded plug-ins, separated by commas, to child processes."""


@dataclass(frozen=True)
class Group:
    """The table to which the entry points of a group are added."""

    module: str
    """The module of the table, which is imported when a plug-in adds an entry."""
    table: str
    """The name of the table, a dictionary, in the module."""
    type: str
    """The base class of entries, as `module:NAME`. An entry is an instance or a subclass of it."""
    by_place: bool = False
    """Whether the table stores `module:NAME` instead of the value, so that exports can copy the module."""


GROUPS: Mapping[str, Group] = {
    "earshot.encoders": Group(
        "model.encoders.families", "ENCODER_FAMILIES", "model.encoders.family:EncoderFamily", True
    ),
    "earshot.adapters": Group("model.connectors.kinds", "ADAPTERS", "model.connectors.base:Adapter", True),
    "earshot.llms": Group("model.llm.families", "LLM_FAMILIES", "model.llm.families:LLMFamily"),
    "earshot.losses": Group("model.losses.table", "LOSSES", "model.losses.base:Loss"),
    "earshot.tasks": Group("trainer.scoring.tasks", "TASKS", "trainer.scoring.tasks:Task"),
    "earshot.trackers": Group(
        "trainer.telemetry.trackers.table", "TRACKERS", "trainer.telemetry.trackers.base:Tracker"
    ),
    "earshot.hooks": Group("trainer.telemetry.hook", "HOOKS", "trainer.telemetry.hook:Hook"),
}
"""The groups of entry points. The name of an entry point is the key in the group's table."""


def load_plugins(names: Sequence[str]) -> None:
    """Load plug-ins, each of them once per process.

    Args:
        names: The names of distributions or of single entry points. A distribution stands for all its entry points that
            belong to one of `GROUPS`.

    Raises:
        UserError: If a plug-in is not installed, cannot be imported, or adds something that its group does not accept.
    """
    for name in names:
        _load_once(name)
    if names:
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*_inherited(), *names]))


def inherit_plugins() -> None:
    """Load the plug-ins that the parent process has loaded.

    Raises:
        UserError: See `load_plugins`.
    """
    load_plugins(_inherited())


def package_with(group: str, name: str) -> str | None:
    """Return an installed package that has the entry point `name` in a group of `GROUPS`; None if there is none."""
    return next((_package(point) for point in entry_points(group=group) if point.name == name), None)


def _inherited() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


@cache
def _load_once(name: str) -> None:
    available = [point for group in GROUPS for point in entry_points(group=group)]
    # A package may be found twice on the path, as a checkout and as its installed metadata.
    wanted = dict.fromkeys(p for p in available if name == p.name or _plain(name) == _plain(_package(p)))
    if not wanted:
        known = ", ".join(sorted({_package(point) for point in available})) or "none"
        raise UserError(f"plugins: {name} is not installed in this environment; installed plug-ins: {known}")
    for point in wanted:
        _add(name, point)


def _hidden_by(module: str) -> str:
    """Return a remedy if a folder without code was imported in place of a module, and otherwise an empty text."""
    found = sys.modules.get(module)
    if found is None or getattr(found, "__file__", None) is not None:
        return ""
    folder = next(iter(found.__path__), "")
    return f"; the folder {folder} hides the module; start the command in another folder, or use a src folder"


def _add(name: str, point: EntryPoint) -> None:
    where = f"plugins: {name}: the entry point {point.name} = {point.value} of the package {_package(point)}"
    table, expected = _target(GROUPS[point.group])
    try:
        value = point.load()
    except Exception as error:  # noqa: BLE001 - code of others may raise anything
        why = f"{type(error).__name__}: {_one_line(error)}{_hidden_by(point.module)}"
        raise UserError(f"{where} cannot be imported ({why})") from error
    if not (issubclass(value, expected) if isinstance(value, type) else isinstance(value, expected)):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise UserError(
            f"{where} is {found}, but the group {point.group} needs a {expected.__module__}.{expected.__name__}"
        )
    own_name = getattr(value, "name", point.name)
    if isinstance(own_name, str) and own_name != point.name:
        raise UserError(f"{where} defines an entry with the name {own_name}; use the same name for both")
    entry = point.value if GROUPS[point.group].by_place else value
    if table.get(point.name, entry) != entry:
        raise UserError(f"{where}: {point.name} already exists in the group {point.group}; choose another name")
    table[point.name] = entry


def _target(group: Group) -> tuple[dict[str, Any], type[Any]]:
    module, _, name = group.type.partition(":")
    table = getattr(importlib.import_module(group.module), group.table)
    return table, getattr(importlib.import_module(module), name)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
