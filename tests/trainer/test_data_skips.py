"""Tests of skipped, padded, joined and augmented samples in the loader."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import UserError
from model.lengths import TokenRate
from tests.trainer.data_corpus import audio_bytes, data_config, row, write_shards
from tests.trainer.loader_runs import BROKEN, run, samples, small_corpus, with_fields
from trainer.data.config import AugmentConfig, DatasetConfig, JoinConfig
from trainer.data.loader import Loader, SkipLog
from trainer.data.prepare import PreparedData, prepare
from trainer.data.stream import SampleStream


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def test_skips_are_counted_listed_once_and_stop_the_run(prepared: PreparedData, tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "run" / "skipped.jsonl")
    with Loader(SampleStream(prepared, seed=5, num_batches=40, on_skip=log)) as loader:
        for _ in loader:
            pass
        counted = loader.num_skipped
    listed = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert counted == Counter(s["reason"] for s in listed) == {"broken": len(listed)}
    assert {s["key"] for s in listed} == BROKEN
    assert {s["set"] for s in listed} == {"a"}
    strict = with_fields(prepared, max_skipped_fraction=0.0)
    with (
        Loader(SampleStream(strict, seed=5, num_batches=40)) as loader,
        pytest.raises(
            UserError,
            match=r"fraction = 0.0: .* had to be skipped \(\d broken\).*\(first: a shard-.*tar a-\d: ",
        ),
    ):
        list(loader)


def test_dataset_without_usable_samples_stops_the_run(tmp_path: Path) -> None:
    bad = samples("a", 3, audio=True, broken={"a-0", "a-1", "a-2"})
    write_shards(tmp_path / "a", bad, per_shard=4)
    data = prepare(data_config(tmp_path, DatasetConfig(name="a", shards="a")), TokenRate((2,)))
    for num_workers in (0, 1):
        with (
            Loader(SampleStream(with_fields(data, num_workers=num_workers), seed=0, num_batches=4)) as loader,
            pytest.raises(UserError, match="6 samples in a row.*tar a-[012]: broken:"),
        ):
            list(loader)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": ""}, "empty_answer"),
        ({"answer": 3}, "wrong_type"),
        ({"instruction": "<SpeechHere>"}, "placeholder_in_text"),
    ],
)
def test_bad_metadata_in_foreign_shards_is_skipped_by_reason(tmp_path: Path, fields: dict, reason: str) -> None:
    good = samples("a", 5, audio=True)
    bad = (row("bad", **fields), [("flac", audio_bytes(0.1))])
    write_shards(tmp_path / "a", [*good, bad], per_shard=9)
    config = data_config(tmp_path, DatasetConfig(name="a", shards="a"), max_skipped_fraction=0.3)
    data = prepare(config, TokenRate((2,)))
    with Loader(SampleStream(data, seed=0, num_batches=9)) as loader:
        keys = {s.key for batch, _ in loader for s in batch.samples}
        assert set(loader.num_skipped) == {reason}
    assert keys == {f"a-{i}" for i in range(5)}


def test_short_clips_are_padded_and_long_ones_skipped(tmp_path: Path) -> None:
    clips = {"short": 0.05, "just": 0.1, "longest": 0.5, "long": 0.6}
    write_shards(tmp_path / "a", [(row(k), [("flac", audio_bytes(sec))]) for k, sec in clips.items()], per_shard=9)
    fields = {"min_audio_sec": 0.1, "max_audio_sec": 0.5, "max_skipped_fraction": 0.5}
    data = prepare(data_config(tmp_path, DatasetConfig(name="a", shards="a"), **fields), TokenRate((2,)))
    with Loader(SampleStream(data, seed=0, num_batches=6)) as loader:
        found = {s.key: s for batch, _ in loader for s in batch.samples}
        assert set(loader.num_skipped) == {"too_long"}
    assert {k: len(s.clips[0]) for k, s in found.items()} == {"short": 1600, "just": 1600, "longest": 8000}
    assert not found["short"].clips[0][800:].any()
    assert found["short"].meta["duration"] == 0.1


def test_joined_clips_have_both_texts(prepared: PreparedData) -> None:
    join = JoinConfig(probability=1.0, max_clips=2, gap_sec=0.0)
    data = with_fields(prepared, join=join, augment=AugmentConfig(), num_lanes=1, global_batch_samples=1)
    batches, _ = run(data, 8)
    joined = [s for b in batches for s in b if len(s.meta.get("joined", ())) == 2]
    assert joined
    for sample in joined:
        assert sample.meta["answer"] == " ".join(f"word {key}" for key in sample.meta["joined"])
        lengths = [round(16_000 * (0.05 + 0.01 * (int(k.split("-")[1]) % 5))) for k in sample.meta["joined"]]
        assert len(sample.clips[0]) == sum(lengths)
        assert len(sample.clips) == 1


@pytest.mark.parametrize(("strength", "varied"), [(1.0, True), (0.0, False)])
def test_a_recording_is_augmented_differently_in_every_lane_and_epoch(
    prepared: PreparedData, strength: float, varied: bool
) -> None:
    data = with_fields(prepared, join=JoinConfig(), augment=AugmentConfig(start=0, end=0, noise_snr_db=10))
    datasets = tuple(replace(s, config=replace(s.config, augment_strength=strength)) for s in data.datasets)
    batches, _ = run(replace(data, datasets=datasets), 40)
    variants: dict[str, list[float]] = {}
    for sample in (s for b in batches for s in b if s.clips):
        variants.setdefault(sample.key, []).append(float(sample.clips[0].double().sum()))
    assert max(map(len, variants.values())) >= 4
    assert all(len(set(v)) == (len(v) if varied else 1) for v in variants.values())
