"""The files of a checkpoint in a bucket, which are read in blocks. While one block is used, the next is fetched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from trainer.storage.store import ChangedError, MissingError, Store

BLOCK_BYTES = 8 << 20
_NUM_BLOCKS = 12
"""The maximum number of blocks that are kept in memory."""
_NUM_READERS = 4


class BucketFolder:
    """The files of a checkpoint in an object store; implements `trainer.checkpoint.folder.Folder`.

    Args:
        store: The store that contains the checkpoint's folder and the folders of frozen files.
        url: The URL that names the checkpoint in messages.
        folder: The name of the folder with the checkpoint's own files.
    """

    def __init__(self, store: Store, url: str, folder: str) -> None:
        self._store, self._url, self._folder = store, url, folder
        self._sizes: dict[str, int] = {}
        self._blocks: OrderedDict[tuple[str, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="checkpoint-reader")

    @property
    def url(self) -> str:
        return self._url

    def size_bytes(self, name: str) -> int:
        if name not in self._sizes:
            try:
                self._sizes[name] = self._store.size_bytes(self._object(name))
            except MissingError as error:
                raise FileNotFoundError(str(error)) from None
        return self._sizes[name]

    def replace(self, name: str, text: str) -> None:
        self._store.put(self._object(name), [text.encode()])
        with self._lock:
            self._sizes.pop(name, None)
            for block in [block for block in self._blocks if block[0] == name]:
                del self._blocks[block]

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        size, done = self.size_bytes(name), 0
        if offset + len(target) > size:
            raise EOFError(f"{self.url}/{name} ends at byte {size}")
        while done < len(target):
            number, start = divmod(offset + done, BLOCK_BYTES)
            part = self._block(name, number, size)[start : start + len(target) - done]
            target[done : done + len(part)] = part
            done += len(part)

    def _block(self, name: str, number: int, size: int) -> memoryview:
        with self._lock:
            for wanted in (number, number + 1):  # The next block will probably be needed soon.
                if wanted * BLOCK_BYTES < size and (name, wanted) not in self._blocks:
                    self._blocks[name, wanted] = self._pool.submit(self._fetch, name, wanted, size)
            block = self._blocks[name, number]
            self._blocks.move_to_end((name, number))
            while len(self._blocks) > _NUM_BLOCKS:
                self._blocks.popitem(last=False)
        return block.result()

    def _fetch(self, name: str, number: int, size: int) -> memoryview:
        start = number * BLOCK_BYTES
        try:
            return self._store.get_range(self._object(name), start, min(BLOCK_BYTES, size - start), size)
        except MissingError as error:
            raise FileNotFoundError(str(error)) from None
        except ChangedError as error:
            raise EOFError(str(error)) from None

    def _object(self, name: str) -> str:
        return name if "/" in name else f"{self._folder}/{name}"
