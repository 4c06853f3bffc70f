"""Recipe keys and values that had different names in earlier versions.

A recipe that a user writes must use the current names. For each former name, `refuse` raises an error that contains the
current one. A recipe that is stored in a run or checkpoint is updated by `translate`, so that runs of earlier versions
can still be used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from model.config import FORMER_GATES
from model.errors import UserError

FORMER_KEYS = {
    "data.sets": "datasets",
    "model.router.entry_steps": "added_encoder_warmup_steps",
    "telemetry.mlflow_experiment": "experiment",
}
"""The former dotted keys, each with the last part of its current name. The section is the same."""

FORMER_SWITCHES = {"telemetry.mlflow": ("trackers", {True: ["mlflow"], False: []})}
"""The former boolean keys, each with the last part of its current name and the values that replace true and false."""

FORMER_VALUES = {"model.router.gates": FORMER_GATES}
"""The dotted keys of lists whose items were renamed, each with the current names of its items by their former names."""

FORMER_BOOLEANS = {"train.recompute_llm": {True: "full", False: "none"}}
"""The keys whose values were true or false in earlier versions, each with the current values that replace these."""


def refuse(tree: dict[str, Any]) -> None:
    """Check that a user's recipe contains no former key or value.

    Args:
        tree: The recipe as nested mappings. It is not changed.

    Raises:
        UserError: If it contains a former key or value. The message contains the current name.
    """
    for section, key, new in _former_keys(tree):
        if key.rpartition(".")[2] in section:
            raise UserError(f"{key}: renamed; write {key.rpartition('.')[0]}.{new} instead")
    for section, key, new, values in _former_switches(tree):
        listed = ", ".join(values[section[key.rpartition(".")[2]]])
        raise UserError(f"{key}: replaced; write {key.rpartition('.')[0]}.{new}=[{listed}] instead")
    for section, key, names in _former_values(tree):
        found = [v for v in section[key.rpartition(".")[2]] if v in names]
        if found:
            raise UserError(f"{key}: '{found[0]}' is renamed; write '{names[found[0]]}' instead")
    for section, key, present in _former_booleans(tree):
        value = section[key.rpartition(".")[2]]
        raise UserError(f"{key} = {str(value).lower()}: replaced; write {key}={present[value]} instead")


def translate(tree: dict[str, Any]) -> None:
    """Replace former keys and values in a stored recipe, in place.

    Args:
        tree: The recipe as nested mappings.
    """
    for section, key, new in _former_keys(tree):
        last = key.rpartition(".")[2]
        if last in section:
            section[new] = section.pop(last)
    for section, key, new, values in _former_switches(tree):
        section[new] = values[section.pop(key.rpartition(".")[2])]
    for section, key, names in _former_values(tree):
        last = key.rpartition(".")[2]
        section[last] = [names.get(v, v) for v in section[last]]
    for section, key, present in _former_booleans(tree):
        last = key.rpartition(".")[2]
        section[last] = present[section[last]]


def _former_keys(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    for key, new in FORMER_KEYS.items():
        section = _section(tree, key)
        if section is not None:
            yield section, key, new


def _former_switches(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, dict[bool, list[str]]]]:
    for key, (new, values) in FORMER_SWITCHES.items():
        section = _section(tree, key)
        if section is not None and isinstance(section.get(key.rpartition(".")[2]), bool):
            yield section, key, new, values


def _former_values(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[str, str]]]:
    for key, names in FORMER_VALUES.items():
        section = _section(tree, key)
        if section is not None and isinstance(section.get(key.rpartition(".")[2]), list):
            yield section, key, names


def _former_booleans(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, dict[bool, str]]]:
    for key, names in FORMER_BOOLEANS.items():
        section = _section(tree, key)
        if section is not None and isinstance(section.get(key.rpartition(".")[2]), bool):
            yield section, key, names


def _section(tree: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return the mapping that contains the last part of a dotted key; None if the recipe has no such section."""
    node: Any = tree
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else None
