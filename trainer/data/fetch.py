"""Encoded samples from the store: few large ranged reads, the next ones read ahead, each sample checked before its use.

What arrives is compared with the index (the object's size, every sample's XXH3). Where it differs it is fetched
again; if it still differs, its samples are `altered` and the shard is named in the log: nothing of them is used.
A store that is away is a matter of its own (`trainer.storage`): that ends the run, and quarantines nothing.
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

from trainer.data.decode import SampleError
from trainer.data.shards import Entry, RawSample, ShardSet
from trainer.storage.store import ChangedError, MissingError

MAX_GAP_BYTES = 256 << 10
"""Unwanted bytes between two samples that are rather read than asked around."""
MAX_READ_BYTES = 32 << 20
"""Of one request, unless a single sample is larger: above the usual `data.read_kib`, or chunks a little longer than the
rest would take two requests each."""
REFETCH_AFTER_SEC = (0.1, 1.0)
"""Waits before what did not fit the index is fetched again."""
_JOIN_SEC = 1.0

log = logging.getLogger(__name__)
T = TypeVar("T")

Fetched = dict[int, RawSample | SampleError]
"""Index in the shard → sample, or why it cannot be used."""


def read_samples(shards: ShardSet, shard: int, indices: Sequence[int]) -> Fetched:
    """Samples of one shard, by as few reads as their places allow.

    Raises:
        UserError: the store is away or refuses; MissingError, ChangedError for the offset table.
    """
    if shard in shards.quarantined:
        return {i: SampleError("altered", shards.quarantined[shard]) for i in indices}
    table = shards.table(shard)
    found: Fetched = {}
    pending, gone = list(indices), None
    for wait_sec in (0.0, *REFETCH_AFTER_SEC):
        time.sleep(wait_sec)
        try:
            arrived, gone = read_unchecked(shards, shard, pending), None
        except (ChangedError, MissingError) as error:
            gone = str(error)
            continue
        good = {i: sample for i in pending if (sample := checked(shards, table[i], arrived[i])) is not None}
        found |= good
        pending = [i for i in pending if i not in good]
        if shards.altered.issuperset((shard, i) for i in pending):
            break
    if gone is not None:
        shards.quarantine(shard, gone)
        return {i: SampleError("altered", gone) for i in indices}
    where = f"{shards.store.url}/{shards.shards[shard].name}"
    for i in pending:
        skipped = SampleError("altered", f"{where}: sample {table[i].key} is not what was indexed")
        found[i] = skipped
        if (shard, i) not in shards.altered:
            shards.altered.add((shard, i))
            log.warning("%s; it is left out", skipped.detail)
    return found


def read_table(shards: ShardSet, shard: int) -> tuple[Entry, ...]:
    """The shard's offset table. Raises MissingError, ChangedError if it stays unusable; UserError as `read_samples`."""
    for wait_sec in REFETCH_AFTER_SEC:
        try:
            return shards.table(shard)
        except (ChangedError, MissingError):
            time.sleep(wait_sec)
    return shards.table(shard)


def read_unchecked(shards: ShardSet, shard: int, indices: Sequence[int]) -> dict[int, memoryview]:
    """The bytes of samples as they come, for `checked`. Raises as `Store.get_range`."""
    table, info = shards.table(shard), shards.shards[shard]
    found = {}
    for part in _requests(sorted(((i, table[i]) for i in indices), key=lambda item: item[1].span)):
        start, end = part[0][1].span[0], max(entry.span[1] for _, entry in part)
        data = shards.store.get_range(info.name, start, end - start, info.num_bytes)
        for index, entry in part:
            first, last = entry.span
            found[index] = data[first - start : last - start]
    return found


def checked(shards: ShardSet, entry: Entry, data: memoryview) -> RawSample | SampleError | None:
    """The sample in `data`; None if these are not the bytes that were indexed."""
    if xxhash.xxh3_64_hexdigest(data) != entry.xxh3:
        return None
    try:
        return shards.parse(entry, data)
    except SampleError as error:
        return error


def _requests(samples: Sequence[tuple[int, Entry]]) -> list[list[tuple[int, Entry]]]:
    """Cut samples, sorted by place, into the runs that one read gets."""
    parts: list[list[tuple[int, Entry]]] = []
    for item in samples:
        start, end = item[1].span
        if parts:
            first, last = parts[-1][0][1].span[0], parts[-1][-1][1].span[1]
            if start - last <= MAX_GAP_BYTES and end - first <= MAX_READ_BYTES:
                parts[-1].append(item)
                continue
        parts.append([item])
    return parts


class ReadAhead:
    """Runs jobs in threads, within a budget of bytes that are being read or wait to be used.

    Args:
        max_bytes: of all jobs that are not `required`. A job's bytes are its caller's estimate.
        num_threads: jobs at a time.
    """

    def __init__(self, max_bytes: int, num_threads: int = 4) -> None:
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = Lock()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._num_threads = num_threads
        self._threads: list[Thread] = []

    def start(self, work: Callable[[], T], num_bytes: int, *, required: bool) -> Future[T] | None:
        """The future of `work`; None if the budget has no room and the job is not required.

        `release` must be told when its result is no longer held.
        """
        with self._lock:
            if not required and self._num_bytes + num_bytes > self.max_bytes:
                return None
            self._num_bytes += num_bytes
            if len(self._threads) < self._num_threads:
                # Daemons: a read that waits for a store to come back must not keep the process from ending.
                thread = Thread(target=self._work, name=f"read-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, work))
        return future

    def release(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes -= num_bytes

    def close(self) -> None:
        """End the threads; one that waits for the store is left behind."""
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
            except BaseException as error:  # handed to whoever waits for the result
                future.set_exception(error)
