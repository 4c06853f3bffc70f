"""A cache of decoded samples."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

from trainer.data.sample import Clip

Decoded = tuple[dict[str, Any], tuple[Clip, ...]]
"""The metadata and decoded clips of a sample."""


class ClipCache:
    """A thread-safe cache of decoded samples, which evicts the least recently used ones when it is full.

    A key consists of the id of the sample's reader, the number of its shard, and its index in the shard (see
    `SampleSource`).
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[tuple[int, int, int], Decoded] = OrderedDict()
        self._lock = Lock()

    def get(self, key: tuple[int, int, int]) -> Decoded | None:
        """Return the metadata and clips of a sample, or None if it is not in the cache."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def __contains__(self, key: tuple[int, int, int]) -> bool:
        return key in self._items

    def put(self, key: tuple[int, int, int], metadata: dict[str, Any], clips: tuple[Clip, ...]) -> None:
        """Add a sample, unless it is larger than the cache. The caller must not modify the sample afterwards."""
        size = sum(c.nbytes for c in clips)
        if size > self.max_bytes:
            return
        with self._lock:
            if key in self._items:
                return
            self._items[key] = (metadata, clips)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, (_, evicted) = self._items.popitem(last=False)
                self.num_bytes -= sum(c.nbytes for c in evicted)
