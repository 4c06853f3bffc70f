"""Evaluation samples: prompts without answers, every sample on exactly one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby

import numpy as np

from model.batch import Sample
from model.errors import UserError
from trainer.data.decode import SampleError
from trainer.data.lanes import permutation
from trainer.data.loader import to_sample
from trainer.data.prepare import PreparedData
from trainer.data.source import DatasetReader, SampleSource, Skip, check_skipped

_READERS = 4
"""Threads that read and decode, at least: most of their time they may wait for a bucket."""


def eval_samples(
    prepared: PreparedData,
    split: str,
    rank: int = 0,
    world: int = 1,
    max_samples: int | None = None,
    on_skip: Callable[[Skip], None] = lambda skip: None,
) -> list[Sample]:
    """The part of `split` that is this rank's, over all sets, in a fixed order; a sample of two sets comes once.

    Args:
        prepared: from `prepare`.
        split: one of `data.eval_splits`.
        rank: this process's place among the ranks that share the split.
        world: number of these ranks.
        max_samples: over all ranks; the same random choice every time. Null: all.
        on_skip: called for every sample that cannot be used.

    Raises:
        UserError: no set has the split; too many samples are skipped.
    """
    items = _items(prepared, split)
    if max_samples is not None and max_samples < len(items):
        items = [items[i] for i in sorted(permutation(len(items), "evaluation", split)[:max_samples].tolist())]
    own = items[rank * len(items) // world : (rank + 1) * len(items) // world]
    config = replace(prepared.config, cache_decoded_mib=0)  # every sample is read once
    source = SampleSource(config, prepared.tokenizer, prepared.strides, ctc=False)
    jobs = [
        (reader, shard, indices[start : start + reader.chunk_samples])
        for (reader, shard), group in groupby(own, key=lambda item: item[:2])
        for indices in [[index for _, _, index in group]]
        for start in range(0, len(indices), reader.chunk_samples)
    ]
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    with ThreadPoolExecutor(max(_READERS, config.num_workers)) as pool:
        for made in (m for part in pool.map(lambda job: _make(source, *job), jobs) for m in part):
            if isinstance(made, Skip):
                skipped[made.reason] += 1
                on_skip(made)
            else:
                samples.append(made)
    check_skipped(len(own), skipped, prepared.config.max_skipped_fraction)
    return samples


def _items(prepared: PreparedData, split: str) -> list[tuple[DatasetReader, int, int]]:
    """(reader, shard, index) of every sample of the split, in stored order; one that two sets have comes once."""
    found: dict[tuple[str, int, int], tuple[DatasetReader, int, int]] = {}
    for reader in (s.open(split, prepared.config) for s in prepared.datasets):
        if reader is not None:
            for shard in np.flatnonzero(reader.num_per_shard).tolist():
                for index, entry in enumerate(reader.selected(shard)):
                    found.setdefault((reader.shards.store.url, shard, entry), (reader, shard, index))
    if not found:
        raise UserError(f"data.eval_splits: no set has samples of split '{split}'; name it in data.eval_splits")
    return list(found.values())


def _make(source: SampleSource, reader: DatasetReader, shard: int, indices: Sequence[int]) -> list[Sample | Skip]:
    arrived = reader.read_unchecked(shard, indices)
    made: list[Sample | Skip] = []
    for index in indices:
        try:
            made.append(to_sample(source.evaluation(reader, shard, index, arrived)))
        except SampleError as error:
            made.append(reader.skip(shard, index, error))
    return made
