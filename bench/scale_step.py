"""The host time of one rank per step in a run with many ranks: planning and small collectives.

`bench.scale` uses this module. Planning is measured in this process with the global batch of all ranks. Collectives are
measured with a few real processes on this machine. For more ranks, their time is extrapolated with a cost
model: the number of communication rounds times the time of a round, plus the time to receive the data.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from trainer.parallel.dispatch import ClipTable, dispatch_of, plan_dispatch
from trainer.parallel.exchange import FIRST
from trainer.parallel.packs import embedding_segments, plan_packs, token_segments
from trainer.parallel.plan import Ints, route
from trainer.parallel.topology import Topology
from trainer.parallel.tree import all_gather_numbers
from trainer.training.global_batch import global_batch

SAMPLES_PER_RANK = 8
_NUM_EXPERTS = 4
_CALLS, _WARMUP = 300, 30
_FIELDS = 5
_HEAD = 16
"""The number of integers in a rank's part of the planning exchange, not counting those that describe samples and
clips."""
COLLECTIVES = 2
"""The number of small collectives per step (tests/test_host_syncs.py)."""
_NETWORK_SEC, _BYTES_PER_SEC = 30e-6, 1e9
"""The assumed latency of a message between nodes, and the assumed rate of a gloo connection."""


def planning_sec(topology: Topology) -> dict[str, float]:
    """Return the CPU seconds of one rank for each part of planning a step, as the minimum of 15 measurements."""
    rng = np.random.default_rng(0)
    world, num = topology.world, topology.world * SAMPLES_PER_RANK
    # Once a process has freed a large tensor, glibc no longer returns the memory of freed arrays to the kernel
    # (mallopt(3), M_MMAP_THRESHOLD). Every run is in this state after its first batch.
    np.empty(31 << 20, dtype=np.uint8)
    source = np.repeat(np.arange(world), SAMPLES_PER_RANK)
    tokens, samples = rng.integers(50, 400, num), rng.integers(16_000, 320_000, num)
    packing = plan_packs(tokens, topology.dp, 4096, topology.tp)
    wanted = np.zeros((num, _NUM_EXPERTS), dtype=bool)
    wanted[np.arange(num), rng.integers(0, _NUM_EXPERTS, num)] = True
    costs = [_cost(1.0 + expert) for expert in range(_NUM_EXPERTS)]
    places = [expert % topology.ep for expert in range(_NUM_EXPERTS)]

    def exchange() -> None:
        for segments in (token_segments, embedding_segments):
            route(segments(packing, source, topology, 0), 0, world, 100)

    def primary() -> None:
        dispatch_of(
            plan_dispatch(ClipTable(source, samples, np.ones((num, 1), dtype=bool)), costs[:1], [0], 1, world), 0
        )

    def experts() -> None:
        dispatch_of(plan_dispatch(ClipTable(source, samples, wanted), costs, places, topology.ep, world), 0)

    described = np.concatenate([np.ones((world, _HEAD)), np.ones((world, 5 * SAMPLES_PER_RANK))], axis=1).astype(int)
    described[:, :2] = SAMPLES_PER_RANK

    return {
        "description": _cpu_sec(
            lambda: global_batch(described, np.full(world, described.shape[1]), ["loss"], [], _HEAD - 3, 0)
        ),
        "packs": _cpu_sec(lambda: plan_packs(tokens, topology.dp, 4096, topology.tp)),
        "exchange": _cpu_sec(exchange),
        "primary": _cpu_sec(primary),
        "experts": _cpu_sec(experts),
    }


def _cost(factor: float) -> Callable[[Ints], np.ndarray]:
    return lambda lengths: factor * lengths.astype(np.float64)


def _cpu_sec(work: Callable[[], object]) -> float:
    times = []
    for _ in range(15):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)


def collective_sec(num_ranks: int) -> dict[str, float]:
    """Return the time of a small collective on real processes of this machine, by kind.

    Returns:
        The median for `tree`, which is `trainer.parallel.tree.all_gather_numbers`, and for `ring`, which is gloo's
        all-gather of the same numbers. `undisturbed` is the first decile for `tree`. It is closer to the time on a
        cluster, where each rank has a core to itself.
    """
    code = "from bench.scale_step import rank_main; rank_main()"
    port = str(20_000 + os.getpid() % 20_000)
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **shared, "RANK": str(r)}, stdout=subprocess.PIPE
        )
        for r in range(num_ranks)
    ]
    try:
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found: dict[str, float] = json.loads(texts[0])
    return found


def rank_main() -> None:
    """Measure collectives as one rank, and print the result as JSON on rank 0."""
    dist.init_process_group("gloo")
    mine = np.arange(1 + SAMPLES_PER_RANK * _FIELDS, dtype=np.int64)
    world = dist.get_world_size()
    # PyTorch 2.13 warns that the function of `ring` was renamed; older versions lack the new name.
    warnings.simplefilter("ignore")
    target, source = torch.empty(world * len(mine), dtype=torch.int64), torch.from_numpy(mine)
    arms: dict[str, Callable[[], object]] = {
        "tree": lambda: all_gather_numbers(mine, None),
        "ring": lambda: dist.all_gather_into_tensor(target, source),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for call in range(_WARMUP + _CALLS):
        for name, work in arms.items():
            start = time.perf_counter()
            work()
            if call >= _WARMUP:
                times[name].append(time.perf_counter() - start)
    dist.barrier()
    if dist.get_rank() == 0:
        undisturbed = statistics.quantiles(times["tree"], n=10)[0]
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(json.dumps({**medians, "undisturbed": undisturbed}))
    dist.destroy_process_group()


def modelled_sec(num_ranks: int, round_sec: float) -> float:
    """Return the modelled time in seconds of the small collectives of a step.

    Args:
        num_ranks: The number of ranks.
        round_sec: The measured time of a round between two processes of one machine.
    """
    received = (num_ranks - 1) * 8 * (1 + FIRST)
    return COLLECTIVES * (rounds(num_ranks) * (round_sec + _NETWORK_SEC) + received / _BYTES_PER_SEC)


def rounds(num_ranks: int) -> int:
    """Return the number of rounds of a small collective."""
    return math.ceil(math.log2(num_ranks))
