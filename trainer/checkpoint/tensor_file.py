"""Read parts of safetensors files. For the format, see https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.checkpoint.folder import Folder
from trainer.checkpoint.manifest import FileEntry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Span:
    """The type, shape and position of a tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """The position of the first byte in the file `TensorFile.stored_in`."""
    num_bytes: int


class TensorFile:
    """The tensors of one file, by key.

    Args:
        folder: The folder that contains the file.
        name: The name of the file.
        entry: The manifest's entry for the file. It is needed if the file may be stored in a
            joined file, which contains several files.

    Raises:
        ValueError: If the file is not a safetensors file.
    """

    def __init__(self, folder: Folder, name: str, entry: FileEntry | None = None) -> None:
        self.folder, self.name = folder, name
        is_joined = entry is not None and entry.stored_in is not None
        self.stored_in = entry.stored_in if entry is not None and entry.stored_in is not None else name
        offset = entry.offset if entry is not None and is_joined else 0
        size = entry.size_bytes if entry is not None and is_joined else folder.size_bytes(name)
        self.spans = _read_header(folder, self.stored_in, offset, size)

    def read(self, key: str) -> Tensor:
        """Return a whole tensor."""
        span = self.spans[key]
        tensor = torch.empty(span.shape, dtype=span.dtype)
        self.folder.read_into(self.stored_in, span.offset, memory_of(tensor))
        return tensor

    def copy_part(self, key: str, index: tuple[slice, slice], target: Tensor) -> None:
        """Copy a part of a 2-D tensor into `target`, converted to the dtype of `target`.

        Args:
            key: The tensor's key.
            index: The rows and columns to copy.
            target: A tensor of the part's shape.
        """
        span, (rows, cols) = self.spans[key], index
        width = span.shape[1]
        row_bytes = width * span.dtype.itemsize
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            chunk = torch.empty((last - first, width), dtype=span.dtype)
            self.folder.read_into(self.stored_in, span.offset + first * row_bytes, memory_of(chunk))
            target[first - rows.start : last - rows.start].copy_(chunk[:, cols])


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous host tensor as bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_header(folder: Folder, name: str, offset: int, size: int) -> dict[str, Span]:
    length = bytearray(8)
    folder.read_into(name, offset, memoryview(length))
    num_header = int.from_bytes(length, "little")
    if not 2 <= num_header <= min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"{name}: not a safetensors file (a header of {num_header} bytes)")
    header = bytearray(num_header)
    folder.read_into(name, offset + 8, memoryview(header))
    tree = json.loads(header)
    spans = {}
    for key, entry in tree.items():
        if key == "__metadata__":
            continue
        start, stop = (int(n) for n in entry["data_offsets"])
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= stop <= size - 8 - num_header:
            raise ValueError(f"{name}: the header states a wrong position or size for {key}")
        spans[key] = Span(dtype, shape, offset + 8 + num_header + start, stop - start)
    return spans
