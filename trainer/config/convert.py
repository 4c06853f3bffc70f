"""Strict conversion between plain trees (mappings, lists, scalars) and annotated dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from model.errors import UserError, without_credentials
from model.table import OneOf

T = TypeVar("T")


def from_tree(cls: type[T], tree: Any, path: str = "") -> T:
    """Build a dataclass from a tree.

    Args:
        cls: The dataclass.
        tree: The tree.
        path: The dotted key that leads to the tree, for error messages.

    Raises:
        UserError: If a key is unknown or missing, a value has the wrong type, or a dataclass rejects its values.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{path or 'recipe'} = {_show(tree)}: expected a mapping of {cls.__name__}'s keys")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {key_of(f): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise UserError(f"{_join(path, key)}: unknown key; {_nearest(str(key), list(fields))}")
    values = {}
    for key, field in fields.items():
        hint = hints[field.name]
        if key in tree:
            values[field.name] = _convert(hint, tree[key], _join(path, key))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{_join(path, key)}: missing; expected {describe(hint)}")
    return cls(**values)


def key_of(field: dataclasses.Field[Any]) -> str:
    """Return the recipe key of a field: the field's name, without the final underscore of names such as `from_`."""
    return field.name.removesuffix("_")


def to_tree(value: Any) -> Any:
    """Return a dataclass as a tree.

    Credentials in URLs are masked. If there are none, `from_tree` builds an equal dataclass from the tree.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key_of(f): to_tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def describe(annotation: Any) -> str:
    """Return a description of a type annotation, for error messages and for the reference of recipe keys."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is Annotated and isinstance(args[1], OneOf):
        return "one of " + ", ".join(args[1].table)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list of {describe(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(describe(a) for a in args)
    if origin is dict or dataclasses.is_dataclass(annotation):
        return "a mapping"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(annotation, str(annotation))


def _convert(annotation: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return from_tree(annotation, value, path)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(annotation, args, value, path)
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            raise _wrong(annotation, value, path)
        return value
    if origin is Annotated:
        assert isinstance(args[1], OneOf), (path, annotation)
        if not isinstance(value, str) or value not in args[1].table:
            raise _wrong(annotation, value, path)
        return value
    if origin is tuple:
        return _convert_tuple(annotation, args, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(annotation, value, path)
        return {key: _convert(args[1], item, _join(path, key)) for key, item in value.items()}
    return _convert_scalar(annotation, value, path)


def _convert_union(annotation: Any, args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    members = [a for a in args if a is not type(None)]
    if len(members) == 1:
        return _convert(members[0], value, path)
    for member in members:
        try:
            return _convert(member, value, path)
        except UserError:
            continue
    raise _wrong(annotation, value, path)


def _convert_tuple(annotation: Any, args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(annotation, value, path)
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        raise _wrong(annotation, value, path)
    return tuple(_convert(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _convert_scalar(annotation: Any, value: Any, path: str) -> Any:
    if annotation is float and type(value) is int:
        value = float(value)
    assert annotation in (int, float, bool, str), (path, annotation)
    if type(value) is not annotation or (annotation is float and not math.isfinite(value)):
        raise _wrong(annotation, value, path)
    return value


def _wrong(annotation: Any, value: Any, path: str) -> UserError:
    return UserError(f"{path} = {_show(value)}: expected {describe(annotation)}")


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _nearest(key: str, names: list[str]) -> str:
    fold: Callable[[str], str] = str.lower
    near = difflib.get_close_matches(fold(key), [fold(n) for n in names], n=1, cutoff=0.5)
    if near:
        return f"did you mean {next(n for n in names if fold(n) == near[0])}?"
    return f"known keys are {', '.join(names)}"
