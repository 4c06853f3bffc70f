"""The contents of a checkpoint, which are rectangles of named tensors.

The rectangles are addressed by global offset, not by rank.

Every tensor is viewed as a matrix [rows, cols]: the first dimension is the rows, and all other dimensions together are
the columns. The part of a tensor that a rank holds, for example its ZeRO-3 partition, consists of a few rectangles of
that matrix. A reader that needs different rectangles, for example on a different topology, cuts them out of the saved
ones.

This module accesses neither files nor engines. `docs/checkpoints.md` describes the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trainer.checkpoint.rect import Rect, matrix_of, rects_of_range

PARAM, EXP_AVG, EXP_AVG_SQ = "param", "exp_avg", "exp_avg_sq"
STEP, FROZEN = "step", "frozen"
"""The prefixes of the names of folders: `STEP` for a checkpoint, and `FROZEN` for frozen weights, which several
checkpoints may share."""
MOMENTS = "moments"
"""The name of the family of files that contain Adam's moments."""

_COMMITTED = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Slices:
    """Slices of equal size into which a tensor is cut, one for each rank of a group, as in ZeRO-3.

    The size of this description does not depend on the number of ranks. A checkpoint of ten thousand ranks has millions
    of slices, which would be too many to list.
    """

    ranks: range
    """The ranks of the group, in the order of their slices."""
    numel: int
    """The number of elements in a slice. The last slices may be shorter or empty."""

    def rect_of(self, whole: Rect, index: int) -> Iterator[tuple[int, Rect]]:
        """Return the rectangles of the slice with the given index, as `rects_of_range` does."""
        start, stop = (min(i * self.numel, whole.numel) for i in (index, index + 1))
        return rects_of_range(whole, start, stop)


@dataclass(frozen=True)
class Shard:
    """A rectangle of a named tensor that this rank holds."""

    name: str
    """The name of the tensor: `audio.…`, or `llm.` followed by the name that the tensor has in Hugging Face's model."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    rect: Rect
    """The rectangle that this rank holds."""
    values: Mapping[str, Tensor]
    """The values [rect.rows, rect.cols] by kind. Each is a view of the engine's memory, which is read when a checkpoint
    is saved and written when one is loaded."""
    step: int | None
    """The number of updates that the optimizer has made to the tensor; None if the tensor is not trained."""
    saved_here: bool = True
    """False if another rank that holds the same values saves them."""
    frozen: bool = False
    """True if the tensor never changes in this run, so that all checkpoints can share one copy."""
    slices: Slices | None = None
    """The slices that the tensor is cut into, if this rank's slice contains `rect`; None for any other division."""

    def changed(self, values: Mapping[str, Tensor], step: int | None) -> Shard:
        """Return a copy of the shard with different values and a different number of updates.

        This is much faster than `dataclasses.replace`.
        """
        return Shard(self.name, self.shape, self.rect, values, step, self.saved_here, self.frozen, self.slices)


@dataclass(frozen=True)
class TensorEntry:
    """The manifest's entry for one tensor."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    """The kinds of values that are saved: `param`, and Adam's moments if the tensor is trained."""
    step: int | None
    """The number of updates that the optimizer has made to the tensor; None if the tensor is not trained."""
    listed: tuple[tuple[str, Rect], ...]
    """The file and the rectangle of each piece; empty if the tensor is cut into slices."""
    slices: Slices | None = None
    """The slices that the tensor is cut into, or None if its pieces are listed."""
    family: str = ""
    """The family of the files that contain the slices. If the tensor is frozen, the folder of frozen weights precedes
    the family."""

    def pieces(self, wanted: Rect | None = None) -> Iterator[tuple[str, Rect]]:
        """Return the file and the rectangle of each piece that overlaps a rectangle of the tensor.

        All pieces together contain every element of the tensor once. The file is the one with the weights.
        `file_of_kind` returns the file with the moments of the same piece.

        Args:
            wanted: The rectangle, or None for the whole tensor.
        """
        whole = matrix_of(self.shape)
        wanted = whole if wanted is None else wanted
        yield from ((file, rect) for file, rect in self.listed if rect.overlap(wanted))
        if self.slices is not None and wanted.numel:
            first = wanted.row * whole.cols + wanted.col
            last = (wanted.row + wanted.rows - 1) * whole.cols + wanted.col + wanted.cols - 1
            for index in range(first // self.slices.numel, last // self.slices.numel + 1):
                for _, rect in self.slices.rect_of(whole, index):
                    if rect.overlap(wanted):
                        yield file_of(self.family, self.slices.ranks[index]), rect

    @property
    def num_slices(self) -> int:
        """The number of slices that are not empty, or 0 if the pieces are listed."""
        return 0 if self.slices is None else -(-math.prod(self.shape) // self.slices.numel)


def step_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"{STEP}-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the number of steps in the name of a checkpoint, or None if `name` is not the name of a checkpoint."""
    found = _COMMITTED.fullmatch(name)
    return int(found[1]) if found else None


def file_of(family: str, rank: int) -> str:
    """Return the name of a rank's file of one family, such as `audio`, `llm`, `moments` or `rng`."""
    return f"{family}-{rank:05d}.safetensors"


def file_of_kind(piece_file: str, kind: str) -> str:
    """Return the name of the file that contains the values of one kind for a piece.

    Weights are stored separately from moments, so that an export needs to read only the weights.

    Args:
        piece_file: The file that the manifest lists for the piece. It contains the weights.
        kind: The kind of values: `PARAM`, `EXP_AVG` or `EXP_AVG_SQ`.
    """
    return piece_file if kind == PARAM else f"{MOMENTS}{piece_file[piece_file.rindex('-') :]}"


def rank_of(file: str) -> int:
    """Return the rank in the name of a file, or 0 if the name contains no rank."""
    digits = re.search(r"-(\d+)\.", file)
    return int(digits[1]) if digits else 0


def frozen_folder_of(file: str) -> str | None:
    """Return the folder of frozen weights that contains `file`, or None if `file` is in the checkpoint's own folder."""
    return file.rpartition("/")[0] or None


def key_of(name: str, kind: str, rect: Rect) -> str:
    """Return the key under which a piece is stored in its safetensors file."""
    return f"{kind}/{name}@{rect.row},{rect.col}"


def files_of(entries: Iterable[TensorEntry]) -> set[str]:
    """Return the names of the files that contain the weights of tensors."""
    entries = list(entries)
    groups = {(e.family, e.slices.ranks[: e.num_slices]) for e in entries if e.slices is not None}
    listed = {file for entry in entries for file, _ in entry.listed}
    return listed | {file_of(family, rank) for family, ranks in groups for rank in ranks}


def joined_file(folder: str | None, node: int) -> str:
    """Return the name of the joined file of a node, in which the node's ranks store their files of one folder.

    Args:
        folder: The folder of frozen weights; None for the checkpoint's own folder.
        node: The number of the node.
    """
    return f"{'' if folder is None else folder + '/'}node-{node:05d}.joined"


def is_frozen(entry: TensorEntry) -> bool:
    """Return whether a tensor is stored in a folder of frozen weights, which then contains all of its pieces."""
    return frozen_folder_of(entry.family if entry.slices else entry.listed[0][0]) is not None


def entries_of(shards: Sequence[Shard], family: str, rank: int) -> dict[str, TensorEntry]:
    """Return the manifest's entries for the shards that one rank wrote to its file of a family.

    For a tensor that is cut into slices, only the result on the first rank of the slices contains the entry.
    """
    file = file_of(family, rank)
    entries = []
    for s in shards:
        if s.slices is None:
            entries.append((s.name, TensorEntry(s.shape, tuple(s.values), s.step, ((file, s.rect),))))
        elif s.slices.ranks[0] == rank:
            entries.append((s.name, TensorEntry(s.shape, tuple(s.values), s.step, (), s.slices, family)))
    return _merge(entries)


def sliced_elements(shards: Sequence[Shard]) -> dict[range, int]:
    """Return the number of elements in those shards that are slices, by the ranks that share the tensor."""
    counts: dict[range, int] = {}
    for shard in shards:
        if shard.slices is not None:
            counts[shard.slices.ranks] = counts.get(shard.slices.ranks, 0) + shard.rect.numel
    return counts


def merge_entries(
    parts: Sequence[Mapping[str, TensorEntry]], sliced: Sequence[Mapping[range, int]]
) -> dict[str, TensorEntry]:
    """Merge the entries of all ranks into one entry per tensor.

    The ranks must agree on the shape, the kinds and the step of each tensor, and the sizes of its pieces must add up to
    the size of the tensor. If ranks share tensors that are cut into slices, all of their slices must add up to the size
    of these tensors. This function does not check whether pieces overlap.

    Args:
        parts: The result of `entries_of` on each rank.
        sliced: The result of `sliced_elements` on each rank, for the same shards.
    """
    merged = _merge(item for part in parts for item in part.items())
    missing: dict[range, int] = {}
    for name, entry in merged.items():
        numel = math.prod(entry.shape)
        if entry.slices is not None:
            missing[entry.slices.ranks] = missing.get(entry.slices.ranks, 0) + numel
        else:
            covered = sum(rect.numel for _, rect in entry.listed)
            assert covered == numel, f"{name} {entry.shape}: ranks saved {covered} elements"
    for counts in sliced:
        for ranks, count in counts.items():
            missing[ranks] = missing.get(ranks, 0) - count
    assert not any(missing.values()), f"slices miss elements, by their ranks: {missing}"
    return dict(sorted(merged.items()))


def _merge(items: Iterable[tuple[str, TensorEntry]]) -> dict[str, TensorEntry]:
    first: dict[str, TensorEntry] = {}
    pieces: dict[str, list[tuple[str, Rect]]] = {}
    for name, entry in items:
        known = first.setdefault(name, entry)
        assert replace(known, listed=()) == replace(entry, listed=()), f"{name} differs: {known}, {entry}"
        pieces.setdefault(name, []).extend(entry.listed)
    return {name: replace(entry, listed=tuple(pieces[name])) for name, entry in first.items()}
