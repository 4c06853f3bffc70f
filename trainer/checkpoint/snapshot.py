"""Copies in host memory of what a rank saves: the only part of a save for which training stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.checkpoint.layout import Shard

_ALIGNMENT = 64
CHUNK_BYTES = 256 << 20
"""A power of two, as all chunks' sizes are: torch rounds pinned memory up to the next one."""


class Place(NamedTuple):
    """Where a value lies."""

    chunk: int
    start: int


class HostBuffer:
    """Memory that is allocated once and filled at every save: fresh pages would cost more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._num_bytes: list[int] = []
        self._places: list[Place] = []
        self._chunks: list[Tensor] = []

    @torch.no_grad()
    def copy(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards with their values here. What an earlier call returned is overwritten."""
        self._hold([value.numel() * value.element_size() for shard in shards for value in shard.values.values()])
        places, copies = iter(self._places), []
        for shard in shards:
            values = {}
            for kind, value in shard.values.items():
                chunk, start = next(places)
                memory = self._chunks[chunk][start : start + value.numel() * value.element_size()]
                values[kind] = memory.view(value.dtype).view(value.shape).copy_(value, non_blocking=True)
            copies.append(replace(shard, values=values))
        if self._pinned:
            torch.cuda.synchronize()
        return copies

    def _hold(self, num_bytes: list[int]) -> None:
        """Make room for values of these sizes, unless it is there from the last save."""
        if num_bytes == self._num_bytes:
            return
        self._num_bytes, self._chunks = num_bytes, []  # free them first
        self._places, sizes = place_values(num_bytes)
        self._chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) for size in sizes]


def place_values(num_bytes: Sequence[int]) -> tuple[list[Place], list[int]]:
    """Distribute values over chunks whose sizes are powers of two: the largest first, each into the first with room.

    Args:
        num_bytes: size of each value.

    Returns:
        Where each value lies, and each chunk's size in bytes.
    """
    places: dict[int, Place] = {}
    sizes: list[int] = []
    used: list[int] = []
    open_chunks: list[int] = []  # those that may still have room
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
    """The least one that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
