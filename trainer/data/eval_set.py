"""Load evaluation samples, which are prompts without answers. Exactly one rank loads each sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, groupby

import numpy as np

from model.batch import Sample
from model.errors import UserError
from trainer.data.dataset_reader import DatasetReader, Skip, check_skipped
from trainer.data.errors import SampleError
from trainer.data.lanes import permutation
from trainer.data.loader import to_sample
from trainer.data.prepare import PreparedData
from trainer.data.source import SampleSource

_READERS = 4
"""The minimum number of threads that read and decode. It exceeds the default of `data.num_workers`, because threads
that read from a bucket spend most of their time waiting."""


def eval_samples(
    prepared: PreparedData,
    split: str,
    rank: int = 0,
    world: int = 1,
    max_samples: int | None = None,
    on_skip: Callable[[Skip], None] = lambda skip: None,
) -> list[Sample]:
    """Load this rank's part of an evaluation split, over all datasets and in a fixed order.

    A sample that belongs to two datasets is loaded once.

    Args:
        prepared: The result of `prepare`.
        split: One of `data.eval_splits`.
        rank: The index of this process among the ranks that share the split.
        world: The number of these ranks.
        max_samples: The largest number of samples over all ranks, drawn at random but the same in every call; None for
            all.
        on_skip: A function that is called for every sample that cannot be used. The result does not contain these
            samples.

    Raises:
        UserError: If no dataset has the split, or too many samples are skipped.
    """
    items = _items(prepared, split)
    if max_samples is not None and max_samples < len(items):
        items = [items[i] for i in sorted(permutation(len(items), "evaluation", split)[:max_samples].tolist())]
    own = items[rank * len(items) // world : (rank + 1) * len(items) // world]
    config = replace(prepared.config, cache_decoded_mib=0)  # Every sample is read only once.
    source = SampleSource(config, prepared.tokenizer, prepared.rate, max_tokens=prepared.max_tokens)
    chunks = [
        (reader, shard, indices[start : start + reader.chunk_samples])
        for (reader, shard), group in groupby(own, key=lambda item: item[:2])
        for indices in [[index for _, _, index in group]]
        for start in range(0, len(indices), reader.chunk_samples)
    ]
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    first: dict[str, Skip] = {}
    with ThreadPoolExecutor(max(_READERS, config.num_workers)) as pool:
        for item in chain.from_iterable(pool.map(lambda chunk: _load(source, *chunk), chunks)):
            if isinstance(item, Skip):
                skipped[item.reason] += 1
                first.setdefault(item.reason, item)
                on_skip(item)
            else:
                samples.append(item)
    check_skipped(len(own), skipped, prepared.config.max_skipped_fraction, first)
    return samples


def _items(prepared: PreparedData, split: str) -> list[tuple[DatasetReader, int, int]]:
    """Return the reader, shard and index of every sample of the split, in stored order and without duplicates."""
    found: dict[tuple[str, int, int], tuple[DatasetReader, int, int]] = {}
    for reader in (s.open(split, prepared.config) for s in prepared.datasets):
        if reader is not None:
            for shard in np.flatnonzero(reader.num_per_shard).tolist():
                for index, entry in enumerate(reader.selected(shard)):
                    found.setdefault((reader.shards.store.url, shard, entry), (reader, shard, index))
    if not found:
        raise UserError(f"data.eval_splits: no dataset has samples of split '{split}'; check the name of the split")
    return list(found.values())


def _load(source: SampleSource, reader: DatasetReader, shard: int, indices: Sequence[int]) -> list[Sample | Skip]:
    received = reader.read_unchecked(shard, indices)
    loaded: list[Sample | Skip] = []
    for index in indices:
        try:
            loaded.append(to_sample(source.evaluation(reader, shard, index, received)))
        except SampleError as error:
            loaded.append(reader.skip(shard, index, error))
    return loaded
