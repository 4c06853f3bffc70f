"""Compare the throughput of tools.evaluate with a plain transformers loop on the same exported model.

    python -m bench.evaluate MODEL --data MANIFEST [--samples 128]

MODEL is an exported folder, or a checkpoint or run, which is first exported in fp32. The loop is straightforward code
with AutoModelForCausalLM and AutoProcessor. It reads the files in the order of the manifest, and calls `generate` on
single samples or on padded batches of eight samples. All arms (variants) read and decode the same files. Loading the
model is not timed, and each arm first runs one batch as a warm-up. The arms take turns, so that other load on the
machine slows all of them. The loops run with one thread and with one thread per core, and tools.evaluate with one
process per core (`--nproc`). tools.evaluate is also measured with one process and one thread, to separate the effect of
batching from the effect of several processes.

Goals: tools.evaluate is at least 3 times as fast as the loop with single samples and 1.3 times as fast as the loop with
batches of eight, and generates the same text. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from tools import export
from trainer.data.manifest import Row, read_manifest
from trainer.evaluation.offline.answer import Decoding, Windows
from trainer.evaluation.offline.model import find_model
from trainer.evaluation.offline.pool import AnswerJobs, open_workers
from trainer.evaluation.offline.worker import Request, Skipped, batches, open_wanted

BATCH_1_GOAL, BATCH_8_GOAL = 3.0, 1.3

CORES = len(os.sched_getaffinity(0))
THREADS = tuple(sorted({1, CORES}))
"""The thread counts with which the loops are measured."""
OURS, OURS_ALONE = f"tools.evaluate --nproc {CORES}", "tools.evaluate, 1 thread"

Said = dict[str, str]
Ways = dict[str, Callable[[], Said]]


def plain(model: Any, processor: Any, rows: Sequence[Row], batch: int) -> Said:
    """Transcribe files in a loop with transformers, and return the texts by key."""
    said: Said = {}
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = processor(
            audio=[list(map(str, r.audio)) for r in part], text=[r.metadata["instruction"] for r in part]
        )
        texts = processor.batch_decode(model.generate(**inputs))
        said.update(zip((r.key for r in part), texts, strict=True))
    return said


def ours(answer_jobs: AnswerJobs, jobs: Sequence[Sequence[int]]) -> Said:
    """Transcribe files as tools.evaluate does after loading its models, and return the texts by key."""
    outcomes = [o for found in answer_jobs(jobs) for o in found]
    assert not [o for o in outcomes if isinstance(o, Skipped)]
    return {o.key: o.hypothesis for o in outcomes if not isinstance(o, Skipped)}


@contextmanager
def open_ways(request: Request, folder: Path, rows: Sequence[Row], jobs: Sequence[Sequence[int]]) -> Iterator[Ways]:
    """Yield all arms by name. Their models are loaded, and each has processed a first batch."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    def loop(batch: int, threads: int, part: Sequence[Row] = rows) -> Said:
        torch.set_num_threads(threads)
        return plain(model, processor, part, batch)

    def alone(part: Sequence[Sequence[int]] = jobs) -> Said:
        torch.set_num_threads(1)
        return ours(one, part)

    with open_workers(request, 1) as one, open_workers(request, CORES) as several:
        loop(8, 1, rows[:8])
        alone(jobs[-1:])
        ours(several, jobs[-CORES:])
        yield {
            **{loop_name(batch, threads): partial(loop, batch, threads) for batch in (1, 8) for threads in THREADS},
            OURS_ALONE: alone,
            OURS: lambda: ours(several, jobs),
        }


def loop_name(batch: int, threads: int) -> str:
    """Return the name of an arm that runs the transformers loop."""
    return f"transformers, batch {batch}, {threads} thread{'s' * (threads > 1)}"


def measure(folder: Path, data: str, split: str | None, num: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Return the seconds of each arm and round, and the number of texts of each arm that differ from the plain loop."""
    origin = find_model(folder)
    windows = Windows.of(origin, 1e6, 0.0)  # no windows, as in the loop
    # Every process gets several batches, as in a large evaluation.
    decoding = Decoding(origin.max_new_tokens, 1, min(batch_size, math.ceil(num / (4 * CORES))), 600.0)
    request = Request(origin, data, split, (), num, "fp32", windows, decoding)
    stored, places = open_wanted(request)
    jobs = batches(request, stored, places)
    keys = {stored.items[place].key for place in places}
    rows = [row for row in read_manifest(Path(data), split) if row.key in keys]
    said: dict[str, Said] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    with open_ways(request, folder, rows, jobs) as ways:
        for _ in range(rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                said[name] = way()
                seconds[name].append(time.perf_counter() - started)
    reference = said[loop_name(1, 1)]
    rates = {name: len(rows) / min(times) for name, times in seconds.items()}
    best = {batch: max(rates[loop_name(batch, threads)] for threads in THREADS) for batch in (1, 8)}
    return {
        "num_samples": len(rows),
        "audio_sec": round(sum(stored.items[p].seconds for p in places), 1),
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
        "samples_per_sec": {name: round(rate, 2) for name, rate in rates.items()},
        "times_batch_1": round(rates[OURS] / best[1], 2),
        "times_batch_8": round(rates[OURS] / best[8], 2),
        "one_thread_times_batch_1": round(rates[OURS_ALONE] / rates[loop_name(1, 1)], 2),
        "one_thread_times_batch_8": round(rates[OURS_ALONE] / rates[loop_name(8, 1)], 2),
        "num_different": {name: sum(text != reference[key] for key, text in own.items()) for name, own in said.items()},
    }


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True, help="a manifest (JSONL)")
    parser.add_argument("--split")
    parser.add_argument("--samples", type=int, default=128, help="number of samples to select at random (default: 128)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="maximum batch size (default: 64); smaller if a process would get fewer than four batches",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if not find_model(folder).is_export:
            folder = Path(scratch) / "model"
            assert export.main([str(options.model), str(folder), "--dtype", "fp32"]) == 0
        found = measure(folder, options.data, options.split, options.samples, options.rounds, options.batch_size)
    for name, rate in found["samples_per_sec"].items():
        print(f"{name:36} {rate:8.2f} samples/s   {found['num_different'][name]} texts differ")
    found["passed"] = (
        found["times_batch_1"] >= BATCH_1_GOAL
        and found["times_batch_8"] >= BATCH_8_GOAL
        and not any(found["num_different"][way] for way in (OURS, OURS_ALONE))
    )
    print(json.dumps(found))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
