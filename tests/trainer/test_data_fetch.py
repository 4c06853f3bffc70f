"""Tests that a sample that differs from the index is fetched again, and skipped if it still differs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from model.errors import UserError
from tests.trainer.data_corpus import audio_bytes, row, write_shards
from trainer.data import fetch
from trainer.data.errors import SampleError
from trainer.data.fetch import ReadAhead, read_samples
from trainer.data.shards import RawSample, ShardSet
from trainer.storage.store import LocalStore, UnreachableError

NUM = 13


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = ((row(f"k-{i}"), [("flac", audio_bytes(0.2, seed=i))]) for i in range(NUM))
    return write_shards(tmp_path / "set", samples, per_shard=NUM)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "REFETCH_AFTER_SEC", (0.0, 0.0))


class Recording(LocalStore):
    """A store that records every read, and flips one bit in each of the first `num_bad` reads."""

    def __init__(self, folder: Path, num_bad: int = 0) -> None:
        super().__init__(folder)
        self.reads: list[tuple[int, int]] = []
        self.num_bad = num_bad

    def get_range(self, name: str, offset: int, num_bytes: int, total_bytes: int | None = None) -> memoryview:
        data = super().get_range(name, offset, num_bytes, total_bytes)
        self.reads.append((offset, num_bytes))
        if len(self.reads) > self.num_bad:
            return data
        spoilt = bytearray(data)
        spoilt[len(spoilt) // 2] ^= 1
        return memoryview(spoilt)


def keys(found: fetch.Fetched) -> set[str]:
    return {raw.key for raw in found.values() if isinstance(raw, RawSample)}


def test_neighbouring_samples_take_one_read(folder: Path) -> None:
    store = Recording(folder)
    shards = ShardSet(store)
    assert keys(read_samples(shards, 0, range(NUM))) == {f"k-{i}" for i in range(NUM)}
    assert len(store.reads) == 1
    assert keys(read_samples(shards, 0, [7, 2])) == {"k-7", "k-2"}
    assert len(store.reads) == 2  # the samples in between are read as well


def test_far_samples_are_read_on_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_GAP_BYTES", 0)
    store = Recording(folder)
    assert len(read_samples(ShardSet(store), 0, [0, 11])) == 2
    spans = [ShardSet(store).table(0)[i].span for i in (0, 11)]
    assert store.reads == [(start, end - start) for start, end in spans]
    monkeypatch.setattr(fetch, "MAX_READ_BYTES", 1)
    assert len(read_samples(ShardSet(store), 0, range(NUM))) == NUM
    assert len(store.reads) == 2 + NUM


def test_a_bad_transfer_is_fetched_again(folder: Path) -> None:
    store = Recording(folder, num_bad=2)
    assert keys(read_samples(ShardSet(store), 0, range(NUM))) == {f"k-{i}" for i in range(NUM)}
    first, second, third = store.reads
    assert second == third and second[1] < first[1]  # only the bad sample is fetched again


def test_samples_that_remain_bad_are_skipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Recording(folder, num_bad=3)
    shards = ShardSet(store)
    found = read_samples(shards, 0, range(NUM))
    (bad,) = [raw for raw in found.values() if isinstance(raw, SampleError)]
    assert bad.reason == "altered" and "shard-000000.tar: sample k-" in bad.detail
    assert len(keys(found)) == NUM - 1
    assert caplog.text.count("the sample is skipped") == 1
    store.num_bad = 99  # a sample that is known to be altered is read once more, but not logged again
    num_reads = len(store.reads)
    index = next(i for i, raw in found.items() if isinstance(raw, SampleError))
    assert isinstance(read_samples(shards, 0, [index])[index], SampleError)
    assert len(store.reads) == num_reads + 1 and caplog.text.count("the sample is skipped") == 1


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0" * 512, lambda b: b[:1000]])
def test_a_shard_of_another_size_is_not_used_at_all(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "shard-000000.tar"
    path.write_bytes(change(path.read_bytes()))
    store = Recording(folder)
    shards = ShardSet(store)
    found = read_samples(shards, 0, [0, 1])
    assert {raw.reason for raw in found.values() if isinstance(raw, SampleError)} == {"altered"}
    assert list(shards.quarantined) == [0]
    path.unlink()  # the shard must not be read again
    assert not keys(read_samples(shards, 0, [2]))


def test_an_unreachable_store_quarantines_nothing(folder: Path) -> None:
    class Unreachable(LocalStore):
        def get_range(self, *_: object, **__: object) -> memoryview:  # type: ignore[override]
            raise UnreachableError("s3://x: no usable answer")

    shards = ShardSet(Unreachable(folder))
    with pytest.raises(UserError, match="no usable answer"):
        read_samples(shards, 0, [0])
    assert not shards.quarantined


def test_a_swapped_sample_is_detected(folder: Path) -> None:
    """Check bytes that are intact but belong to a different sample, because the offset table was altered."""
    path = folder / "shard-000000.idx.json"
    table = json.loads(path.read_text())
    table["samples"][3][4], table["samples"][4][4] = table["samples"][4][4], table["samples"][3][4]
    path.write_text(json.dumps(table))
    found = read_samples(ShardSet(LocalStore(folder)), 0, range(NUM))
    assert {i for i, raw in found.items() if isinstance(raw, SampleError)} == {3, 4}


def test_reading_ahead_keeps_to_its_budget() -> None:
    gate = threading.Event()
    ahead = ReadAhead(max_bytes=100, num_threads=2)
    first = ahead.start(lambda: gate.wait() and {}, 60, required=False)
    assert first is not None
    assert ahead.start(dict, 60, required=False) is None
    needed = ahead.start(dict, 60, required=True)
    assert needed is not None and needed.result(timeout=10) == {}
    ahead.release(60)
    gate.set()
    assert first.result(timeout=10) == {}
    ahead.release(60)
    last = ahead.start(dict, 100, required=False)
    assert last is not None and last.result(timeout=10) == {}
    ahead.close()
