"""Measure the resources of one rank that grow with the number of ranks: process groups, connections, files and time.

    python -m bench.scale

The trainer's own code creates process groups of the full size with torch's fake process group, which needs no other
ranks, and the groups are counted. The number of connections follows from their sizes, and the number of open files is
that of `trainer.parallel.environment`.

Goals: the number of open files, the number of gloo groups and the time for judging stragglers are below the bounds that
this file states. The last line is one JSON object. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.parallel.cpu import megatron_calls
from trainer.parallel.environment import needed_descriptors
from trainer.parallel.groups import build_groups, device_groups
from trainer.parallel.topology import Topology
from trainer.telemetry.straggler import RankWork, StragglerMeter

TOPOLOGIES = (Topology(128, 8, 4, 4), Topology(1008, 8, 9, 4), Topology(4096, 8, 8, 4))
GOALS_FILES = {128: 1600, 1008: 3400, 4096: 9600}
"""The largest allowed number of open files of one rank, by the number of ranks."""
GOAL_GLOO_GROUPS = 2
JUDGE_RANKS, GOAL_JUDGE_SEC = 10_240, 0.05
GROUP_NAMES = ("groups", "gloo_groups", "gloo_peers")


@dataclass(frozen=True)
class Counted:
    """The number of process groups that one rank of a run belongs to."""

    groups: int
    """The number of all groups, including those of the world and of the checkpoints."""
    megatron_groups: int
    gloo_groups: int
    """The number of groups with a gloo backend."""
    gloo_peers: int
    """The number of other ranks in the gloo groups, summed over groups, which is that of connections in full meshes."""


def count_groups(topology: Topology, rank: int, cuda: bool = True) -> Counted:
    """Create the groups of a rank as a run does, and count them.

    Args:
        topology: The topology of the run.
        rank: The rank whose groups are counted.
        cuda: Whether to count the backends of GPUs instead of those of CPUs.
    """
    made: list[tuple[int, str | None]] = [(topology.world, None)]
    with _fake_world(topology, rank, made):
        device = torch.device("cuda" if cuda else "cpu")
        with megatron_calls():
            build_groups(topology, rank, device, 0)
        megatron = len(made) - 1
        with device_groups(device):
            _deepspeed_groups(topology)
        dist.new_group(backend="gloo")
    gloo = [size for size, backend in made if backend in (None, "gloo")]
    return Counted(len(made), megatron, len(gloo), sum(size - 1 for size in gloo))


@contextlib.contextmanager
def _fake_world(topology: Topology, rank: int, made: list[tuple[int, str | None]]) -> Iterator[None]:
    """Create a fake process group of the full size, and record further groups.

    Args:
        made: A list to which (size, backend) of each further group that contains this rank is appended.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    original = dist.new_group

    def new_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        members = list(range(topology.world)) if ranks is None else list(ranks)
        if rank in members:
            made.append((len(members), backend))
        return original(ranks, timeout, "fake", **options)

    dist.init_process_group("fake", rank=rank, world_size=topology.world, store=FakeStore())
    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = original
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _deepspeed_groups(topology: Topology) -> None:
    """Create the groups of `trainer.engine.encoders`: DeepSpeed's world, and those of encoder experts and replicas."""
    dist.new_group(ranks=range(topology.world))
    if topology.ep > 1:
        for ranks in (*topology.expert_replica_groups, *topology.expert_groups):
            dist.new_group(ranks)


def judge_sec(num_ranks: int) -> float:
    """Return the CPU seconds in which rank 0 judges one stretch of all ranks' work, as the largest of three values."""
    parts = [
        RankWork(r, f"node{r // 8}", {p: 1.0 + r % 7 / 10 for p in ("load", "encode", "llm", "update")}, {"llm": 0.2})
        for r in range(num_ranks)
    ]
    meter = StragglerMeter(slow=1.3, stretch_sec=0.0)
    times = []
    for _ in range(3):
        start = time.thread_time()
        meter.add(parts, 1)
        times.append(time.thread_time() - start)
    return max(times)


def main() -> int:
    """Run the benchmark as a command; the exit code is 0 if the goals are met, else 1."""
    counted = {t.world: count_groups(t, rank=0) for t in TOPOLOGIES}
    files = {world: needed_descriptors(world, cuda=True) for world in counted}
    judged = judge_sec(JUDGE_RANKS)
    worlds = list(counted)
    print(f"{'on rank 0, with GPUs':44}{'grows with':>14}" + "".join(f"{w:>10,}" for w in worlds))
    rows = (
        ("process groups", "1", [c.groups for c in counted.values()]),
        ("of these with gloo", "1", [c.gloo_groups for c in counted.values()]),
        ("gloo peers, each connected when first used", "N", [c.gloo_peers for c in counted.values()]),
        ("open files, at most", "N", list(files.values())),
    )
    for name, law, values in rows:
        print(f"{name:44}{law:>14}" + "".join(f"{v:>10,}" for v in values))
    print(f"one judgement of {JUDGE_RANKS:,} ranks' work: {1000 * judged:.1f} ms of CPU time")
    goals = {f"open files, {world} ranks": files[world] <= most for world, most in GOALS_FILES.items()}
    goals |= {f"gloo groups, {world} ranks": c.gloo_groups <= GOAL_GLOO_GROUPS for world, c in counted.items()}
    goals[f"judging {JUDGE_RANKS} ranks"] = judged <= GOAL_JUDGE_SEC
    found = {str(world): asdict(c) | {"files": files[world]} for world, c in counted.items()}
    print(json.dumps({"ranks": found, "judge_cpu_sec": judged, "goals": goals, "passed": all(goals.values())}))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
