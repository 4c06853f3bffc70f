"""Tests of reading our shards in a pipeline of the webdataset library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.trainer.data_corpus import audio_bytes, row, write_shards
from trainer.data.decode import decode_audio
from trainer.data.webdataset_pipeline import shard_pipeline


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = []
    for i in range(12):
        clips = [("flac", audio_bytes(0.1, seed=i)), ("wav", audio_bytes(0.2, seed=i, kind="WAV"))][: 1 + i % 2]
        samples.append((row(f"k{i}", audio="x", split="dev" if i % 3 == 0 else "train"), clips))
    return write_shards(tmp_path_factory.mktemp("pipeline"), samples, per_shard=3)


def test_samples_have_their_clips_and_fields(shards: Path) -> None:
    found = list(shard_pipeline(str(shards)))
    assert [s["__key__"] for s in found] == [f"k{i}" for i in range(12)]
    for i, sample in enumerate(found):
        assert sample["fields"]["answer"] == f"word k{i}"
        wanted = [audio_bytes(0.1, seed=i), audio_bytes(0.2, seed=i, kind="WAV")][: 1 + i % 2]
        assert len(sample["audio"]) == len(wanted)
        assert all(np.array_equal(a, decode_audio(b)) for a, b in zip(sample["audio"], wanted, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_workers_share_the_shards_of_a_split(shards: Path) -> None:
    loader = DataLoader(shard_pipeline(str(shards), split="train", shuffle=5, seed=3), batch_size=None, num_workers=2)
    keys = [sample["__key__"] for sample in loader]
    assert sorted(keys) == sorted(f"k{i}" for i in range(12) if i % 3)
