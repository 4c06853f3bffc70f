"""The lengths of a recipe's samples, read from the indexes of its shards and from its manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from model.errors import UserError
from trainer.config.schema import Recipe
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.config_files import place_of
from trainer.data.lanes import DatasetMixture
from trainer.data.manifest import Row, read_manifest
from trainer.data.shards import INDEX_NAME, Selection, ShardSet, read_index
from trainer.scoring.fields import is_amount
from trainer.storage.open import open_store, scheme_of
from trainer.storage.store import MissingError

_MOST_TABLES = 32
"""The largest number of offset tables per dataset from which lengths are read."""
_MOST_HEADERS = 2000
"""The largest number of samples per dataset whose audio headers are read, if a manifest lacks durations."""
_PROGRESS_POINTS = 200
"""The number of points in a run at which the weights of datasets are evaluated, to compute their mean."""

Seconds = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """The number and the lengths of the training samples that the recipe selects from one dataset."""

    num_samples: int
    """The number of samples."""
    hours: float
    """The total duration of their audio in hours."""
    seconds: Seconds = field(repr=False)
    """The total duration of each sample's clips in seconds, [n], in ascending order; 0 for a sample without audio. The
    n samples are spread evenly over the dataset; samples with a clip longer than `data.max_audio_sec` are skipped."""
    num_clips: Ints = field(repr=False)
    """The number of clips of each of these n samples."""
    num_too_long: int
    """The estimated number of samples, among all `num_samples`, with a clip longer than `data.max_audio_sec`."""
    num_bytes: int = 0
    """The size of the shards in bytes; 0 if the dataset is a manifest, whose shards are built later."""

    @property
    def num_usable(self) -> int:
        """The number of samples that are not too long."""
        return max(0, self.num_samples - self.num_too_long)


@dataclass(frozen=True)
class DatasetSummary:
    """The share of a run's samples that is drawn from one dataset, and the lengths of these samples."""

    name: str
    lengths: Lengths
    share: float
    """The fraction of a step's samples that is drawn from the dataset, averaged over the whole run."""
    epochs: float
    """How often the run reads each sample of the dataset on average."""


@dataclass(frozen=True)
class DataSummary:
    """The shares and lengths of the samples that a run reads from its datasets."""

    datasets: tuple[DatasetSummary, ...]
    max_skipped_fraction: float
    """The value of `data.max_skipped_fraction`."""

    @property
    def skipped_fraction(self) -> float:
        """The fraction of the drawn samples that the run skips because they are too long."""
        return sum(d.share * d.lengths.num_too_long / d.lengths.num_samples for d in self.datasets)

    def batch(self, num_samples: int) -> tuple[Seconds, Ints]:
        """Return the total audio duration and the number of clips of each of `num_samples` samples.

        The samples follow the share and the length distribution of each dataset.
        """
        exact = np.array([d.share * num_samples for d in self.datasets])
        counts = np.floor(exact).astype(np.int64)
        # Round up the largest remainders, so that the counts add up to `num_samples`.
        missing = num_samples - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
        seconds, clips = [], []
        for one, count in zip(self.datasets, counts.tolist(), strict=True):
            known = one.lengths
            places = ((np.arange(count) + 0.5) / max(1, count) * len(known.seconds)).astype(np.int64)
            seconds.append(known.seconds[places])
            clips.append(known.num_clips[places])
        return np.concatenate(seconds), np.concatenate(clips)


def is_local(data: DataConfig) -> bool:
    """Return whether all datasets have paths on this machine rather than URLs. The paths need not exist."""
    return not any(scheme_of(place_of(data, part)) for part in data.datasets)


def is_present(data: DataConfig) -> bool:
    """Return whether all datasets are on this machine: their manifests, or the indexes of their shards."""
    return (
        bool(data.datasets)
        and is_local(data)
        and all(
            (
                Path(place_of(data, part)) / INDEX_NAME if part.shards is not None else Path(place_of(data, part))
            ).is_file()
            for part in data.datasets
        )
    )


def summarize(recipe: Recipe) -> DataSummary:
    """Read the lengths of a recipe's training samples.

    For shards, the number of samples and the total hours are read from the index, and lengths are read from the offset
    tables of at most 32 shards per dataset. If rows of a manifest have no `duration`, lengths are read from the
    headers of the audio files of at most 2000 samples per dataset. Neither audio nor text is read.

    Raises:
        UserError: If a dataset is missing or cannot be read, has no samples to train on, or has only samples that are
            too long.
    """
    data = recipe.staged_data
    if not data.datasets:
        raise UserError("data.datasets is empty: specify at least one dataset with a manifest or shards")
    lengths = [_lengths(data, part) for part in data.datasets]
    counts = [one.num_samples for one in lengths]
    mixture = DatasetMixture(data.datasets, recipe.seed, data.num_lanes, 1, counts, data.temperature)
    shares = np.zeros(len(counts))
    for point in range(_PROGRESS_POINTS):
        weights = np.array(mixture.weights_at((point + 0.5) / _PROGRESS_POINTS))
        shares += weights / weights.sum() / _PROGRESS_POINTS
    drawn = recipe.train.steps * data.global_batch_samples
    found = [
        DatasetSummary(part.name, one, float(share), float(share) * drawn / max(1, one.num_usable))
        for part, one, share in zip(data.datasets, lengths, shares, strict=True)
    ]
    return DataSummary(tuple(found), data.max_skipped_fraction)


def _lengths(data: DataConfig, part: DatasetConfig) -> Lengths:
    found = _of_shards(data, part) if part.shards is not None else (*_of_manifest(data, part), 0)
    total, hours, seconds, clips, num_bytes = found
    # The clips of a sample are assumed to be equally long.
    each = seconds / np.maximum(1, clips)
    where = f"data.datasets '{part.name}'"
    if not total:
        raise UserError(
            f"{where}: {place_of(data, part)} has no samples of split '{part.split}' with the selected tasks and "
            "subsets; change them"
        )
    limit = data.max_audio_sec
    fits = each <= limit if limit is not None else np.ones(len(each), dtype=bool)
    if not fits.any():
        raise UserError(
            f"data.max_audio_sec = {limit:g}: all samples of {where} are longer; raise it, or remove the dataset"
        )
    padded = np.where(seconds > 0, clips * np.maximum(each, data.min_audio_sec), 0.0)[fits]
    order = np.argsort(padded, kind="stable")
    return Lengths(total, hours, padded[order], clips[fits][order], round(total * float(1 - fits.mean())), num_bytes)


def _of_shards(data: DataConfig, part: DatasetConfig) -> tuple[int, float, Seconds, Ints, int]:
    """Return the number of samples, the total hours, the duration and number of clips of each sample that was read, and
    the size in bytes.
    """
    url = place_of(data, part)
    store = open_store(url, data.retry_sec)
    try:
        shards = ShardSet(store, read_index(store))
    except MissingError:
        raise UserError(
            f"data.datasets '{part.name}': there is no {url}/{INDEX_NAME}; check data.root = {data.root}, or make "
            "shards with `earshot shards make`"
        ) from None
    selection = Selection(part.split, part.tasks, part.subsets)
    chosen = [group for group in shards.index.groups if selection.matches(group)]
    numbers = np.flatnonzero(shards.num_selected(selection))
    read = numbers[np.linspace(0, len(numbers) - 1, min(_MOST_TABLES, len(numbers))).astype(np.int64)]
    entries = [entry for shard in read.tolist() for entry in shards.table(shard) if selection.matches(entry)]
    seconds = np.array([entry.seconds if entry.num_clips else 0.0 for entry in entries], dtype=np.float64)
    clips = np.array([entry.num_clips for entry in entries], dtype=np.int64)
    total = sum(group.num_samples for group in chosen)
    hours = sum(group.seconds for group in chosen) / 3600
    return total, hours, seconds, clips, shards.index.num_bytes


def _of_manifest(data: DataConfig, part: DatasetConfig) -> tuple[int, float, Seconds, Ints]:
    """Return the result of `_of_shards` without the size. The hours are estimated from the lengths that are read."""
    path = Path(place_of(data, part))
    if scheme_of(str(data.root)) or not path.is_file():
        raise UserError(f"data.datasets '{part.name}': {path}: no such file; check data.root = {data.root}")
    rows = [r for r in read_manifest(path, part.split) if r.error is None and _is_selected(r, part)]
    known = [r for r in rows if _given_seconds(r) is not None]
    if len(known) < len(rows):
        known = rows[:: max(1, -(-len(rows) // _MOST_HEADERS))]
    seconds = np.array([_seconds(row) for row in known], dtype=np.float64)
    clips = np.array([len(row.audio) for row in known], dtype=np.int64)
    hours = float(seconds.mean()) * len(rows) / 3600 if known else 0.0
    return len(rows), hours, seconds, clips


def _is_selected(row: Row, part: DatasetConfig) -> bool:
    fields: Sequence[tuple[str, tuple[str, ...]]] = (("task", part.tasks), ("subset", part.subsets))
    return all(not allowed or row.metadata.get(name, "") in allowed for name, allowed in fields)


def _given_seconds(row: Row) -> float | None:
    duration = row.metadata.get("duration")
    if not row.audio:
        return 0.0
    return float(duration) if is_amount(duration) and duration > 0 else None


def _seconds(row: Row) -> float:
    given = _given_seconds(row)
    if given is not None:
        return given
    total = 0.0
    for path in row.audio:
        try:
            total += soundfile.info(str(path)).duration
        except soundfile.LibsndfileError:
            pass  # The loader skips such a sample and reports it.
    return total
