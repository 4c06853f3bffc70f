"""A cache on a node's disk for the byte ranges of shards that are read from a bucket.

All ranks of a node share the cache. Training also works without it: a range that is missing or damaged in the cache is
read from the bucket.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

import xxhash

from trainer.files import locked

_HASH_BYTES = 8
QUEUE_BYTES = 128 << 20
"""The memory per rank for ranges that wait to be written. Ranges that do not fit are not cached."""
_SWEEP_BYTES = 64 << 20
"""The largest number of bytes that a process writes before it deletes old ranges again."""
_KEPT_SHARE = 0.9
"""The fraction of the size limit to which the cache is reduced when old ranges are deleted."""
_LOCK_NAME = ".lock"

log = logging.getLogger(__name__)


class NodeCache:
    """A cache that stores each byte range as a file, and deletes the least recently read ones when it is full.

    Args:
        folder: A folder that belongs to this user alone; it is created if it is missing.
        max_bytes: The size limit. It may be exceeded by 64 MiB per process.
        queue_bytes: The memory for ranges that wait to be written, in bytes. A single range may exceed it.
    """

    def __init__(self, folder: Path, max_bytes: int, queue_bytes: int = QUEUE_BYTES) -> None:
        self.folder, self.max_bytes, self.queue_bytes = folder, max_bytes, queue_bytes
        self._lock = Lock()
        self._jobs: SimpleQueue[tuple[Path, memoryview]] = SimpleQueue()
        self._queued_bytes = 0
        self._written_bytes: float = float("inf")  # The first write deletes old ranges.
        self._thread: Thread | None = None
        self._is_usable = self._prepare()

    def read(self, key: str, fetch: Callable[[], memoryview], *, fresh: bool = False) -> memoryview:
        """Return a byte range from the cache, or fetch it and write it to the cache in the background.

        Args:
            key: A unique name of the range.
            fetch: The function that reads the range from the bucket.
            fresh: Whether to fetch the range even if it is cached, because the cached content was wrong.
        """
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        path = self.folder / digest[:2] / digest
        if self._is_usable and not fresh and (data := self._load(path)) is not None:
            return data
        data = fetch()
        self._write_later(path, data)
        return data

    def wait(self) -> None:
        """Wait until all queued ranges have been written."""
        while True:
            with self._lock:
                if not self._queued_bytes or self._thread is None or not self._thread.is_alive():
                    return
                thread = self._thread
            thread.join(0.01)

    def _prepare(self) -> bool:
        """Create the folder, and return whether it can be used: no other user can write to it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.lstat()
        except OSError as error:
            log.warning("data.node_cache_dir: %s: %s; data is read without the cache", self.folder, error.strerror)
            return False
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            log.warning("data.node_cache_dir: %s: others can write to it; data is read without the cache", self.folder)
            return False
        return True

    def _load(self, path: Path) -> memoryview | None:
        try:
            content = memoryview(path.read_bytes())
            if bytes(content[:_HASH_BYTES]) == xxhash.xxh3_64_digest(content[_HASH_BYTES:]):
                os.utime(path)
                return content[_HASH_BYTES:]
            path.unlink()
        except OSError:
            pass
        return None

    def _write_later(self, path: Path, data: memoryview) -> None:
        with self._lock:
            if not self._is_usable or (self._queued_bytes and self._queued_bytes + len(data) > self.queue_bytes):
                return
            self._queued_bytes += len(data)
            if self._thread is None:
                self._thread = Thread(target=self._work, name="node-cache", daemon=True)
                self._thread.start()
        self._jobs.put((path, data))

    def _work(self) -> None:
        while True:
            path, data = self._jobs.get()
            try:
                if self._is_usable:
                    self._write(path, data)
            except OSError as error:
                log.warning("data.node_cache_dir: %s: %s; nothing more is cached", self.folder, error.strerror)
                self._is_usable = False
            finally:
                with self._lock:
                    self._queued_bytes -= len(data)

    def _write(self, path: Path, data: memoryview) -> None:
        if self._written_bytes >= min(_SWEEP_BYTES, self.max_bytes // 10):
            self._sweep()
            self._written_bytes = 0
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(xxhash.xxh3_64_digest(data))
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._written_bytes += len(data)

    def _sweep(self) -> None:
        """Delete the least recently read ranges, unless another process is doing so."""
        try:
            with locked(self.folder / _LOCK_NAME, wait=False):
                found = []
                for path in self.folder.glob("??/*"):
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        continue
                    found.append((status.st_mtime_ns, status.st_size, path))
                num_bytes = sum(size for _, size, _ in found)
                if num_bytes <= _KEPT_SHARE * self.max_bytes:
                    return
                for _, size, path in sorted(found):
                    path.unlink(missing_ok=True)
                    num_bytes -= size
                    if num_bytes <= _KEPT_SHARE * self.max_bytes:
                        return
        except BlockingIOError:
            return
