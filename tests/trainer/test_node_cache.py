"""Tests of a node's cache for byte ranges of shards: it is bounded and shared, and its failures only cost speed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest

from model.lengths import TokenRate
from tests.trainer.data_corpus import audio_bytes, data_config, row, write_shards
from trainer.data.config import DatasetConfig
from trainer.data.fetch import read_samples
from trainer.data.node_cache import QUEUE_BYTES, NodeCache
from trainer.data.prepare import open_shards
from trainer.data.shards import RawSample, Selection, ShardSet, table_name
from trainer.data.stream import StreamSpec, open_readers
from trainer.storage.store import ChangedError, LocalStore

SIZE = 1000


class Bucket:
    """A bucket that records which ranges are fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def range(self, number: int) -> Callable[[], memoryview]:
        def fetch() -> memoryview:
            self.fetched.append(number)
            return memoryview(content(number))

        return fetch


def content(number: int) -> bytes:
    return (b"%d " % number * SIZE)[:SIZE]


def read(cache: NodeCache, bucket: Bucket, number: int) -> None:
    assert cache.read(f"range {number}", bucket.range(number)) == content(number)


def files(folder: Path) -> list[Path]:
    return [p for p in folder.glob("??/*")]


def test_a_range_is_fetched_once_by_all_processes_of_a_node(tmp_path: Path) -> None:
    bucket, first, second = Bucket(), NodeCache(tmp_path / "c", 1 << 20), NodeCache(tmp_path / "c", 1 << 20)
    for number in range(5):
        read(first, bucket, number)
    first.wait()
    for number in range(5):
        read(second, bucket, number)
    assert bucket.fetched == [0, 1, 2, 3, 4]
    assert first.read("range 0", bucket.range(0), fresh=True) == content(0)
    assert bucket.fetched[5:] == [0]


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = Event()
    rename = os.replace

    def slow(*args: str) -> None:
        assert may_write.wait(10)
        rename(*args)

    monkeypatch.setattr("trainer.data.node_cache.os.replace", slow)
    bucket, cache = Bucket(), NodeCache(tmp_path / "c", 1 << 20, queue_bytes=SIZE // 2)
    for number in range(3):  # the first range may wait although it is larger than the queue
        read(cache, bucket, number)
    may_write.set()
    cache.wait()
    for number in range(3):
        read(cache, bucket, number)
    assert bucket.fetched == [0, 1, 2, 1, 2]


def test_datasets_of_a_process_share_a_cache_and_those_of_a_rank_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardSet(LocalStore(write_shards(tmp_path / "s", [(row("a"), [])], per_shard=1))).index
    monkeypatch.setattr("trainer.data.prepare.open_store", lambda url, retry_sec: SimpleNamespace(url=url))
    fields = {"node_cache_gib": 1.0, "node_cache_dir": str(tmp_path / "c"), "num_workers": 4}
    config = data_config(tmp_path, **fields)
    datasets = tuple((DatasetConfig(name=n, shards=n), f"s3://b/{n}", index, Selection()) for n in "ab")
    spec = StreamSpec(config, datasets, "", TokenRate((2,)), (), None, None, 0, 1)
    caches = [reader.shards.cache for reader in open_readers(spec)]  # a decoding process opens them like this
    caches += [open_shards("s3://b/c", index, config).cache]
    assert caches[0] is not None and all(c is caches[0] for c in caches)
    assert caches[0].queue_bytes * 4 == QUEUE_BYTES
    assert open_shards("s3://b/c", index, replace(config, node_cache_gib=0.0)).cache is None


def test_damaged_ranges_are_fetched_again(tmp_path: Path) -> None:
    bucket, cache = Bucket(), NodeCache(tmp_path / "c", 1 << 20)
    read(cache, bucket, 0)
    cache.wait()
    (path,) = files(tmp_path / "c")
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + b"x" + whole[101:], whole + b"x"):
        path.write_bytes(damaged)
        read(cache, bucket, 0)
        cache.wait()
        assert path.read_bytes() == whole
    assert len(bucket.fetched) == 5


def test_the_oldest_ranges_are_deleted(tmp_path: Path) -> None:
    bucket, cache = Bucket(), NodeCache(tmp_path / "c", 20 * SIZE)
    for number in range(100):
        read(cache, bucket, number)
        cache.wait()
        read(cache, bucket, 0)  # range 0 is used often, so it stays young
        for path in files(tmp_path / "c"):
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))
        assert sum(p.stat().st_size for p in files(tmp_path / "c")) <= 23 * (SIZE + 8)
    assert bucket.fetched.count(0) == 1
    read(cache, bucket, 99)
    assert bucket.fetched.count(99) == 1


@pytest.mark.parametrize("fault", ["full", "shared", "file"])
def test_a_cache_that_fails_only_costs_speed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "c"
    if fault == "shared":
        folder.mkdir()
        folder.chmod(0o777)
    elif fault == "file":
        folder.write_bytes(b"")
    else:

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("trainer.data.node_cache.os.replace", full)
    bucket, cache = Bucket(), NodeCache(folder, 1 << 20)
    for number in (0, 1, 0, 1):
        read(cache, bucket, number)
        cache.wait()
    assert bucket.fetched == [0, 1, 0, 1]
    assert caplog.text.count("data.node_cache_dir") == 1
    assert fault == "file" or files(folder) == []


def test_offset_tables_are_cached_and_wrong_ones_are_fetched_again(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", [(row("a"), [("flac", audio_bytes(0.1))])], per_shard=1)
    cache = NodeCache(tmp_path / "c", 1 << 20)
    path = folder / table_name(ShardSet(LocalStore(folder)).shards[0].name)
    right = path.read_bytes()
    path.write_bytes(right.replace(b'"sha256"', b'"sha257"'))
    with pytest.raises(ChangedError, match="another version"):
        ShardSet(LocalStore(folder), cache=cache).table(0)
    cache.wait()
    path.write_bytes(right)
    shards = ShardSet(LocalStore(folder), cache=cache)
    assert [entry.key for entry in shards.table(0)] == ["a"]
    cache.wait()
    path.unlink()
    assert ShardSet(shards.store, shards.index, cache=cache).table(0) == shards.table(0)


def test_wrong_bytes_from_the_bucket_do_not_stay_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.fetch.REFETCH_AFTER_SEC", (0.01, 0.01))
    folder = write_shards(tmp_path / "s", [(row("a"), [("flac", audio_bytes(0.1))])], per_shard=1)
    shards = ShardSet(LocalStore(folder), cache=NodeCache(tmp_path / "c", 1 << 20))
    right, wrong = shards.store.get_range, iter([True])

    def get_range(*args: object) -> memoryview:
        data = memoryview(bytearray(right(*args)))  # type: ignore[arg-type]
        if next(wrong, False):
            data[5] ^= 1
        return data

    monkeypatch.setattr(shards.store, "get_range", get_range)
    assert isinstance(read_samples(shards, 0, [0])[0], RawSample)
    assert shards.cache is not None
    shards.cache.wait()
    monkeypatch.setattr(shards.store, "get_range", None)
    assert isinstance(read_samples(shards, 0, [0])[0], RawSample)
