"""Measurements of the time to the first batch, in a new process and after resuming at several positions in the data."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

from model.lengths import TokenRate
from trainer.config.convert import from_tree
from trainer.data.config import DataConfig
from trainer.data.lanes import DatasetOrder
from trainer.data.prepare import prepare
from trainer.data.state import LaneState, new_state
from trainer.data.stream import SampleStream

REPEATS = 5
CONSUMED = (10**3, 10**5, 10**6)
_RATE = TokenRate((2, 2, 2))


def first_batch_sec(config: DataConfig) -> dict[str, float]:
    """Return the median time in seconds from the start of a Python process to its first batch.

    Returns:
        The time for batches of arrays ("arrays") and the time for batches of tensors ("tensors"). Most of the latter is
        spent on importing PyTorch, which a training run has already imported when it opens its data.
    """
    found = {}
    for kind in ("arrays", "tensors"):
        command = [sys.executable, "-m", "bench.loader_resume", kind, json.dumps(asdict(config))]
        times = []
        for _ in range(REPEATS):
            start = time.time()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            times.append(float(done.stdout) - start)
        found[kind] = statistics.median(times)
        print(f"first batch, {kind}: {found[kind]:.2f} s ({min(times):.2f} to {max(times):.2f})", flush=True)
    return found


def resume_sec(config: DataConfig) -> dict[int, float]:
    """Return the median time in seconds to open the data with a saved state and read the next batch.

    The function also checks that this batch contains the expected samples.

    Returns:
        The time for each number of consumed samples in `CONSUMED`.
    """
    found = {}
    per_batch = config.global_batch_samples
    for consumed in CONSUMED:
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            prepared = prepare(config, _RATE)
            (reader,) = prepared.open_training()
            position = consumed // config.num_lanes
            lane_state = LaneState({reader.config.name: position}, position)
            lanes = dict.fromkeys(range(config.num_lanes), lane_state)
            state = new_state(0, config.num_lanes, {reader.config.name: reader.digest}, consumed // per_batch, lanes)
            stream = SampleStream(prepared, seed=0, num_batches=10**9, state=state)
            samples, _ = next(iter(stream))
            times.append(time.perf_counter() - start)
            stream.close()
        order = DatasetOrder(
            reader.config.name, reader.num_per_shard, 0, config.num_lanes, config.shuffle, reader.chunk_samples
        )
        expected = []
        for lane in range(config.num_lanes):
            for draw in range(per_batch // config.num_lanes):
                span = order.span(lane, position + draw)
                expected.append(reader.key(span.shard, span.indices[0]))
        assert [s.key for s in samples] == expected, "the loader did not resume at the saved position"
        found[consumed] = statistics.median(times)
        print(
            f"resume after {consumed:>9,} of {reader.num_samples:,} samples: {found[consumed]:.3f} s "
            f"({min(times):.3f} to {max(times):.3f})",
            flush=True,
        )
    return found


def _first(kind: str, config: DataConfig) -> None:
    prepared = prepare(config, _RATE)
    if kind == "arrays":
        stream = SampleStream(prepared, seed=0, num_batches=10)
        next(iter(stream))
        print(time.time())
        stream.close()
    else:
        from trainer.data.loader import Loader  # imports torch

        with Loader(SampleStream(prepared, seed=0, num_batches=10)) as loader:
            next(iter(loader))
            print(time.time())


if __name__ == "__main__":
    _first(sys.argv[1], from_tree(DataConfig, json.loads(sys.argv[2])))
