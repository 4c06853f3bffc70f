"""Compare the throughput of the loader with that of decoding alone, and measure the time until its first batch.

    python -m bench.loader                                   local arms, first batch, resume
    python -m bench.loader --parts local first resume s3     includes reading from a local Swift server

The variants that are compared (*arms*) take turns. Each arm runs in one process without workers, and its samples per
CPU-second are measured. The arms that use other libraries read the same encoded bytes. webdataset and lhotse are
compared if they are installed (`pip install .[peers]`).

Goals: our loader reaches at least 95 % of the throughput of decoding alone. Reading from S3 is at least as fast as
fetching whole objects with obstore. With the node cache, later epochs read nothing from the server. The first batch is
ready at most 1.0 s after the start of the process. Resuming after 10³, 10⁵ and 10⁶ samples takes at most 0.5 s. The
exit code is 1 if a goal is missed, and 3 without the kit (a set of small public recordings, in the folder KIT_DIR).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.loader_corpus import KIT, Utterance, linked_dataset, utterances, write_dataset, write_shar
from bench.loader_resume import first_batch_sec, resume_sec
from model.lengths import TokenRate
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.decode import decode_audio
from trainer.data.prepare import PreparedData, prepare
from trainer.data.state import LaneState
from trainer.data.stream import LaneGroup, SampleStream, StreamSpec
from trainer.storage.open import open_store

NUM_UTTERANCES, PER_SHARD, ROUNDS = 1440, 160, 9
"""The number of samples, samples per shard, and rounds. With this many samples, it hardly matters that chunks at
the boundaries between lanes are partly read twice."""
LANES, BATCH = 8, 32
PARTS = ["local", "first", "resume", "s3"]
GOAL_SHARE, GOAL_FIRST_SEC, GOAL_RESUME_SEC, GOAL_S3 = 0.95, 1.0, 0.5, 1.0

Arm = Callable[[], int]
"""A function that reads all samples once and returns their number."""


def config(root: str, tokenizer: str | None = None, **fields: Any) -> DataConfig:
    """Return the data config of the arms that use our loader, with `fields` replacing its defaults."""
    base: dict[str, Any] = {
        "root": root,
        "datasets": (DatasetConfig(name="joined", shards="set"),),
        "eval_splits": (),
        "num_lanes": LANES,
        "global_batch_samples": BATCH,
        "num_workers": 0,
        "cache_decoded_mib": 0,
    }
    made = DataConfig(**{**base, **fields})
    return made if tokenizer is None else _with_tokenizer(made, tokenizer)


def _with_tokenizer(made: DataConfig, path: str) -> DataConfig:
    from dataclasses import replace

    return replace(made, tokenizer=replace(made.tokenizer, path=path))


def decode_only(samples: Iterable[Utterance]) -> Arm:
    """Return the arm that only decodes clips in memory. Its throughput is the upper limit for the other arms."""
    data = [u.data for u in samples]
    return lambda: sum(len(decode_audio(d)) > 0 for d in data)


def ours_clips(prepared: PreparedData) -> Arm:
    """Return the arm that orders, reads, verifies and decodes samples. Other libraries do not verify samples."""
    (reader,) = prepared.open_training()

    def run() -> int:
        reader.shards.table.cache_clear()  # Tables of a large dataset do not fit in this cache.
        reader.selected.cache_clear()
        spec = StreamSpec(prepared.config, (), prepared.tokenizer_path, prepared.rate, (), None, None, 0, 1 << 40)
        lanes = {lane: LaneState() for lane in range(LANES)}
        group = LaneGroup(spec, lanes, 0, [reader], prepared.tokenizer)
        delivered = 0
        cursors = [lane.cursor(0) for lane in group.lanes]
        while delivered < reader.num_samples // LANES * LANES:
            for cursor in cursors:
                cursor.load()
                _, clips = group.source.decoded(reader, cursor.shard, cursor.index, cursor.received)
                delivered += len(clips[0]) > 0
                cursor.position += 1
        group.close()
        return delivered

    return run


def ours_whole(prepared: PreparedData) -> Arm:
    """Return the arm that also tokenizes prompts and answers, as in training."""

    def run() -> int:
        stream = SampleStream(prepared, seed=0, num_batches=prepared.open_training()[0].num_samples // BATCH)
        return sum(len(samples) for samples, _ in stream)

    return run


def webdataset_arm(folder: Path) -> Arm:
    """Return the arm that reads the same tars with webdataset."""
    import webdataset

    files = sorted(str(p) for p in folder.glob("*.tar"))

    def decode(sample: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        return json.loads(sample["json"]), decode_audio(sample["flac"])

    return lambda: sum(len(clip) > 0 for _, clip in webdataset.WebDataset(files, shardshuffle=False).map(decode))


def lhotse_arm(folder: Path) -> Arm:
    """Return the arm that reads the same bytes from lhotse Shar and decodes them with lhotse.

    All clips are 16 kHz mono.
    """
    from lhotse import CutSet

    def run() -> int:
        return sum(cut.load_audio().shape[1] > 0 for cut in CutSet.from_shar(in_dir=str(folder)))

    return run


def timed(arm: Arm) -> tuple[float, float, int]:
    """Run an arm once, and return the CPU seconds of all threads, the wall seconds and the number of samples."""
    gc.collect()  # Otherwise, garbage of the previous arm would be collected during this one.
    cpu, wall = time.process_time(), time.perf_counter()
    num = arm()
    return time.process_time() - cpu, time.perf_counter() - wall, num


def compare(arms: dict[str, Arm], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the samples per CPU-second and per second of every arm and round.

    The order rotates, so that a different arm runs first in each round.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()  # The warm-up fills the page cache and imports modules.
    names = list(arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall, num = timed(arms[name])
            found[name].append((num / cpu, num / wall))
    return found


def table(found: dict[str, list[tuple[float, float]]], limit: str) -> dict[str, dict[str, float]]:
    """Print and return the medians and ranges of each arm, and its ratio to the arm `limit` in the same rounds."""
    rows = {}
    for name, pairs in found.items():
        rates = [p[0] for p in pairs]
        shares = [r / q[0] for r, q in zip(rates, found[limit], strict=True)]
        rows[name] = {
            "samples_per_cpu_sec": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "samples_per_sec": statistics.median(p[1] for p in pairs),
            "share": statistics.median(shares),
        }
        print(
            f"{name:14} {rows[name]['samples_per_cpu_sec']:8.0f} /CPU-s ({min(rates):.0f} to {max(rates):.0f})  "
            f"{rows[name]['samples_per_sec']:8.0f} /s  {100 * rows[name]['share']:5.1f} % of {limit}",
            flush=True,
        )
    return rows


def local_arms(root: Path, samples: list[Utterance], prepared: PreparedData) -> tuple[dict[str, Arm], list[str]]:
    """Return the arms whose libraries are installed, and the names of the libraries that are not installed."""
    arms = {"decode only": decode_only(samples), "ours": ours_clips(prepared), "ours + tokens": ours_whole(prepared)}
    missing = [name for name in ("webdataset", "lhotse") if importlib.util.find_spec(name) is None]
    if "webdataset" not in missing:
        arms["webdataset"] = webdataset_arm(root / "set")
    if "lhotse" not in missing:
        write_shar(root / "shar", samples, PER_SHARD)
        arms["lhotse Shar"] = lhotse_arm(root / "shar")
    return arms, missing


def measure(root: Path, parts: list[str], samples: list[Utterance], rounds: int) -> dict[str, Any]:
    """Return the results of every requested part."""
    results: dict[str, Any] = {}
    write_dataset(open_store(str(root / "set")), samples, PER_SHARD)
    prepared = prepare(config(str(root), cache_dir=str(root / "cache")), TokenRate((2, 2, 2)))
    tokenizer = prepared.tokenizer_path
    if "local" in parts:
        arms, missing = local_arms(root, samples, prepared)
        hours = sum(u.seconds for u in samples) / 3600
        print(f"{len(samples)} utterances, {hours:.2f} h, FLAC 16 kHz; not installed: {missing or 'none'}", flush=True)
        results |= {"local": table(compare(arms, rounds), "decode only"), "missing_peers": missing}
    if "first" in parts:
        results["first"] = first_batch_sec(config(str(root), tokenizer))
    if "resume" in parts:
        linked_dataset(root / "large" / "set", root / "set", num_copies=10**6 // PER_SHARD + 1)
        results["resume"] = resume_sec(config(str(root / "large"), tokenizer, num_lanes=16))
    if "s3" in parts:
        command = [sys.executable, "-m", "bench.loader_s3", str(root / "set"), tokenizer]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, end="")
        results["s3"] = json.loads(done.stdout.splitlines()[-1])
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, 1 if not, and 3 without the kit."""
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="parts to measure (default: all except s3)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--utterances", type=int, default=NUM_UTTERANCES)
    args = parser.parse_args(argv)
    if not (KIT / "asr.jsonl").exists():
        print(json.dumps({"passed": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(Path(scratch), args.parts, utterances(args.utterances), args.rounds)
    goals = {}
    if "local" in results:
        goals["local"] = results["local"]["ours"]["share"] >= GOAL_SHARE
    if "first" in results:
        goals["first"] = results["first"]["arrays"] <= GOAL_FIRST_SEC
    if "resume" in results:
        goals["resume"] = max(results["resume"].values()) <= GOAL_RESUME_SEC
    if "s3" in results:
        goals["s3"] = results["s3"]["ours_of_obstore"] >= GOAL_S3
        goals["node cache"] = results["s3"]["cached_reads"]["later_rounds"] == 0
    results |= {"goals": goals, "passed": all(goals.values())}
    print(json.dumps(results))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
