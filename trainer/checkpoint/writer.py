"""Files of a checkpoint: safetensors and JSON, hashed as they are written, durable before they are named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.layout import FileEntry

_CHUNK_BYTES = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write host tensors as safetensors, tensor by tensor (no copy of the whole), and sync.

    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def content() -> Iterator[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for tensor in tensors.values():
            yield tensor.contiguous().flatten().view(torch.uint8).numpy().data

    return _write(path, content())


def write_text(path: Path, text: str) -> FileEntry:
    """Write and sync."""
    return _write(path, iter([text.encode()]))


def hash_file(path: Path) -> FileEntry:
    """Size and checksum of what lies on disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


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
