"""Compare the throughput of our loader with obstore alone for shards on a local S3 server (Swift).

    python -m bench.loader_s3 FOLDER_OF_SHARDS TOKENIZER        started by `bench.loader --parts s3`

The variants that are compared (*arms*) take turns:

- `obstore` fetches whole objects, one or four at a time, and discards them.
- `ours` reads all samples in stored order, chunk by chunk with ranged reads, with several chunk sizes. It verifies each
  sample against the index and parses its metadata.
- `ours + decode` and `obstore + decode` also decode the audio.
- `cached` reads through the node cache, which is filled in the first round.
- `disk` reads the same shards from a folder.

The server and the client share the machine's cores. The docstring of `bench.loader` states the goals.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.lengths import TokenRate
from tests.services.swift import running
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.dataset_reader import DatasetReader
from trainer.data.decode import decode_audio
from trainer.data.fetch import Fetched, ReadAhead, read_samples
from trainer.data.prepare import prepare
from trainer.data.shards import RawSample, ShardSet
from trainer.storage.open import open_store

ROUNDS = 5
READ_KIB = (512, 2048, 8192, 16384, 1 << 20)
"""The chunk sizes in KiB. The last size covers a whole shard, which is read in parts of at most
`fetch.MAX_READ_BYTES`."""
BUCKET_READ_KIB = 8192
"""The chunk size in KiB to which the S3 throughput goal of `bench.loader` applies. Recipes that read from buckets use
this size."""
THREADS = 4
URL = "s3://bench/set"


def obstore_alone(num_threads: int) -> Callable[[], int]:
    """Return the arm that fetches whole shards with obstore."""
    store = open_store(URL)
    names = [n for n in store.list() if n.endswith(".tar")]
    inner: Any = store._store  # type: ignore[attr-defined]  # obstore itself, without this project's layer

    def fetch(name: str) -> int:
        return len(inner.get(name).bytes())

    def run() -> int:
        with ThreadPoolExecutor(num_threads) as pool:
            return sum(pool.map(fetch, names))

    return run


def ours(reader: DatasetReader, decode: bool) -> Callable[[], int]:
    """Return the arm that reads and verifies all shards with our loader, `THREADS` chunks at once."""

    def run() -> int:
        ahead = ReadAhead(1 << 30, THREADS)
        waiting: list[Future[Fetched]] = []
        for shard, num_here in enumerate(reader.num_per_shard):
            for start in range(0, num_here, reader.chunk_samples):
                indices = range(start, min(start + reader.chunk_samples, num_here))
                future = ahead.start(lambda s=shard, i=indices: reader.read(s, i), 0, required=True)  # type: ignore[misc]
                assert future is not None
                waiting.append(future)
        for future in waiting:
            for raw in future.result().values():
                assert isinstance(raw, RawSample)
                if decode:
                    decode_audio(raw.clips[0])
        ahead.close()
        return reader.shards.index.num_bytes

    return run


def obstore_and_decode(shards: ShardSet) -> Callable[[], int]:
    """Return the arm that fetches the samples of whole shards and decodes them in order, without a loader."""

    def run() -> int:
        for shard, info in enumerate(shards.shards):
            for raw in read_samples(shards, shard, range(info.num_samples)).values():
                assert isinstance(raw, RawSample)
                decode_audio(raw.clips[0])
        return shards.index.num_bytes

    return run


def count_reads(reader: DatasetReader) -> Callable[[], int]:
    """Return a function that returns the number of ranges that `reader` has read from its store so far."""
    store: Any = reader.shards.store
    read, num = store.get_range, 0

    def get_range(*args: Any) -> memoryview:
        nonlocal num
        num += 1
        found: memoryview = read(*args)
        return found

    store.get_range = get_range
    return lambda: num


def main(folder: str, tokenizer: str) -> int:
    """Run the benchmark: print a table, and one JSON object as the last line. Return the exit code 0.

    Args:
        folder: The folder of shards.
        tokenizer: The path to the tokenizer.
    """
    with tempfile.TemporaryDirectory() as scratch, running(Path(scratch)) as server:
        os.environ.update(server.environ)
        server.make_bucket("bench")
        local, remote = open_store(folder), open_store(URL)
        for name in local.list():
            remote.put(name, [local.get(name)])
        config = DataConfig(root="s3://bench", datasets=(DatasetConfig(name="joined", shards="set"),), eval_splits=())
        config = replace(config, tokenizer=replace(config.tokenizer, path=tokenizer))
        prepared = prepare(config, TokenRate((2, 2, 2)))
        arms: dict[str, Callable[[], int]] = {f"obstore, {n} at a time": obstore_alone(n) for n in (1, THREADS)}
        readers = {}
        for read_kib in READ_KIB:
            part = replace(prepared, config=replace(config, read_kib=read_kib))
            readers[read_kib] = part.open_training()[0]
            arms[f"ours, {read_kib} KiB"] = ours(readers[read_kib], decode=False)
        fields = {"read_kib": BUCKET_READ_KIB, "node_cache_gib": 8.0, "node_cache_dir": f"{scratch}/cache"}
        through = replace(prepared, config=replace(config, **fields)).open_training()[0]
        num_fetched = count_reads(through)
        arms["cached"] = ours(through, decode=False)
        disk = replace(config, root=str(Path(folder).parent), read_kib=BUCKET_READ_KIB)
        arms["disk"] = ours(prepare(disk, TokenRate((2, 2, 2))).open_training()[0], decode=False)
        arms["ours + decode"] = ours(readers[BUCKET_READ_KIB], decode=True)
        arms["obstore + decode"] = obstore_and_decode(readers[BUCKET_READ_KIB].shards)
        fetched_first: list[int] = []
        rows = compare(arms, on_first_round=lambda: fetched_first.append(num_fetched()))
        fetched_later = num_fetched() - fetched_first[0]
    best = max(row["mb_per_sec"] for name, row in rows.items() if name.startswith("obstore,"))
    result = {
        "arms": rows,
        "ours_of_obstore": rows[f"ours, {BUCKET_READ_KIB} KiB"]["mb_per_sec"] / best,
        "cached_of_disk": rows["cached"]["mb_per_sec"] / rows["disk"]["mb_per_sec"],
        "cached_of_s3": rows["cached"]["mb_per_sec"] / rows[f"ours, {BUCKET_READ_KIB} KiB"]["mb_per_sec"],
        "cached_reads": {"first_round": fetched_first[0], "later_rounds": fetched_later},
        "with_decode": rows["ours + decode"]["mb_per_sec"] / rows["obstore + decode"]["mb_per_sec"],
    }
    print(json.dumps(result))
    return 0


def compare(arms: dict[str, Callable[[], int]], on_first_round: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Run the arms in turn, print a table, and return each arm's median MB/s and median client CPU seconds per GiB.

    Args:
        arms: The functions that read all shards and return the number of bytes, by name.
        on_first_round: A function that is called after the first round, which is a warm-up.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, arm in arms.items():
            cpu, wall = time.process_time(), time.perf_counter()
            num_bytes = arm()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:  # the first round is a warm-up
                found[name].append((num_bytes / 1e6 / wall, cpu / (num_bytes / 2**30)))
        if not number:
            on_first_round()
    rows = {}
    for name, pairs in found.items():
        rates = [p[0] for p in pairs]
        rows[name] = {"mb_per_sec": statistics.median(rates), "cpu_sec_per_gib": statistics.median(p[1] for p in pairs)}
        print(
            f"{name:24} {rows[name]['mb_per_sec']:7.0f} MB/s ({min(rates):.0f} to {max(rates):.0f})  "
            f"{rows[name]['cpu_sec_per_gib']:6.2f} CPU-s/GiB",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
