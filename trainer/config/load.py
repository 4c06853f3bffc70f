"""Loading of recipes from strict YAML, with inheritance by `base:` and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError, has_credentials
from trainer.config.convert import from_tree, to_tree
from trainer.config.former_keys import refuse, translate
from trainer.config.schema import Recipe
from trainer.plugins import load_plugins
from trainer.scoring.declared import declare_tasks
from trainer.storage.open import join_url

RECIPES = Path(__file__).parent.parent / "recipes"


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load the plug-ins that a recipe names, and return the recipe.

    A recipe with the key `base: NAME` contains only the keys in which it differs from the recipe NAME. Mappings are
    merged, and lists are replaced.

    Args:
        name_or_path: The name of a recipe in `trainer/recipes`, or the path to a YAML file.
        overrides: Changes as `key=value`, applied in order. Keys are dotted, with numbers for list items
            (`model.experts.0.name=a`), and values are YAML.

    Raises:
        UserError: If there is no such recipe, its YAML is malformed, a key is unknown or given twice, a value has the
            wrong type or range, or a plug-in cannot be loaded.
    """
    tree = load_tree(_find(name_or_path, None))
    if "chain" in tree:
        raise UserError(f"recipe {name_or_path}: is a chain of runs; start it with earshot chain {name_or_path}")
    for override in overrides:
        apply_override(tree, override)
    refuse(tree)
    _follow(tree)
    _refuse_credentials(tree, "")
    return build_recipe(tree)


def _follow(tree: dict[str, Any]) -> None:
    """Set `data.cache_dir` to a folder next to the runs, unless the recipe sets it."""
    data, train = tree.setdefault("data", {}), tree.get("train", {})
    if isinstance(data, dict) and isinstance(train, dict) and isinstance(root := train.get("run_dir", "runs"), str):
        data.setdefault("cache_dir", join_url(root, "cache"))


def parse_stored_recipe(text: str, where: str) -> Recipe:
    """Return a recipe that this or an earlier version has stored. Former keys are translated.

    Args:
        text: The YAML that `dump` returned.
        where: The file that contains the text, for error messages.

    Raises:
        UserError: See `load_recipe`.
    """
    tree = _parse(text, where)
    if isinstance(tree, dict):
        translate(tree)
    return build_recipe(tree)


def _refuse_credentials(tree: Any, path: str) -> None:
    """Refuse URLs with credentials, because recipes are printed, stored with the run and sent to trackers."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _refuse_credentials(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, str) and has_credentials(tree):
        raise UserError(
            f"{path} = {tree}: a URL in a recipe must not contain credentials; set them in the environment or in their "
            "standard files (docs/security.md)"
        )


def build_recipe(tree: Any) -> Recipe:
    """Build a recipe from a tree, and declare its tasks.

    Its plug-ins are loaded first, because sections may name entries that plug-ins add.

    Raises:
        UserError: See `load_recipe`.
    """
    names = tree.get("plugins") if isinstance(tree, dict) else None
    if isinstance(names, list):  # `from_tree` refuses anything else
        load_plugins([name for name in names if isinstance(name, str)])
    if isinstance(tree, dict):
        _add_up_steps(tree)
    recipe = from_tree(Recipe, tree)
    declare_tasks(recipe.tasks)
    return recipe


def _add_up_steps(tree: dict[str, Any]) -> None:
    """Set `train.steps` to the sum over the stages if it is not given. `from_tree` refuses values of a wrong type."""
    stages, train = tree.get("stages"), tree.get("train", {})
    if not isinstance(stages, list) or not isinstance(train, dict) or "steps" in train:
        return
    steps = [stage.get("steps") for stage in stages if isinstance(stage, dict)]
    if steps and all(isinstance(n, int) for n in steps):
        tree["train"] = {**train, "steps": sum(steps)}


def load_stored_recipe(path: Path) -> Recipe:
    """Return the recipe that is stored in the file `path`, such as the `recipe.yaml` of a run.

    Raises:
        UserError: If the file cannot be read; see also `load_recipe`.
    """
    try:
        return parse_stored_recipe(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML with all its keys and without credentials. `load_recipe` reads it as an equal recipe."""
    return yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True, width=120)


def recipe_names() -> list[str]:
    """Return the names of the recipes that are part of the project."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


class _StrictLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys and reads scalars according to YAML 1.2.

    For example, `5e-4` is a number, and `no` and `12:30` are text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBER_STARTS = list("-+0123456789.")
_StrictLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _starts in (
    ("bool", r"true|false", list("tf")),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", _NUMBER_STARTS),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", _NUMBER_STARTS),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _starts)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: is not valid YAML ({' '.join(str(error).split())})") from None


def _find(name_or_path: str, parent: Path | None) -> Path:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path) if parent is None else parent.parent / name_or_path
        if path.is_file():
            return path
        raise UserError(f"recipe {name_or_path}: no such file")
    path = RECIPES / f"{name_or_path}.yaml"
    if name_or_path not in recipe_names():
        raise UserError(f"recipe {name_or_path}: not one of {', '.join(recipe_names())}, nor the path to a .yaml file")
    return path


def load_tree(path: Path) -> dict[str, Any]:
    """Return the keys of a recipe's file, merged with the keys of its `base`. The keys are not checked.

    Raises:
        UserError: If a file cannot be read or is not YAML, or recipes inherit from each other in a circle.
    """
    return _read_tree(path, ())


def _read_tree(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    try:
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: must be a mapping of keys")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {base}: expected the name or path of another recipe")
    parent, lineage = _find(base, path), (*children, path.resolve())
    if parent.resolve() in lineage:
        raise UserError(f"{path}: base = {base}: the recipes inherit from each other in a circle")
    merged: dict[str, Any] = merge_trees(_read_tree(parent, lineage), tree)
    return merged


def merge_trees(base: Any, tree: Any) -> Any:
    """Return `base` with the keys of `tree`. Mappings are merged recursively, and other values are replaced."""
    if not isinstance(base, dict) or not isinstance(tree, dict):
        return tree
    return base | {key: merge_trees(base[key], value) if key in base else value for key, value in tree.items()}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Apply an override of the form `key=value` to a tree, in place.

    Raises:
        UserError: If the override does not have this form, or names an item that a list does not have.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise UserError(f"{override}: an override has the form key=value, e.g. optim.lr=3e-4")
    value = _parse(text, override)
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{override}: {where} is {node!r}, which has no keys")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        remedy = f"use 0..{len(items) - 1}" if items else "the list is empty, so set the whole list"
        raise UserError(f"{override}: {part} is not an item of the list; {remedy}")
    return int(part)
