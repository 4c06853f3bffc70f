"""The conversion of a checkpoint's tensors to safetensors files in Hugging Face's layout, one tensor at a time.

If the dtype of a tensor does not change, the operating system copies its bytes from file to file. Otherwise, the tensor
is converted in memory, one piece at a time. A tensor that was sharded by columns is assembled in memory. A file gets
its final name when it is complete, so an interrupted export resumes after the last complete file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from model.llm.mixture import SCORE_BIAS
from model.llm.stacked import Stacked
from trainer.checkpoint.folder import LocalFolder
from trainer.checkpoint.layout import PARAM, key_of
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.rect import Rect, matrix_of
from trainer.checkpoint.tensor_file import memory_of
from trainer.checkpoint.writer import encode_header

_COPY_BYTES = 1 << 23
_CHUNK_ELEMENTS = 1 << 20
_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class LowRank:
    """A low-rank adapter to merge into a weight W. The merged weight is W + scale·B·A."""

    a: str
    """The name of A in the checkpoint."""
    b: str
    """The name of B in the checkpoint."""
    scale: float


class Place(Protocol):
    """The place of a tensor within a larger tensor, which is exported instead of it."""

    def put(self, values: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy the tensor's values, a matrix or a single row, into the larger tensor."""
        ...


@dataclass(frozen=True)
class Target:
    """A tensor of the exported model."""

    name: str
    source: str
    """The tensor's name in the checkpoint."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[int, ...] | None = None
    """The rows of the checkpoint's tensor to export, in order; None for all rows."""
    adapter: LowRank | None = None
    """The adapter to merge into the tensor; None for none."""
    parts: tuple[tuple[Place, Target], ...] = ()
    """The parts of a tensor that contains all experts of a layer: the place of each part, and the target that the part
    would be as a separate tensor. All other values of the tensor are 0."""

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_targets(
    reader: Reader,
    names: Mapping[str, str],
    dtype: torch.dtype,
    rows: Mapping[str, tuple[int, ...]],
    adapters: Mapping[str, LowRank],
) -> list[Target]:
    """Return the tensors to export.

    Args:
        reader: The checkpoint.
        names: Exported name → name in the checkpoint.
        dtype: The dtype to which floating-point tensors are converted, except the biases that balance experts.
        rows: The rows to export, by name in the checkpoint, for each tensor that is not exported as a whole.
        adapters: The adapters to merge, by name of the weight in the checkpoint.
    """
    targets = []
    for name, source in names.items():
        shape, saved = reader.manifest.tensors[source].shape, reader.dtype(source, PARAM)
        kept = rows.get(source)
        if kept is not None:
            shape = (len(kept), *shape[1:])
        # Biases of routers are sums of small changes, which half precision would lose.
        saved = dtype if saved.is_floating_point and not name.endswith(SCORE_BIAS) else saved
        targets.append(Target(name, source, shape, saved, kept, adapters.get(source)))
    return targets


def stack_targets(targets: Sequence[Target], stacked: Mapping[str, Stacked], prefix: str) -> list[Target]:
    """Replace the tensors of single experts with tensors that contain all experts of a layer, and return all targets.

    Args:
        targets: The targets, in which each expert has separate tensors.
        stacked: The tensors that contain all experts, by their names in transformers.
        prefix: The prefix of the LLM's exported names.
    """
    by_name = {target.name: target for target in targets}
    owners = {prefix + part.name: name for name, tensor in stacked.items() for part in tensor.parts}
    found: dict[str, Target] = {}
    for target in targets:
        name = owners.get(target.name)
        if name is None:
            found[target.name] = target
        elif prefix + name not in found:
            parts = tuple((part, by_name[prefix + part.name]) for part in stacked[name].parts)
            found[prefix + name] = Target(prefix + name, "", stacked[name].shape, target.dtype, parts=parts)
    return list(found.values())


def plan_shards(targets: Sequence[Target], shard_bytes: int) -> dict[str, list[Target]]:
    """Divide targets into files of at most `shard_bytes`, in the given order. A larger tensor has a separate file.

    Returns:
        The targets of each file, by file name.
    """
    shards: list[list[Target]] = []
    room = 0
    for target in targets:
        if not shards or target.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(target)
        room -= target.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_weights(
    reader: Reader, shards: Mapping[str, Sequence[Target]], folder: Path, on_bytes: Callable[[int], None]
) -> None:
    """Write the files that do not exist yet, and their index.

    Args:
        reader: The checkpoint.
        shards: The targets of each file, by file name.
        folder: The folder to write into.
        on_bytes: A function that is called with the size in bytes of every tensor that was written or already existed.
    """
    for name, targets in shards.items():
        if (folder / name).is_file():
            for target in targets:
                on_bytes(target.num_bytes)
        else:
            _write_shard(reader, targets, folder / name, on_bytes)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.num_bytes for targets in shards.values() for t in targets)},
            "weight_map": {t.name: file for file, targets in shards.items() for t in targets},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_shard(reader: Reader, targets: Sequence[Target], path: Path, on_bytes: Callable[[int], None]) -> None:
    header = encode_header({t.name: (t.dtype, t.shape) for t in targets}, _METADATA)
    part = path.with_name(path.name + ".part")
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        os.truncate(handle, len(header) + sum(t.num_bytes for t in targets))
        _write_at(handle, 0, memoryview(header))
        offset = len(header)
        for target in targets:
            _write_tensor(reader, target, handle, offset)
            offset += target.num_bytes
            on_bytes(target.num_bytes)
    finally:
        os.close(handle)
    # The file is not synced to disk, since that would take most of the time, and an export can be repeated.
    part.rename(path)


def _write_tensor(reader: Reader, target: Target, handle: int, offset: int) -> None:
    if target.parts:
        whole_layer = torch.zeros(target.shape, dtype=target.dtype)
        for place, own in target.parts:
            adapter = own.adapter
            read = _read_whole(reader, own.source) if adapter is None else read_merged(reader, own.source, adapter)
            place.put(read, whole_layer)
        _write_at(handle, offset, memory_of(whole_layer))
        return
    entry = reader.manifest.tensors[target.source]
    whole = matrix_of(entry.shape)
    if target.adapter is not None:
        _write_at(handle, offset, memory_of(read_merged(reader, target.source, target.adapter).to(target.dtype)))
        return
    if target.rows is None and all(rect.rows == 1 or rect.cols == whole.cols for _, rect in entry.pieces()):
        for file, rect in entry.pieces():
            start = (rect.row * whole.cols + rect.col) * target.dtype.itemsize
            _write_piece(reader, target, file, rect, handle, offset + start)
        return
    if target.rows is None:
        tensor = torch.empty(whole.rows, whole.cols, dtype=target.dtype)
        reader.read_rect(target.source, PARAM, whole, tensor)
    else:
        tensor = torch.empty(len(target.rows), whole.cols, dtype=target.dtype)
        for i, row in enumerate(target.rows):
            reader.read_rect(target.source, PARAM, Rect(row, 0, 1, whole.cols), tensor[i : i + 1])
    _write_at(handle, offset, memory_of(tensor))


def read_merged(reader: Reader, name: str, adapter: LowRank) -> torch.Tensor:
    """Return a weight with its adapter merged, [outputs, inputs] in fp32."""
    weight, a, b = (_read_whole(reader, n) for n in (name, adapter.a, adapter.b))
    return weight.addmm_(b, a, alpha=adapter.scale)


def _read_whole(reader: Reader, name: str) -> torch.Tensor:
    whole = matrix_of(reader.manifest.tensors[name].shape)
    tensor = torch.empty(whole.rows, whole.cols)
    reader.read_rect(name, PARAM, whole, tensor)
    return tensor


def _write_piece(reader: Reader, target: Target, file: str, rect: Rect, handle: int, offset: int) -> None:
    """Write a piece of a tensor that is contiguous in the target as well as in the checkpoint."""
    source, folder = reader.file(file), reader.folder
    span = source.spans[key_of(target.source, PARAM, rect)]
    if span.dtype == target.dtype and isinstance(folder, LocalFolder):
        _copy(folder.handle(source.stored_in), span.offset, handle, offset, span.num_bytes)
        return
    for first in range(0, rect.numel, _CHUNK_ELEMENTS):
        chunk = torch.empty(min(_CHUNK_ELEMENTS, rect.numel - first), dtype=span.dtype)
        folder.read_into(source.stored_in, span.offset + first * span.dtype.itemsize, memory_of(chunk))
        _write_at(handle, offset + first * target.dtype.itemsize, memory_of(chunk.to(target.dtype)))


def _copy(source: int, source_offset: int, target: int, target_offset: int, num_bytes: int) -> None:
    done = 0
    while done < num_bytes:
        count = min(_COPY_BYTES, num_bytes - done)
        try:
            moved = os.copy_file_range(source, target, count, source_offset + done, target_offset + done)
        except OSError:  # Some file systems do not support this call; any other error is raised again below.
            block = os.pread(source, count, source_offset + done)
            _write_at(target, target_offset + done, memoryview(block))
            moved = len(block)
        if moved == 0:
            raise EOFError("a file of the checkpoint is shorter than its header says")
        done += moved


def _write_at(handle: int, offset: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done:], offset + done)
