"""What grows with the number of ranks, on one rank, against bounds.

    python -m bench.scale

Process groups of the full size exist without other ranks (torch's fake process group): the trainer's own code makes
them, and they are counted. Connections follow from their sizes, open files from `trainer.parallel.environment`. The
last line is one JSON object; exit code 1 where a goal is missed.
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
"""Number of ranks → most open files of one."""
GOAL_GLOO_GROUPS = 2
JUDGE_RANKS, GOAL_JUDGE_SEC = 10_240, 0.05
GROUP_NAMES = ("groups", "gloo_groups", "gloo_peers")


@dataclass(frozen=True)
class Counted:
    """The process groups that one rank of a run belongs to."""

    groups: int
    """The world's and the checkpoints' among them."""
    megatron_groups: int
    gloo_groups: int
    """Those that have a gloo backend."""
    gloo_peers: int
    """Other ranks in these, each counted once per group: the connections of full meshes."""


def count_groups(topology: Topology, rank: int, cuda: bool = True) -> Counted:
    """Make the groups of `rank` as a run does, on GPUs or on CPUs, and count them.

    Args:
        topology: of the run.
        rank: whose groups to count.
        cuda: count backends as on GPUs.
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
    """A fake process group of the full size; `made` gets (size, backend) of each further group that has this rank."""
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
    """Those of `trainer.engine.encoders`: DeepSpeed's own world, experts, and the ranks that share one."""
    dist.new_group(ranks=range(topology.world))
    if topology.ep > 1:
        for ranks in (*topology.expert_replica_groups, *topology.expert_groups):
            dist.new_group(ranks)


def judge_sec(num_ranks: int) -> float:
    """Return the CPU seconds that rank 0 judges one stretch of `num_ranks` ranks' work for, at most of three."""
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
    """Exit code: 0 all goals are met, 1 one is not."""
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
