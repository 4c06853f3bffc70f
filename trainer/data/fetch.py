"""Fetch encoded samples from the store with a small number of large ranged reads.

The size of the shard is compared with the index, and each received sample with its XXH3 hash. Samples that differ are
fetched again. If they still differ, they are skipped with reason `altered`, and a warning is logged. A shard that is
missing or has the wrong size is quarantined, which means that it is not read again. If the store is unreachable,
UserError is raised, and nothing is skipped or quarantined.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

import xxhash

from trainer.data.errors import SampleError
from trainer.data.shards import Entry, RawSample, ShardSet
from trainer.storage.store import ChangedError, MissingError

MAX_GAP_BYTES = 256 << 10
"""The largest gap between two samples that one read may include. A larger gap splits the read in two."""
MAX_READ_BYTES = 32 << 20
"""The size limit of one read, unless a single sample is larger. It is well above the usual `data.read_kib`, so that a
chunk of large samples still takes one read."""
REFETCH_AFTER_SEC = (0.1, 1.0)
"""The delays, in seconds, before samples that do not match their hashes are fetched again."""
_JOIN_SEC = 1.0
"""The longest time that `ReadAhead.close` waits for its threads, in seconds."""

log = logging.getLogger(__name__)
T = TypeVar("T")

Fetched = dict[int, RawSample | SampleError]
"""Position in the shard's offset table → sample, or the reason why the sample cannot be used."""


def read_samples(shards: ShardSet, shard: int, indices: Sequence[int]) -> Fetched:
    """Read and check samples of one shard, with as few reads as their positions in the shard allow.

    Args:
        shards: The shards to read from.
        shard: The number of the shard.
        indices: The positions of the samples in the shard's offset table.

    Returns:
        Position in the offset table → sample, or the reason why the sample cannot be used.

    Raises:
        MissingError: If the offset table is missing.
        ChangedError: If the offset table does not belong to the shard.
        UserError: If the store is unreachable or refuses the request.
    """
    if shard in shards.quarantined:
        return {i: SampleError("altered", shards.quarantined[shard]) for i in indices}
    table = shards.table(shard)
    found: Fetched = {}
    pending, unusable = list(indices), None
    for wait_sec in (0.0, *REFETCH_AFTER_SEC):
        time.sleep(wait_sec)
        try:
            received, unusable = read_unchecked(shards, shard, pending, fresh=wait_sec > 0), None
        except (ChangedError, MissingError) as error:
            unusable = str(error)
            continue
        good = {i: sample for i in pending if (sample := checked(shards, table[i], received[i])) is not None}
        found |= good
        pending = [i for i in pending if i not in good]
        if shards.altered.issuperset((shard, i) for i in pending):
            break
    if unusable is not None:
        shards.quarantine(shard, unusable)
        return {i: SampleError("altered", unusable) for i in indices}
    where = f"{shards.store.url}/{shards.shards[shard].name}"
    for i in pending:
        skipped = SampleError("altered", f"{where}: sample {table[i].key} does not match its hash in the offset table")
        found[i] = skipped
        if (shard, i) not in shards.altered:
            shards.altered.add((shard, i))
            log.warning("%s; the sample is skipped", skipped.detail)
    return found


def read_table(shards: ShardSet, shard: int) -> tuple[Entry, ...]:
    """Read the offset table of a shard. An unusable table is read again up to two times.

    Raises:
        MissingError: If the table is missing.
        ChangedError: If the table does not belong to the shard.
        UserError: If the store is unreachable or refuses the request.
    """
    for wait_sec in REFETCH_AFTER_SEC:
        try:
            return shards.table(shard)
        except (ChangedError, MissingError):
            time.sleep(wait_sec)
    return shards.table(shard)


def read_unchecked(
    shards: ShardSet, shard: int, indices: Sequence[int], *, fresh: bool = False
) -> dict[int, memoryview]:
    """Read samples of one shard without comparing them with their hashes. Callers must pass each sample to `checked`.

    Args:
        shards: The shards to read from.
        shard: The number of the shard.
        indices: The positions of the samples in the shard's offset table.
        fresh: Whether to read from the store even if the bytes are cached on this node.

    Returns:
        Position in the shard's offset table → bytes of the sample.

    Raises:
        UserError: If the store is unreachable or refuses the request.
    """
    table = shards.table(shard)
    found = {}
    for group in _group_reads(sorted(((i, table[i]) for i in indices), key=lambda item: item[1].span)):
        start, end = group[0][1].span[0], max(entry.span[1] for _, entry in group)
        data = shards.read(shard, start, end - start, fresh=fresh)
        for index, entry in group:
            first, last = entry.span
            found[index] = data[first - start : last - start]
    return found


def checked(shards: ShardSet, entry: Entry, data: memoryview) -> RawSample | SampleError | None:
    """Return the sample in `data`, the reason why it cannot be used, or None if its bytes do not match its hash."""
    if xxhash.xxh3_64_hexdigest(data) != entry.xxh3:
        return None
    try:
        return shards.parse(entry, data)
    except SampleError as error:
        return error


def _group_reads(samples: Sequence[tuple[int, Entry]]) -> list[list[tuple[int, Entry]]]:
    """Split samples, which must be sorted by their first byte, into groups that are each fetched with one read."""
    groups: list[list[tuple[int, Entry]]] = []
    for item in samples:
        start, end = item[1].span
        if groups:
            first, last = groups[-1][0][1].span[0], groups[-1][-1][1].span[1]
            if start - last <= MAX_GAP_BYTES and end - first <= MAX_READ_BYTES:
                groups[-1].append(item)
                continue
        groups.append([item])
    return groups


class ReadAhead:
    """A pool of threads that read in advance, within a memory budget.

    The result of a read counts towards the budget from the start of the read until the caller releases it.

    Args:
        max_bytes: The size of the budget. Reads that are `required` are counted but never refused.
        num_threads: The largest number of concurrent reads.
    """

    def __init__(self, max_bytes: int, num_threads: int = 4) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = Lock()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._num_threads = num_threads
        self._threads: list[Thread] = []

    def start(self, work: Callable[[], T], num_bytes: int, *, required: bool) -> Future[T] | None:
        """Run `work` in a thread. The caller must call `release` when it no longer holds the result.

        Args:
            work: The read.
            num_bytes: The estimated size of its result, in bytes.
            required: If true, the read starts even if it exceeds the budget.

        Returns:
            The future of the result; None if the read would exceed the budget and is not required.
        """
        with self._lock:
            if not required and self._num_bytes + num_bytes > self.max_bytes:
                return None
            self._num_bytes += num_bytes
            if len(self._threads) < self._num_threads:
                # A daemon thread that waits for an unreachable store does not keep the process from exiting.
                thread = Thread(target=self._work, name=f"read-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    def release(self, num_bytes: int) -> None:
        """Return the `num_bytes` of one read to the budget."""
        with self._lock:
            self._num_bytes -= num_bytes

    def close(self) -> None:
        """Cancel the waiting reads and stop the threads, without waiting long for reads from a slow store."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + _JOIN_SEC
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads = []

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                future.set_result(work())
            except BaseException as error:  # Future.result raises the error in the thread that waits for it.
                future.set_exception(error)
