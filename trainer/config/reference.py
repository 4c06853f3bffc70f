"""The reference of all recipe keys, read from their dataclasses. `docs/recipe.md` is generated from it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.config.convert import describe, key_of, to_tree
from trainer.config.schema import Recipe


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    path: str
    """The dotted key, with `N` for the index of a list item, for example `data.datasets.N.weight`."""
    type: str
    default: str
    """The default value as YAML; `required` if there is none."""
    meaning: str
    """The field's docstring, on one line."""


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass."""

    path: str
    """The dotted key of the section; empty for the top of the recipe."""
    meaning: str
    """The dataclass's docstring."""
    keys: tuple[Key, ...]


def sections(only: str | None = None) -> list[Section]:
    """Return all sections of a recipe in the order of their definition.

    Args:
        only: The dotted key of a section, for this section and the sections within it; None for all sections.
    """
    found = list(_sections(Recipe, ""))
    if only is None:
        return found
    wanted = [part for part in only.split(".") if part]
    return [s for s in found if _plain(s.path)[: len(wanted)] == wanted]


def as_text(found: list[Section]) -> str:
    """Return the keys, their defaults and meanings as text for a terminal of 80 columns."""
    lines: list[str] = []
    for section in found:
        for key in section.keys:
            lines.append(f"{key.path}  ({key.type}; default {key.default})")
            lines += textwrap.wrap(key.meaning, 76, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_markdown(found: list[Section]) -> str:
    """Return the text of `docs/recipe.md`."""
    lines = [
        "# Recipe keys",
        "",
        "A recipe is one YAML file. Any key can be changed on the command line: `optim.lr=3e-4`. List items are",
        "numbered from 0: `data.datasets.0.weight=0.5`. `earshot recipe --keys data` prints a section of this page,",
        "and `earshot recipe --show kit_cpu` prints a recipe with all its values.",
        "",
        "This page is generated from the code by `earshot recipe --markdown > docs/recipe.md`.",
    ]
    for section in found:
        lines += ["", f"## `{section.path}`" if section.path else "## At the top", "", section.meaning, ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in section.keys:
            cells = (f"`{key.path.rpartition('.')[2]}`", key.type, f"`{key.default}`", key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _sections(cls: type[Any], path: str) -> Iterator[Section]:
    hints, meanings = typing.get_type_hints(cls, include_extras=True), _field_docstrings(cls)
    keys, inner = [], []
    for field in dataclasses.fields(cls):
        where = f"{path}.{key_of(field)}" if path else key_of(field)
        nested, is_list = _nested(hints[field.name])
        if nested is not None:
            inner.append((nested, f"{where}.N" if is_list else where))
        if nested is None or is_list or _is_optional(hints[field.name]):
            keys.append(Key(where, describe(hints[field.name]), _default(field), meanings.get(field.name, "")))
    yield Section(path, _one_line(inspect.getdoc(cls) or ""), tuple(keys))
    for nested, where in inner:
        yield from _sections(nested, where)


def _nested(annotation: Any) -> tuple[type[Any] | None, bool]:
    """Return the dataclass of a field, or None, and whether the field is a list of its instances."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation, False
    if origin in (typing.Union, types.UnionType):
        found = [a for a in args if dataclasses.is_dataclass(a) and isinstance(a, type)]
        return (found[0], False) if found else (None, False)
    if origin is tuple and args and dataclasses.is_dataclass(args[0]) and isinstance(args[0], type):
        return args[0], True
    return None, False


def _is_optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return yaml.safe_dump(to_tree(value), default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[statement.target.id] = _one_line(inspect.cleandoc(str(after.value.value)))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(path: str) -> list[str]:
    return [part for part in path.split(".") if part and part != "N"]
