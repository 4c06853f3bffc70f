"""Chains of recipes: several runs that follow each other, in which later runs use the weights of earlier ones.

A chain is a recipe with the additional key `chain`, a list of the runs. Each item has a `name` and the keys in which
its run differs from the rest of the file. These keys are merged with the rest of the file as a recipe is merged with
its `base`. The text `chain:NAME` is replaced by the URL of an earlier run, for example in `checkpoint.start_from`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError
from trainer.config.former_keys import refuse
from trainer.config.load import apply_override, build_recipe, load_tree, merge_trees
from trainer.config.schema import Recipe

CHAINS = Path(__file__).parent.parent / "recipes" / "chains"
PREFIX = "chain:"


def chain_names() -> list[str]:
    """Return the names of the chains that are part of the project."""
    return sorted(p.stem for p in CHAINS.glob("*.yaml"))


def load_chain(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Recipe, ...]:
    """Return the recipes of a chain, in the order in which they run.

    Args:
        name_or_path: The name of a chain in `trainer/recipes/chains`, or the path to a YAML file.
        overrides: Changes to every run as `key=value`, or to one run as `NAME:key=value`.

    Raises:
        UserError: If there is no such chain, or one of its recipes is invalid; see `load_recipe`.
    """
    path = CHAINS / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise UserError(f"chain {name_or_path}: not one of {', '.join(chain_names())}, nor the path to a .yaml file")
    tree = load_tree(path)
    items = tree.pop("chain", None)
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) and "name" in i for i in items):
        raise UserError(f"{path}: chain: must be a list of runs, each with a name")
    names = [item["name"] for item in items]
    if len(set(map(str, names))) < len(names):
        raise UserError(f"{path}: chain: the names {', '.join(map(str, names))} must be unique")
    found: list[Recipe] = []
    for item in items:
        own: Any = _copy(merge_trees(tree, item))
        for override in overrides:
            prefix, colon, rest = override.partition(":")
            is_for_one = bool(colon) and "=" not in prefix
            if is_for_one and prefix not in names:
                raise UserError(f"{override}: the chain has no run {prefix}; its runs are {', '.join(names)}")
            if not is_for_one or prefix == item["name"]:
                apply_override(own, rest if is_for_one else override)
        refuse(own)
        found.append(build_recipe(_resolved(own, {recipe.name: recipe.run_url for recipe in found}, str(path))))
    return tuple(found)


def _resolved(tree: Any, places: dict[str, str], where: str) -> Any:
    """Return a tree in which every `chain:NAME` is replaced by the URL of that run, which `places` contains."""
    if isinstance(tree, dict):
        return {key: _resolved(value, places, where) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_resolved(value, places, where) for value in tree]
    if not isinstance(tree, str) or not tree.startswith(PREFIX):
        return tree
    name = tree.removeprefix(PREFIX)
    if name not in places:
        raise UserError(
            f"{where}: {tree}: no earlier run of the chain has this name; use one of: {', '.join(places) or 'none'}"
        )
    return places[name]


def _copy(tree: Any) -> Any:
    """Return a copy of a tree, so that overrides of one run do not change another."""
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree
