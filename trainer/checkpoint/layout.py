"""The contents of a checkpoint: rectangles of named tensors, which are addressed by global offset, never by rank.

Every tensor is viewed as a matrix [rows, cols], whose rows are the first dimension and whose columns are all others. A
rank's part of the tensor, such as a ZeRO-3 partition or a data-parallel shard of a tensor-parallel shard, consists of a
few rectangles of that matrix. A reader that needs other rectangles, for example on another topology, cuts them out of
the saved ones.

This module uses neither files nor engines. `docs/checkpoints.md` describes the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from model.errors import UserError

FORMAT_VERSION = 3
PARAM, EXP_AVG, EXP_AVG_SQ = "param", "exp_avg", "exp_avg_sq"
STEP, FROZEN = "step", "frozen"
"""Prefixes of folder names: of checkpoints, and of frozen weights, which checkpoints share."""
MOMENTS = "moments"
"""The family of the files that contain Adam's moments."""

_FILE_NAME = re.compile(r"(frozen-[0-9a-f-]+/)?[a-z]+(-\d+)?\.(safetensors|json)")
_COMMITTED = re.compile(r"step-(\d{8,})")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")


class Rect(NamedTuple):
    """A rectangle of a tensor's matrix: `rows` rows from `row` on, and `cols` columns from `col` on."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.rows * self.cols

    def overlap(self, other: Rect) -> Rect | None:
        """Return the intersection of two rectangles, or None if it is empty."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        return Rect(row, col, rows, cols) if rows > 0 and cols > 0 else None

    def within(self, outer: Rect) -> tuple[slice, slice]:
        """Return the index of this rectangle in a matrix that contains the elements of `outer`."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.rows), slice(col, col + self.cols)


def matrix_of(shape: Sequence[int]) -> Rect:
    """Return the rectangle that covers a whole tensor of this shape."""
    rows = shape[0] if shape else 1
    return Rect(0, 0, rows, math.prod(shape[1:]))


def rects_of_range(box: Rect, start: int, stop: int) -> Iterator[tuple[int, Rect]]:
    """Split a range of elements of a rectangle into at most three rectangles.

    Args:
        box: The rectangle, whose elements are counted row by row.
        start: The first element of the range.
        stop: The element after the last one of the range.

    Yields:
        The number of elements of the range before the rectangle, and the rectangle.
    """
    assert 0 <= start <= stop <= box.numel, (box, start, stop)
    at = start
    while at < stop:
        row, col = divmod(at, box.cols)
        if col or stop - at < box.cols:
            rect = Rect(box.row + row, box.col + col, 1, min(box.cols - col, stop - at))
        else:
            rect = Rect(box.row + row, box.col, (stop - at) // box.cols, box.cols)
        yield at - start, rect
        at += rect.numel


@dataclass(frozen=True)
class Shard:
    """A rectangle of a named tensor that this rank holds."""

    name: str
    """The tensor's name: `audio.…`, or `llm.…` with Hugging Face's name of the tensor."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    rect: Rect
    """The rectangle that this rank holds."""
    values: Mapping[str, Tensor]
    """Kind of value → [rect.rows, rect.cols], a view of the engine's memory that is saved from and loaded into."""
    step: int | None
    """The number of updates that the optimizer made to the tensor; None if it is not trained."""
    saved_here: bool = True
    """False if another rank holds the same values and saves them."""
    frozen: bool = False
    """True if the tensor never changes in this run, so that one copy serves all checkpoints."""


@dataclass(frozen=True)
class TensorEntry:
    """The entry of one tensor in the manifest."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    """The saved kinds of values: `param`, and Adam's moments if the tensor is trained."""
    step: int | None
    """The number of updates, or None if the tensor is not trained."""
    pieces: tuple[tuple[str, Rect], ...]
    """(file, rectangle) of each piece. The pieces cover every element once. Moments are in the rank's moments file."""


@dataclass(frozen=True)
class FileEntry:
    """The entry of one file in the manifest."""

    size_bytes: int
    checksum: str
    """The XXH3-128 checksum in hexadecimal. It reveals damage, but is not a signature."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`: everything needed to read a checkpoint and to verify it."""

    step: int
    topology: Mapping[str, int]
    """world, tp, pp and ep of the ranks that saved the checkpoint. Generators are restored only if they are equal."""
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    def dumps(self) -> str:
        """Return the manifest as JSON, including a checksum of itself."""
        body = {
            "version": FORMAT_VERSION,
            "step": self.step,
            "topology": dict(self.topology),
            "files": {name: [f.size_bytes, f.checksum] for name, f in self.files.items()},
            "tensors": {name: _entry_to_json(entry) for name, entry in self.tensors.items()},
        }
        return json.dumps({"sha256": _digest(body), "body": body}, separators=(",", ":"))

    @staticmethod
    def loads(text: str) -> Manifest:
        """Invert `dumps`.

        Raises:
            ValueError: If the text was changed, or is not a manifest.
            UserError: If another version of this program wrote it.
        """
        tree = json.loads(text)
        if not isinstance(tree, dict) or set(tree) != {"sha256", "body"} or tree["sha256"] != _digest(tree["body"]):
            raise ValueError("its checksum differs")
        body = tree["body"]
        if body["version"] != FORMAT_VERSION:
            raise UserError(f"checkpoint format {body['version']!r}: this program reads {FORMAT_VERSION}")
        return Manifest(
            step=int(body["step"]),
            topology={str(k): int(v) for k, v in body["topology"].items()},
            files={
                _file_name(name): FileEntry(int(size), _checksum(digest))
                for name, (size, digest) in body["files"].items()
            },
            tensors={name: _entry_from_json(name, entry, body["files"]) for name, entry in body["tensors"].items()},
        )


def step_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"{STEP}-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's name, or None if it is not the name of a checkpoint."""
    found = _COMMITTED.fullmatch(name)
    return int(found[1]) if found else None


def file_of(family: str, rank: int) -> str:
    """Return the name of a rank's file of a family."""
    return f"{family}-{rank:05d}.safetensors"


def file_of_kind(piece_file: str, kind: str) -> str:
    """Return the file that contains one kind of values of a piece.

    Weights are stored separately from moments, so that an export reads nothing else.

    Args:
        piece_file: The file of the piece in the manifest, which contains its weights.
        kind: The kind of values.
    """
    return piece_file if kind == PARAM else f"{MOMENTS}{piece_file[piece_file.rindex('-') :]}"


def rank_of(file: str) -> int:
    """Return the rank that wrote a file; it is 0 for files that have no rank in their name."""
    digits = re.search(r"-(\d+)\.", file)
    return int(digits[1]) if digits else 0


def frozen_folder_of(file: str) -> str | None:
    """Return the folder of frozen weights that contains a file, or None if it is one of the checkpoint's own files."""
    return file.rpartition("/")[0] or None


def key_of(name: str, kind: str, rect: Rect) -> str:
    """Return the key of a piece in its safetensors file."""
    return f"{kind}/{name}@{rect.row},{rect.col}"


def entries_of(shards: Sequence[Shard], file: str) -> dict[str, TensorEntry]:
    """Return the manifest's entries of the shards that one rank wrote to `file`."""
    return _merge((s.name, TensorEntry(s.shape, tuple(s.values), s.step, ((file, s.rect),))) for s in shards)


def merge_entries(parts: Sequence[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """Merge the entries of all ranks into one entry per tensor, and check that every element was saved once."""
    merged = _merge(item for part in parts for item in part.items())
    for name, entry in merged.items():
        covered = sum(rect.numel for _, rect in entry.pieces)
        assert covered == math.prod(entry.shape), f"{name} {entry.shape}: ranks saved {covered} elements"
    return dict(sorted(merged.items()))


def _merge(items: Iterable[tuple[str, TensorEntry]]) -> dict[str, TensorEntry]:
    first: dict[str, TensorEntry] = {}
    pieces: dict[str, list[tuple[str, Rect]]] = {}
    for name, entry in items:
        known = first.setdefault(name, entry)
        same = (known.shape, known.kinds, known.step) == (entry.shape, entry.kinds, entry.step)
        assert same, (
            f"{name} differs: {known.shape} {known.kinds} {known.step}, {entry.shape} {entry.kinds} {entry.step}"
        )
        pieces.setdefault(name, []).extend(entry.pieces)
    return {name: replace(entry, pieces=tuple(pieces[name])) for name, entry in first.items()}


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    pieces = [[file, *rect] for file, rect in entry.pieces]
    return {"shape": list(entry.shape), "kinds": list(entry.kinds), "step": entry.step, "pieces": pieces}


def _entry_from_json(name: str, tree: Mapping[str, Any], files: Mapping[str, Any]) -> TensorEntry:
    shape = tuple(int(n) for n in tree["shape"])
    whole = matrix_of(shape)
    pieces = tuple((file, Rect(*map(int, rect))) for file, *rect in tree["pieces"])
    for file, rect in pieces:
        if file not in files or rect.overlap(whole) != rect:
            raise ValueError(f"{name}: piece {rect} of {file} is not in the tensor or its file not listed")
    step = None if tree["step"] is None else int(tree["step"])
    return TensorEntry(shape, tuple(map(str, tree["kinds"])), step, pieces)


def _file_name(name: str) -> str:
    # The name is used as a path, which must not lead out of the folder.
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a checkpoint's file name")
    return name


def _checksum(digest: str) -> str:
    if not _CHECKSUM.fullmatch(digest):
        raise ValueError("a file's checksum is malformed")
    return digest
