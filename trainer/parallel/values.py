"""Collectives for small values that are not tensors. Values are not pickled, so received data cannot execute code.

A value is sent as a line of JSON, followed by the bytes of its arrays. Besides the types that JSON has, values
may contain tuples, ranges, sets, bytes, dictionaries whose keys are not strings, NumPy arrays of numbers, and instances
of the dataclasses and named tuples that the caller lists. In contrast, torch's own collectives for objects execute any
code that a message refers to.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from trainer.parallel.tree import broadcast_bytes, gather_bytes

T = TypeVar("T")
Kinds = Sequence[type]
"""The dataclasses and named tuples whose instances a value may contain. All ranks must list the same classes in the
same order."""
_NUMBERS = "biuf"
"""The kinds of NumPy dtypes that can be sent. Arrays of other kinds may contain references to objects."""


def encode(value: Any, kinds: Kinds = ()) -> bytes:
    """Encode a value as bytes from which `decode` restores an equal value.

    Raises:
        TypeError: If the value contains an object of a type that the module's docstring does not list.
    """
    arrays: list[bytes] = []
    head = json.dumps(_Writer(kinds, arrays).tree(value), separators=(",", ":")).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *arrays])


def decode(data: bytes, kinds: Kinds = ()) -> Any:
    """Return the value that was passed to `encode`, given its result.

    Raises:
        ValueError: If `data` is not the result of `encode`.
    """
    size = 8 + int.from_bytes(data[:8], "little")
    try:
        if len(data) < size:
            raise ValueError(f"{len(data)} bytes instead of {size}")
        return _Reader(kinds, memoryview(data)[size:]).value(json.loads(data[8:size]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"a value from another rank is malformed ({type(error).__name__}: {error})") from None


def all_gather_values(value: T, group: dist.ProcessGroup | None, kinds: Kinds = ()) -> list[T]:
    """Return the values of all ranks, in rank order.

    Collective: every rank of `group` must call it.

    Args:
        value: This rank's value.
        group: The group, which must accept CPU tensors; None for the default group.
        kinds: The dataclasses and named tuples whose instances the values may contain.
    """
    parts = gather_bytes(encode(value, kinds), group)
    joined = broadcast_bytes(None if parts is None else encode(parts), 0, group)
    return [decode(part, kinds) for part in decode(joined)]


def gather_values(value: T, group: dist.ProcessGroup | None, kinds: Kinds = ()) -> list[T] | None:
    """Return the values of all ranks, in rank order, on the first rank of a group, and None on the other ranks.

    Collective: every rank of `group` must call it. See `all_gather_values` for the arguments.
    """
    parts = gather_bytes(encode(value, kinds), group)
    return None if parts is None else [decode(part, kinds) for part in parts]


def broadcast_value(value: T, group: dist.ProcessGroup | None, kinds: Kinds = ()) -> T:
    """Return the value of the first rank of a group.

    Collective: every rank of `group` must call it. The values of other ranks are ignored. See `all_gather_values` for
    the arguments.
    """
    first = dist.get_rank(group) == 0
    sent = broadcast_bytes(encode(value, kinds) if first else None, 0, group)
    return value if first else decode(sent, kinds)


class _Writer:
    """A converter of values to JSON. Values of types that JSON lacks become mappings with one key."""

    def __init__(self, kinds: Kinds, arrays: list[bytes]) -> None:
        self._numbers = {kind: number for number, kind in enumerate(kinds)}
        self._arrays = arrays

    def tree(self, value: Any) -> Any:
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, np.generic):
            return self.tree(value.item())
        number = self._numbers.get(type(value))
        if number is not None:
            return {"k": [number, [self.tree(getattr(value, name)) for name in _fields(type(value))]]}
        if isinstance(value, list):
            return [self.tree(item) for item in value]
        if type(value) is tuple:
            return {"t": [self.tree(item) for item in value]}
        if isinstance(value, range):
            return {"r": [value.start, value.stop, value.step]}
        if isinstance(value, Set):
            return {"s": [self.tree(item) for item in value]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {"m": {key: self.tree(item) for key, item in value.items()}}
            return {"d": [[self.tree(key), self.tree(item)] for key, item in value.items()]}
        if isinstance(value, bytes):
            self._arrays.append(value)
            return {"b": len(value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in _NUMBERS:
            self._arrays.append(np.ascontiguousarray(value).tobytes())
            return {"a": [value.dtype.str, list(value.shape)]}
        raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be sent to other ranks")


class _Reader:
    """A converter of the JSON that `_Writer` produces back to values."""

    def __init__(self, kinds: Kinds, arrays: memoryview) -> None:
        self._kinds, self._arrays, self._offset = tuple(kinds), arrays, 0
        self._makers: dict[str, Callable[[Any], Any]] = {
            "k": self._instance,
            "t": lambda items: tuple(map(self.value, items)),
            "r": lambda bounds: range(*map(int, bounds)),
            "s": lambda items: set(map(self.value, items)),
            "m": lambda items: {key: self.value(item) for key, item in items.items()},
            "d": lambda items: {self.value(key): self.value(item) for key, item in items},
            "b": lambda size: bytes(self._take(size)),
            "a": self._array,
        }

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        if isinstance(tree, dict):
            ((mark, content),) = tree.items()
            return self._makers[mark](content)
        return tree

    def _instance(self, content: Any) -> Any:
        number, values = content
        kind = self._kinds[number]
        return kind(**dict(zip(_fields(kind), map(self.value, values), strict=True)))

    def _array(self, content: Any) -> np.ndarray:
        dtype, shape = np.dtype(str(content[0])), tuple(map(int, content[1]))
        if dtype.kind not in _NUMBERS or min(shape, default=0) < 0:
            raise ValueError(f"an array of {dtype} of shape {shape}")
        part = self._take(dtype.itemsize * math.prod(shape))
        return np.frombuffer(part, dtype=dtype).reshape(shape).copy()

    def _take(self, size: int) -> memoryview:
        part = self._arrays[self._offset : self._offset + size]
        if size < 0 or len(part) != size:
            raise ValueError(f"{len(part)} bytes instead of {size}")
        self._offset += size
        return part


def _fields(kind: type) -> tuple[str, ...]:
    """Return the names of the constructor arguments of a dataclass or named tuple, in order."""
    if dataclasses.is_dataclass(kind):
        return tuple(f.name for f in dataclasses.fields(kind) if f.init)
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return names
