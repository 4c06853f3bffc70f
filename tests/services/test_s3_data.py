"""Tests of reading training data from a real S3 server that fails in typical ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.lengths import TokenRate
from tests.services.relay import slow_line
from tests.services.swift import Swift
from tests.trainer.data_corpus import audio_bytes, data_config, row, write_shards
from trainer.data.config import DatasetConfig
from trainer.data.dataset_reader import Skip
from trainer.data.loader import Loader
from trainer.data.prepare import PreparedData, prepare
from trainer.data.stream import SampleStream
from trainer.storage.open import open_store

ROOT = Path(__file__).parents[2]
NUM_SAMPLES, PER_SHARD = 48, 16


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three shards of about 0.2 MB each to disk."""
    root = tmp_path_factory.mktemp("corpus")
    rows = (row(f"k-{i}", split="test" if i % 12 == 0 else "train") for i in range(NUM_SAMPLES))
    write_shards(root / "set", ((r, [("flac", audio_bytes(0.4, seed=i))]) for i, r in enumerate(rows)), PER_SHARD)
    return root


def upload(local: Path, url: str) -> None:
    store = open_store(url)
    for path in sorted((local / "set").iterdir()):
        store.put(path.name, [path.read_bytes()])


def prepared(root: str, local: Path, **fields: Any) -> PreparedData:
    base = {"read_kib": 64, "read_ahead_mib": 0, "cache_decoded_mib": 0, "cache_dir": str(local / "cache")}
    config = data_config(local, DatasetConfig(name="set", shards="set"), **{**base, **fields})
    return prepare(replace(config, root=root), TokenRate((2,)))


def keys(data: PreparedData, num_batches: int, skips: list[Skip] | None = None) -> list[str]:
    on_skip = (lambda skip: None) if skips is None else skips.append
    with Loader(SampleStream(data, seed=3, num_batches=num_batches, on_skip=on_skip)) as loader:
        return [s.key for batch, _ in loader for s in batch.samples]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_server_that_is_killed_for_ten_seconds_costs_no_sample(
    server: Swift, swift: Swift, local: Path, num_workers: int
) -> None:
    url = f"s3://bucket/killed{num_workers}"
    upload(local, f"{url}/set")
    expected = keys(prepared(str(local), local), 40)
    found: list[str] = []
    back = threading.Timer(10.0 if num_workers == 0 else 3.0, server.start_proxy)
    with Loader(SampleStream(prepared(url, local, num_workers=num_workers), seed=3, num_batches=40)) as loader:
        for number, (batch, _) in enumerate(loader):
            found += [s.key for s in batch.samples]
            if number == 2:
                server.kill_proxy()
                back.start()
    back.join()
    assert found == expected
    # The training split has 44 samples, so 80 draws are one epoch and most of a second one.
    assert set(Counter(found).values()) <= {1, 2} and len(set(found)) == 44


def test_network_outage_does_not_block_while_the_buffer_has_data(server: Swift, swift: Swift, local: Path) -> None:
    upload(local, "s3://bucket/ahead/set")
    data = prepared("s3://bucket/ahead", local, read_kib=128, read_ahead_mib=16)
    with Loader(SampleStream(data, seed=3, num_batches=200)) as loader:
        batches = iter(loader)
        next(batches)
        time.sleep(1.0)  # lets the next reads arrive
        server.kill_proxy()
        try:
            start = time.monotonic()
            for _ in range(6):  # each lane reads eight samples at a time, and the next eight in advance
                next(batches)
            assert time.monotonic() - start < 0.5
        finally:
            server.start_proxy()


def test_a_slow_server_gives_the_same_samples(swift: Swift, local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(local, "s3://bucket/slow/set")
    with slow_line(swift.port, bytes_per_sec=400_000) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        start = time.monotonic()
        found = keys(prepared("s3://bucket/slow", local), 22)
    assert time.monotonic() - start > 0.5  # the connection was slow
    assert found == keys(prepared(str(local), local), 22)


def test_a_shard_cut_at_a_member_boundary_is_quarantined_by_name(
    swift: Swift, local: Path, caplog: pytest.LogCaptureFixture
) -> None:
    upload(local, "s3://bucket/cut/set")
    store = open_store("s3://bucket/cut/set")
    table = json.loads(store.get("shard-000001.idx.json"))
    boundary = table["samples"][9][4][0][1] - 512  # the start of the tenth sample's header
    store.put("shard-000001.tar", [store.get("shard-000001.tar")[:boundary]])
    skips: list[Skip] = []
    found = keys(prepared("s3://bucket/cut", local, max_skipped_fraction=0.5), 30, skips)
    assert {s.shard for s in skips} == {"shard-000001.tar"} and {s.reason for s in skips} == {"altered"}
    assert "its index says" in skips[0].detail and "s3://bucket/cut/set/shard-000001.tar" in skips[0].detail
    cut = {f"k-{i}" for i in range(PER_SHARD, 2 * PER_SHARD)}
    assert not set(found) & cut
    assert set(found) == {f"k-{i}" for i in range(NUM_SAMPLES) if i % 12} - cut
    assert caplog.text.count("s3://bucket/cut/set/shard-000001.tar is quarantined") == 1


def test_shard_altered_after_indexing_loses_only_the_altered_samples(swift: Swift, local: Path) -> None:
    upload(local, "s3://bucket/altered/set")
    store = open_store("s3://bucket/altered/set")
    table = json.loads(store.get("shard-000002.idx.json"))
    (key, *_, members), data = table["samples"][5], bytearray(store.get("shard-000002.tar"))
    data[members[0][1] + members[0][2] // 2] ^= 1  # flips one bit of the audio, which FLAC may decode without an error
    store.put("shard-000002.tar", [bytes(data)])
    skips: list[Skip] = []
    found = keys(prepared("s3://bucket/altered", local, max_skipped_fraction=0.5), 30, skips)
    assert {(s.key, s.reason, s.shard) for s in skips} == {(key, "altered", "shard-000002.tar")}
    assert set(found) == {f"k-{i}" for i in range(NUM_SAMPLES) if i % 12} - {key}


def test_missing_shard_is_quarantined(swift: Swift, local: Path) -> None:
    upload(local, "s3://bucket/gone/set")
    open_store("s3://bucket/gone/set").delete("shard-000000.tar")
    open_store("s3://bucket/gone/set").delete("shard-000001.idx.json")
    skips: list[Skip] = []
    found = keys(prepared("s3://bucket/gone", local, max_skipped_fraction=0.9), 20, skips)
    assert {s.shard for s in skips} == {"shard-000000.tar", "shard-000001.tar"}
    assert set(found) == {f"k-{i}" for i in range(2 * PER_SHARD, NUM_SAMPLES) if i % 12}


def trainer(run_dir: Path, local: Path, shards: str) -> subprocess.Popen[str]:
    overrides = [
        "parallel.num_ranks=1",
        "train.steps=16",
        "checkpoint.every_steps=0",
        "data.datasets.0.manifest=null",
        f"data.datasets.0.shards={shards}",
        f"data.cache_dir={local / 'cache'}",
        "data.read_kib=32",
        "data.read_ahead_mib=0",
        "data.cache_decoded_mib=0",
        "data.retry_sec=2",
        f"train.run_dir={run_dir}",
    ]
    command = [sys.executable, "-m", "trainer", "debug", *overrides]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(run_dir: Path) -> dict[int, float]:
    path = run_dir / "debug" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {d["step"]: d["train/loss"] for d in lines if "train/loss" in d}


def finish(run: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    return run.returncode, errors


@pytest.mark.timeout(300)
def test_permanently_unreachable_server_stops_the_run_after_saving_its_state(
    server: Swift, swift: Swift, local: Path, tmp_path: Path
) -> None:
    """Check also that the same command then resumes the run, with the same losses as a run that reads from disk."""
    upload(local, "s3://bucket/away/set")
    code, errors = finish(trainer(tmp_path / "disk", local, str(local / "set")))
    assert code == 0, errors
    run = trainer(tmp_path / "s3", local, "s3://bucket/away/set")
    while len(losses(tmp_path / "s3")) < 3 and run.poll() is None:
        time.sleep(0.02)
    server.kill_proxy()
    try:
        code, errors = finish(run)
    finally:
        server.start_proxy()
    assert code == 2 and "Traceback" not in errors and server.secret not in errors
    (line,) = [x for x in errors.splitlines() if x.startswith("error:")]
    assert "s3://bucket/away/set/shard-" in line and "no usable answer within 2 s" in line
    done = max(losses(tmp_path / "s3"))
    assert 3 <= done < 16 and f"the state after step {done} is saved in" in line
    assert (tmp_path / "s3" / "debug" / "checkpoints" / f"step-{done:08d}").is_dir()
    code, errors = finish(trainer(tmp_path / "s3", local, "s3://bucket/away/set"))
    assert code == 0 and f"resuming at step {done}" in errors, errors
    assert losses(tmp_path / "s3") == losses(tmp_path / "disk")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_second_epoch_is_read_from_the_cache_of_the_node(
    server: Swift, swift: Swift, local: Path, tmp_path: Path, num_workers: int
) -> None:
    url = f"s3://bucket/cached{num_workers}"
    upload(local, f"{url}/set")
    cached = {"node_cache_gib": 0.1, "node_cache_dir": str(tmp_path / "cache")}
    expected = keys(prepared(str(local), local), 66)
    found: list[str] = []
    data = prepared(url, local, retry_sec=1.0, num_workers=num_workers, **cached)
    # An epoch has 44 samples in 22 batches. The server is killed in the third epoch, which only the cache can provide.
    try:
        with Loader(SampleStream(data, seed=3, num_batches=66)) as loader:
            for number, (batch, _) in enumerate(loader):
                found += [s.key for s in batch.samples]
                if number == 46:
                    deadline = time.monotonic() + 10
                    while time.monotonic() < deadline and len(list((tmp_path / "cache").glob("??/*"))) < 9:
                        time.sleep(0.05)
                    server.kill_proxy()
    finally:
        server.start_proxy()
    assert found == expected
