"""Helpers of the loader's tests, which write a small corpus and load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.batch import Sample
from model.lengths import TokenRate
from tests.trainer.data_corpus import audio_bytes, data_config, row, write_shards
from trainer.data.config import AugmentConfig, DatasetConfig, JoinConfig
from trainer.data.loader import Loader
from trainer.data.prepare import PreparedData, prepare
from trainer.data.state import State, merge_states
from trainer.data.stream import SampleStream

BROKEN = {"a-3", "a-8", "a-9"}


def samples(prefix: str, num: int, *, audio: bool, broken: set[str] = frozenset()) -> list:  # type: ignore[assignment]
    made = []
    for i in range(num):
        key = f"{prefix}-{i}"
        data = b"fLaC, but not really" if key in broken else audio_bytes(0.05 + 0.01 * (i % 5), seed=i)
        clips = [("flac", data)] if audio else []
        made.append((row(key, task="asr" if audio else "text"), clips))
    return made


def small_corpus(root: Path) -> PreparedData:
    """Write a dataset of clips, some of them broken, and a dataset of text, and prepare both."""
    write_shards(root / "a", samples("a", 13, audio=True, broken=BROKEN), per_shard=4)
    write_shards(root / "b", samples("b", 5, audio=False), per_shard=3)
    datasets = (
        DatasetConfig(name="a", shards="a", weight=2.0),
        DatasetConfig(name="b", shards="b", weight=((0.0, 0.0), (0.25, 1.0))),
    )
    augment = AugmentConfig(start=0, end=0.5, speed=0.1, gain_db=6, noise_snr_db=10)
    config = data_config(root, *datasets, max_skipped_fraction=0.5, augment=augment, join=JoinConfig(probability=0.5))
    return prepare(config, TokenRate((2, 2)))


def with_fields(prepared: PreparedData, **fields: Any) -> PreparedData:
    return replace(prepared, config=replace(prepared.config, **fields))


def run(
    prepared: PreparedData, num_batches: int, world: int = 1, state: State | None = None, stop: int | None = None
) -> tuple[list[list[Sample]], State]:
    """Load on `world` ranks, one after another.

    Returns:
        The global batches up to `stop`, with samples in the order of ranks; and the merged data state at `stop`.
    """
    stop = num_batches if stop is None else stop
    states, parts = [], []
    for rank in range(world):
        with Loader(
            SampleStream(prepared, seed=5, num_batches=num_batches, rank=rank, world=world, state=state)
        ) as loader:
            mine = []
            if loader.state["batch"] < stop:
                for batch, reached in loader:
                    assert reached is loader.state
                    mine.append(list(batch.samples))
                    if reached["batch"] == stop:
                        break
            states.append(loader.state)
            parts.append(mine)
    batches = [[s for rank in ranks for s in rank] for ranks in zip(*parts, strict=True)]
    return batches, json.loads(json.dumps(merge_states(states)))


def assert_identical(one: list[list[Sample]], two: list[list[Sample]]) -> None:
    assert [[s.key for s in b] for b in one] == [[s.key for s in b] for b in two]
    for a, b in zip((s for x in one for s in x), (s for x in two for s in x), strict=True):
        assert a.meta == b.meta
        for name in ("token_ids", "audio_mask", "labels", "prompt_ids"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert len(a.clips) == len(b.clips)
        assert all(torch.equal(x, y) for x, y in zip(a.clips, b.clips, strict=True))
