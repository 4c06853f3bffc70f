"""Check that the resident memory of the loader does not grow over many batches and epochs.

    python -m bench.loader_memory [BATCHES] [WORKERS]

The defaults are 100000 batches (about half an hour) and 0 workers. The data is the kit, a set of small public
recordings in the folder $KIT_DIR.

Goal: the maximum resident memory of this process and its decoding processes in the second half of the batches is at
most 5 % above the maximum in the second tenth of the batches. The exit code is 1 if the goal is missed, and 3 without
the kit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import psutil

from bench.loader_corpus import KIT
from model.lengths import TokenRate
from trainer.data.config import DataConfig, DatasetConfig
from trainer.data.loader import Loader
from trainer.data.prepare import prepare
from trainer.data.stream import SampleStream

GOAL = 0.05
SUBSETS = ("digits", "digit_strings", "wake_words")
"""The kit's subsets with short clips, so that there are many epochs and batches are cheap."""


def resident_bytes() -> int:
    """Return the resident memory of this process and all its descendants, in bytes."""
    here = psutil.Process()
    return sum(p.memory_info().rss for p in [here, *here.children(recursive=True)])


def main(num_batches: int = 100_000, num_workers: int = 0) -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, 1 if not, and 3 without the kit."""
    if not (KIT / "asr.jsonl").exists():
        print(json.dumps({"passed": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    with tempfile.TemporaryDirectory() as scratch:
        config = DataConfig(
            root=str(KIT),
            datasets=(DatasetConfig(name="asr", manifest="asr.jsonl", subsets=SUBSETS),),
            eval_splits=(),
            cache_dir=scratch,
            global_batch_samples=16,  # as in kit_cpu
            num_workers=num_workers,
            cache_decoded_mib=32,  # smaller than the dataset, so that clips are evicted
        )
        sizes: list[tuple[int, int]] = []
        every = max(1, num_batches // 500)
        start = time.perf_counter()
        with Loader(SampleStream(prepare(config, TokenRate((2, 2, 2))), seed=0, num_batches=num_batches)) as loader:
            for number, (_, _) in enumerate(loader):
                if number % every == 0:
                    sizes.append((number, resident_bytes()))
                if number % (20 * every) == 0:
                    print(f"batch {number}: {sizes[-1][1] / 2**20:.1f} MiB", flush=True)
            epochs = loader.epochs["asr"]
    early = max(size for number, size in sizes if num_batches // 10 <= number < num_batches // 5)
    late = max(size for number, size in sizes if number >= num_batches // 2)
    growth = late / early - 1
    result = {
        "num_batches": num_batches,
        "num_workers": num_workers,
        "epochs": epochs,
        "seconds": time.perf_counter() - start,
        "early_mib": early / 2**20,
        "late_mib": late / 2**20,
        "growth": growth,
        "passed": growth <= GOAL,
    }
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
