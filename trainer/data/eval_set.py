"""Evaluation samples: prompts without answers, every sample on exactly one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from model.batch import Sample
from model.errors import UserError
from trainer.data.decode import SampleError
from trainer.data.lanes import permutation
from trainer.data.prepare import PreparedData
from trainer.data.source import SampleSource, SetReader, Skip, check_skipped


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
    found: dict[tuple[str, int, int], SetReader] = {}
    for reader in (s.open(split) for s in prepared.sets):
        if reader is not None:
            for shard in range(len(reader.num_per_shard)):
                for index in reader.selected(shard):
                    found.setdefault((reader.shards.store.url, shard, index), reader)
    if not found:
        raise UserError(f"data.eval_splits: no set has samples of split '{split}'; name it in data.eval_splits")
    items = list(found.items())
    if max_samples is not None and max_samples < len(items):
        items = [items[i] for i in sorted(permutation(len(items), "evaluation", split)[:max_samples].tolist())]
    config = replace(prepared.config, cache_decoded_mib=0)  # every sample is read once
    source = SampleSource(config, prepared.tokenizer, prepared.strides, ctc=False)
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    own = items[rank::world]
    with ThreadPoolExecutor(max(1, config.num_workers)) as pool:
        for made in pool.map(lambda item: _make(source, *item), own):
            if isinstance(made, Skip):
                skipped[made.reason] += 1
                on_skip(made)
            else:
                samples.append(made)
    check_skipped(len(own), skipped, prepared.config.max_skipped_fraction)
    return samples


def _make(source: SampleSource, address: tuple[str, int, int], reader: SetReader) -> Sample | Skip:
    _, shard, index = address
    try:
        return source.evaluation(reader, shard, index)
    except SampleError as error:
        return reader.skip(shard, index, error)
