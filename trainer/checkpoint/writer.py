"""Files of a checkpoint: safetensors and JSON, hashed as they are written, durable before they are named."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.layout import FileEntry
from trainer.checkpoint.tensor_file import DTYPES, memory_of

_CHUNK_BYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write host tensors as safetensors, tensor by tensor (no copy of the whole), and sync.

    Format: https://github.com/huggingface/safetensors#format
    """
    header = encode_header({key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()})

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for tensor in tensors.values():
            yield memory_of(tensor.contiguous())

    return _write(path, content())


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What stands before the tensors (dtype and shape, in this order) of a safetensors file."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_text(path: Path, text: str) -> FileEntry:
    """Write and sync."""
    return _write(path, iter([text.encode()]))


def commit(part: Path, final: Path) -> None:
    """Make the folder `part` appear as `final`, in one rename; both lie in the same folder."""
    sync_folder(part)
    os.rename(part, final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, content: Iterator[bytes | memoryview]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for block in content:
            for at in range(0, len(block), _CHUNK_BYTES):
                chunk = block[at : at + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size, digest.hexdigest())
