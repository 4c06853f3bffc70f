"""The keys of a recipe that have changed since the last attempt of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from trainer.config.convert import to_tree
from trainer.config.schema import Recipe
from trainer.telemetry.trackers.base import flatten_params

_NUM_SHOWN = 8


def say_changes(stored: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Report the keys whose values differ from those of the last attempt, since a changed key may be a mistake.

    Keys that the recipe of the last attempt lacks, for example because it was written by an older version, are not
    compared.

    Args:
        stored: The recipe of the last attempt. Nothing is reported if it does not exist or is damaged.
        recipe: The recipe of this attempt.
        say: The function that is called with the report, which is one line.
    """
    try:
        tree = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    before = flatten_params(tree) if isinstance(tree, Mapping) else {}
    now = flatten_params(to_tree(recipe))
    changed = [f"{key} = {now[key]} (was {before[key]})" for key in now if before.get(key, now[key]) != now[key]]
    more = f" and {len(changed) - _NUM_SHOWN} more" if len(changed) > _NUM_SHOWN else ""
    if changed:
        say(f"changed since the last attempt: {', '.join(changed[:_NUM_SHOWN])}{more}")
