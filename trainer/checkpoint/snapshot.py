"""Copies of a rank's state in host memory. Training pauses only while the state is copied, not for the whole save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.layout import Shard

_ALIGNMENT = 64
CHUNK_BYTES = 256 << 20
"""The capacity of a chunk, unless a single value needs more. It is a power of two, because torch rounds the size of
pinned memory up to a power of two."""


class Place(NamedTuple):
    """The place of a value in host memory."""

    chunk: int
    """The index of the chunk."""
    start: int
    """The first byte in the chunk."""


class _Held:
    """The values of a shard, and their place in host memory.

    Args:
        values: The values by kind.
        num_bytes: The size of each value; None to compute them.
    """

    __slots__ = ("copies", "num_bytes", "values")

    def __init__(self, values: Mapping[str, Tensor], num_bytes: Sequence[int] | None = None) -> None:
        self.values = values
        self.num_bytes = num_bytes or [value.numel() * value.element_size() for value in values.values()]
        self.copies: dict[str, Tensor] = {}
        """The views of host memory by kind; empty if there are none yet."""


class HostBuffer:
    """Host memory that is allocated once and reused by every save, since allocating it takes longer than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._num_bytes: list[int] = []
        self._places: list[Place] = []
        self._chunks: list[Tensor] = []
        self._held: list[_Held] = []

    @torch.no_grad()
    def copy(self, shards: Sequence[Shard]) -> list[Shard]:
        """Copy the values of shards to host memory.

        Returns:
            The shards with the copied values. The next call overwrites them.
        """
        held = [
            known if known is not None and known.values is shard.values else _Held(shard.values)
            for shard, known in zip_longest(shards, self._held[: len(shards)])
        ]
        num_bytes = [size for one in held for size in one.num_bytes]
        if num_bytes != self._num_bytes:
            held = [_Held(one.values, one.num_bytes) for one in held]
            self._allocate(num_bytes)
        self._held = held
        self._find_memory(held)
        torch._foreach_copy_(
            [copy for one in held for copy in one.copies.values()],
            [value for one in held for value in one.values.values()],
            non_blocking=True,
        )
        if self._pinned:
            torch.cuda.synchronize()
        return [shard.changed(one.copies, shard.step) for shard, one in zip(shards, held, strict=True)]

    def _find_memory(self, held: Sequence[_Held]) -> None:
        """Add the missing views of host memory. They are kept, because a view costs as much as a small copy."""
        places = iter(self._places)
        typed: dict[tuple[int, torch.dtype], Tensor] = {}
        for one in held:
            own = [next(places) for _ in one.num_bytes]
            if one.copies:
                continue
            for (kind, value), (chunk, start) in zip(one.values.items(), own, strict=True):
                of_type = (chunk, value.dtype)
                if of_type not in typed:
                    typed[of_type] = self._chunks[chunk].view(value.dtype)
                first = start // value.element_size()
                one.copies[kind] = typed[of_type][first : first + value.numel()].view(value.shape)

    def _allocate(self, num_bytes: list[int]) -> None:
        """Allocate memory for values of these sizes."""
        # This frees the old chunks and their views before new chunks are allocated.
        self._num_bytes, self._chunks, self._held = num_bytes, [], []
        self._places, sizes = place_values(num_bytes)
        self._chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for size in sizes]


def place_values(num_bytes: Sequence[int]) -> tuple[list[Place], list[int]]:
    """Distribute values over chunks whose sizes are powers of two.

    Values are placed in descending order of size, each into the first chunk that has room.

    Args:
        num_bytes: The size of each value.

    Returns:
        The place of each value, and the size of each chunk in bytes.
    """
    places: dict[int, Place] = {}
    sizes: list[int] = []
    used: list[int] = []
    open_chunks: list[int] = []  # The indices of chunks that may still have room.
    for i in sorted(range(len(num_bytes)), key=lambda i: -num_bytes[i]):
        size = -(-num_bytes[i] // _ALIGNMENT) * _ALIGNMENT
        chunk = next((c for c in open_chunks if used[c] + size <= sizes[c]), None)
        if chunk is None:
            chunk = len(sizes)
            sizes.append(max(CHUNK_BYTES, _power_of_two(size)))
            used.append(0)
            open_chunks.append(chunk)
        places[i] = Place(chunk, used[chunk])
        used[chunk] += size
        if used[chunk] == sizes[chunk]:
            open_chunks.remove(chunk)
    return [places[i] for i in range(len(num_bytes))], [_power_of_two(n) for n in used]


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
