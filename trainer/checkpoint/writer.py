"""Write a checkpoint's safetensors and JSON files. Their checksums are computed while they are written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.checkpoint.manifest import FileEntry
from trainer.checkpoint.signing import new_digest, signing_key
from trainer.checkpoint.tensor_file import DTYPES, memory_of

_CHUNK_BYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Region:
    """The part of the joined files of a node that one rank writes."""

    node: int
    """The number of the node."""
    own_start: int
    """The first byte in the joined file of the checkpoint's own folder."""
    frozen_start: int
    """The first byte in the joined file of the folder of frozen weights."""


class Draft(Protocol):
    """A checkpoint that is being written. Readers cannot see it before it is committed."""

    def write(self, name: str, content: Iterable[bytes | memoryview]) -> FileEntry:
        """Write a file, and return its entry for the manifest.

        The file is durable when this method returns, unless it is a part of a joined file.
        """
        ...

    def sync(self) -> None:
        """Make the joined files of this rank's node durable, after all ranks of the node have written their parts."""
        ...


class Hashed:
    """An iterable over blocks of bytes, in chunks, that counts and hashes the bytes."""

    def __init__(self, content: Iterable[bytes | memoryview]) -> None:
        self._content, self._digest, self._size = content, new_digest(signing_key() is not None), 0

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for block in self._content:
            for at in range(0, len(block), _CHUNK_BYTES):
                chunk = block[at : at + _CHUNK_BYTES]
                self._digest.update(chunk)
                self._size += len(chunk)
                yield chunk

    @property
    def entry(self) -> FileEntry:
        """The size and checksum of all bytes that have been yielded so far."""
        return FileEntry(self._size, self._digest.hexdigest())


def write_tensors(draft: Draft, name: str, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors in host memory to a safetensors file, one after another.

    The format is described at https://github.com/huggingface/safetensors#format.
    """
    header = encode_header({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()})

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for tensor in tensors.values():
            yield memory_of(tensor.contiguous())

    return draft.write(name, content())


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the file that `write_tensors` writes."""
    header = encode_header({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()})
    return len(header) + sum(t.numel() * t.element_size() for t in tensors.values())


def write_text(draft: Draft, name: str, text: str) -> FileEntry:
    """Write a text file in UTF-8."""
    return draft.write(name, [text.encode()])


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes that precede the tensors in a safetensors file.

    Args:
        tensors: The (dtype, shape) of each tensor by its key, in the order of the tensors in the file.
        metadata: The file's metadata, or None if it has none.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
