"""What a checkpoint consists of: rectangles of named tensors, addressed by global offset, never by rank.

Every tensor is seen as a matrix [rows, cols]: rows are its first dimension, columns all others. A rank's part of it, be
it a ZeRO-3 partition or a data-parallel shard of a tensor-parallel shard, is a few rectangles of that matrix. Whoever
needs other rectangles later, on another topology or without one, cuts them out of those that were saved.

Pure: no files, no engines. `docs/checkpoints.md` describes the files.
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
"""Begin the names of folders: of a checkpoint, and of frozen weights, which checkpoints share."""
MOMENTS = "moments"
"""Family of the files that hold Adam's moments."""

_FILE_NAME = re.compile(r"(frozen-[0-9a-f-]+/)?[a-z]+(-\d+)?\.(safetensors|json)")
_COMMITTED = re.compile(r"step-(\d{8,})")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")


class Rect(NamedTuple):
    """Rows `row … row + rows` and columns `col … col + cols` of a tensor's matrix."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def overlap(self, other: Rect) -> Rect | None:
        """What both cover, if anything."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        rows = min(self.row + self.rows, other.row + other.rows) - row
        cols = min(self.col + self.cols, other.col + other.cols) - col
        return Rect(row, col, rows, cols) if rows > 0 and cols > 0 else None

    def within(self, outer: Rect) -> tuple[slice, slice]:
        """Index of this rectangle in a matrix that holds `outer`."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.rows), slice(col, col + self.cols)


def matrix_of(shape: Sequence[int]) -> Rect:
    """All of a tensor of this shape."""
    rows = shape[0] if shape else 1
    return Rect(0, 0, rows, math.prod(shape[1:]))


def rects_of_range(box: Rect, start: int, stop: int) -> Iterator[tuple[int, Rect]]:
    """Elements `start … stop` of `box`, counted row by row, as at most three rectangles; each with its first element's
    distance from `start`."""
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
    """`audio.…` or `llm.…` (Hugging Face names there)."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rect: Rect
    values: Mapping[str, Tensor]
    """By kind, [rect.rows, rect.cols]: views of the engine's own memory, to be saved from and loaded into."""
    step: int | None
    """Updates that the optimizer made to it; None: not learned."""
    saved_here: bool = True
    """False: another rank holds the same and saves it."""
    frozen: bool = False
    """It never changes in this run: one copy serves all checkpoints."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in the manifest."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    step: int | None
    pieces: tuple[tuple[str, Rect], ...]
    """(file, rectangle): together they cover the tensor, once. The moments lie in the rank's file of moments."""


@dataclass(frozen=True)
class FileEntry:
    """One file in the manifest."""

    size_bytes: int
    checksum: str
    """XXH3-128, hexadecimal: against damage, at the speed of memory; it is no signature."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: everything needed to read a checkpoint, and to know that it is whole."""

    step: int
    topology: Mapping[str, int]
    """world, tp, pp, ep of the ranks that saved it; for information, and to know whether generators fit."""
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    def dumps(self) -> str:
        """As JSON, with a checksum of itself."""
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
        """Inverse of `dumps`.

        Raises:
            ValueError: it was changed, or is none of ours.
            UserError: another version of this program wrote it.
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
    """Names the checkpoint after `step` steps."""
    return f"{STEP}-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a checkpoint's name tells; None: it is no checkpoint's name."""
    found = _COMMITTED.fullmatch(name)
    return int(found[1]) if found else None


def file_of(family: str, rank: int) -> str:
    """Name of a rank's file."""
    return f"{family}-{rank:05d}.safetensors"


def file_of_kind(piece_file: str, kind: str) -> str:
    """Where a piece's tensor of some kind lies: weights by themselves, so that an export reads nothing else."""
    return piece_file if kind == PARAM else f"{MOMENTS}{piece_file[piece_file.rindex('-') :]}"


def rank_of(file: str) -> int:
    """The rank that wrote a file."""
    digits = re.search(r"-(\d+)\.", file)
    return int(digits[1]) if digits else 0


def frozen_folder_of(file: str) -> str | None:
    """The folder of frozen files that a file lies in; None: the checkpoint's own."""
    return file.rpartition("/")[0] or None


def key_of(name: str, kind: str, rect: Rect) -> str:
    """Of a piece in its safetensors file."""
    return f"{kind}/{name}@{rect.row},{rect.col}"


def entries_of(shards: Sequence[Shard], file: str) -> dict[str, TensorEntry]:
    """What one rank tells about the shards in its `file`."""
    return _merge((s.name, TensorEntry(s.shape, tuple(s.values), s.step, ((file, s.rect),))) for s in shards)


def merge_entries(parts: Sequence[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """One entry per tensor from what each rank tells; together they must have saved all of it, once."""
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
    # A name from a file is used as a path: it must not lead out of the folder.
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a checkpoint's file name")
    return name


def _checksum(digest: str) -> str:
    if not _CHECKSUM.fullmatch(digest):
        raise ValueError("a file's checksum is malformed")
    return digest
