"""Measure how long a save of about 1 GiB interrupts training.

    python -m bench.checkpoint

Three arms (variants) alternate on two ranks, each of which holds half of the tensors: our save in the background, our
save including the commit, and `torch.distributed.checkpoint.async_save`. Like ours, the latter keeps its staging
buffers between saves.

Goal: our save in the background interrupts training for at most 10 % of the time of the synchronous save. Each save
begins when the previous one has finished. The first save of each arm, which allocates buffers, is reported separately.
The exit code is 1 if the goal is missed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.checkpoint.config import CheckpointConfig
from trainer.checkpoint.engine_state import EngineState
from trainer.checkpoint.layout import EXP_AVG, EXP_AVG_SQ, PARAM, Shard
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.rect import matrix_of
from trainer.run.launch import start_ranks

LIMIT = 0.10
NUM_RANKS, ROUNDS = 2, 4
ROWS, COLS, NUM_TENSORS = 1024, 1024, 43  # · 3 kinds · 4 bytes · 2 ranks = 1.01 GiB


class TensorsState(EngineState):
    """The state of a rank with plain tensors instead of engines.

    The argument `engines` is a list of tensors by kind.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def shards(self, engines: Any) -> dict[str, list[Shard]]:
        shape = (NUM_RANKS * ROWS, COLS)
        rect = matrix_of((ROWS, COLS))._replace(row=self.rank * ROWS)
        return {"audio": [Shard(f"audio.w{i}", shape, rect, values, 1) for i, values in enumerate(engines)]}


def work(folder: Path) -> int:
    """Run one rank of the benchmark."""
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology

    rank, world, device = connect(timeout_sec=600)
    groups = build_groups(Topology(world, 1, 1), rank, device, seed=0)
    kinds = (PARAM, EXP_AVG, EXP_AVG_SQ)
    tensors: Any = [{kind: torch.randn(ROWS, COLS) for kind in kinds} for _ in range(NUM_TENSORS)]
    manager = CheckpointManager(str(folder / "ours"), CheckpointConfig(keep_last=1), groups, state=TensorsState(rank))
    steps = iter(range(1, 1000))
    peer = _peer(folder / "peer", {f"{rank}/{k}/{i}": v for i, t in enumerate(tensors) for k, v in t.items()})

    def background() -> Callable[[], None]:
        manager.save(next(steps), tensors, {})
        return manager.close

    def synchronous() -> Callable[[], None]:
        background()()
        return lambda: None

    arms = {"ours": background, "synchronous": synchronous, "torch_async": peer}
    stalls: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(1 + ROUNDS):
        for name, arm in arms.items():
            dist.barrier(groups.world)
            started = time.perf_counter()
            finish = arm()
            stalls[name].append(_longest(time.perf_counter() - started, groups.world))
            finish()
    if rank == 0:
        _report(stalls, sum(v.nbytes for t in tensors for v in t.values()) * world)
        (folder / "passed").write_text(str(int(_ratio(stalls) <= LIMIT)))
    dist.barrier(groups.world)
    dist.destroy_process_group()
    return 0


def _peer(folder: Path, tensors: dict[str, Any]) -> Callable[[], Callable[[], None]]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager, group = DefaultStager(options), dist.new_group(backend="gloo")

    def save() -> Callable[[], None]:
        future: Any = dcp.async_save(tensors, checkpoint_id=str(folder), process_group=group, async_stager=stager)
        return lambda: (future.result() if hasattr(future, "result") else future.upload_completion.result()) and None

    return save


def _longest(seconds: float, group: Any) -> float:
    longest = torch.tensor(seconds)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return float(longest)


def _ratio(stalls: dict[str, list[float]]) -> float:
    return statistics.median(stalls["ours"][1:]) / statistics.median(stalls["synchronous"][1:])


def _report(stalls: dict[str, list[float]], num_bytes: int) -> None:
    print(f"{'':14} {'median':>8} {'min':>8} {'max':>8} {'first':>8}   seconds for which training is interrupted")
    for name, seconds in stalls.items():
        later = seconds[1:]
        print(f"{name:14} {statistics.median(later):8.3f} {min(later):8.3f} {max(later):8.3f} {seconds[0]:8.3f}")
    result = {
        "passed": _ratio(stalls) <= LIMIT,
        "goal": LIMIT,
        "ratio": round(_ratio(stalls), 4),
        "gib": round(num_bytes / 2**30, 3),
        "stall_sec": {name: [round(s, 4) for s in seconds] for name, seconds in stalls.items()},
        "torch": torch.__version__,
    }
    print(json.dumps(result), flush=True)


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, else 1."""
    if "RANK" in os.environ:
        return work(Path(sys.argv[1]))
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
    try:
        code = start_ranks(NUM_RANKS, [sys.executable, "-m", "bench.checkpoint", str(folder)])
        passed = folder / "passed"
        return code or int(passed.read_text() != "1")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
