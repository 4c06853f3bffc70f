"""Measure quantities that may grow with the number of ranks: groups, connections, files, metadata and times.

    python -m bench.scale

The trainer's code creates process groups of the full size with PyTorch's fake process group, which needs no other
ranks, and the benchmark counts the groups. It computes the number of connections from the sizes of the groups, and the
number of open files with `trainer.parallel.environment`. It also runs the trainer's code that makes the metadata of
checkpoints (`bench.scale_checkpoint`), detects stragglers and plans a step (`bench.scale_step`), with data of the full
size. Small collectives on the host are measured with real processes on this machine. For more ranks, a model adds up
the measured time of the rounds, an assumed network latency per round, and the time to receive the data at an assumed
rate.

Goals: the following values do not exceed the limits in this file: the number of open files, the number of gloo groups,
the number of a checkpoint's files; with 10,240 ranks, the size of the metadata (50 MB) and the times for detecting
stragglers (50 ms) and planning (15 ms); and with 1,024 ranks, the modelled time of a step's small collectives (10 ms).
The last line is one JSON object. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from bench.scale_checkpoint import RANKS_PER_NODE, measure
from bench.scale_start import start_sec
from bench.scale_step import COLLECTIVES, collective_sec, modelled_sec, planning_sec, rounds
from trainer.config.load import load_recipe
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.environment import meeting_limit_sec, needed_descriptors, start_limit_sec
from trainer.parallel.groups import build_groups, device_groups
from trainer.parallel.topology import Topology
from trainer.plan.sizes import sized_model
from trainer.telemetry.straggler import RankWork, StragglerMeter

TOPOLOGIES = (Topology(128, 8, 4, 4), Topology(1008, 8, 9, 4), Topology(4096, 8, 8, 4))
GOALS_FILES = {128: 1600, 1008: 3400, 4096: 9600}
"""The maximum allowed number of open files of one rank, by the number of ranks."""
GOAL_GLOO_GROUPS = 2
LARGE = (Topology(128, 8, 4, 4), Topology(1024, 8, 8, 4), Topology(4096, 8, 8, 4), Topology(10_240, 8, 8, 4))
GOAL_JUDGE_SEC, GOAL_PLANNING_SEC, GOAL_METADATA_BYTES = 0.05, 0.015, 50e6
GOAL_COLLECTIVES_SEC = 0.01
PROCESSES = (2, 4, 8)
STARTED = (32, 128, 256)


@dataclass(frozen=True)
class Counted:
    """The number of process groups to which one rank of a run belongs."""

    groups: int
    """The number of all groups, including the world and the group for checkpoints."""
    megatron_groups: int
    gloo_groups: int
    """The number of groups with a gloo backend."""
    gloo_peers: int
    """The number of other ranks in the gloo groups, summed over groups. This is the number of connections if all pairs
    of ranks in a group connect."""


def count_groups(topology: Topology, rank: int, cuda: bool = True) -> Counted:
    """Create the groups of a rank as a run does, and count them.

    Args:
        topology: The topology of the run.
        rank: The rank whose groups are counted.
        cuda: True to count the groups of a run on GPUs, False for a run on CPUs.
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
    """Create a fake process group of the full size, and record the groups that are created within the `with` block.

    Args:
        topology: The topology of the run.
        rank: The rank of this process.
        made: A list to which the size and the backend of each group that contains this rank are appended.
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
    """Create the groups of `trainer.engine.encoders`: DeepSpeed's world group, and the groups of encoder experts."""
    dist.new_group(ranks=range(topology.world))
    if topology.ep > 1:
        for ranks in (*topology.expert_replica_groups, *topology.expert_groups):
            dist.new_group(ranks)


def judge_sec(num_ranks: int) -> float:
    """Return the CPU seconds that rank 0 needs to detect stragglers in one period (the maximum of three calls)."""
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
    """Run the benchmark, and return the exit code: 0 if the goals are met, else 1."""
    counted = {t.world: count_groups(t, rank=0) for t in TOPOLOGIES}
    files = {world: needed_descriptors(world, cuda=True) for world in counted}
    print("on rank 0, with GPUs")
    _print_row("ranks", "grows with", [t.world for t in TOPOLOGIES])
    _print_row("process groups", "1", [c.groups for c in counted.values()])
    _print_row("process groups with a gloo group", "1", [c.gloo_groups for c in counted.values()])
    _print_row("gloo peers, each connected when first used", "N", [c.gloo_peers for c in counted.values()])
    _print_row("open files, at most", "N", list(files.values()))
    goals = {f"open files, {world} ranks": files[world] <= most for world, most in GOALS_FILES.items()}
    goals |= {f"gloo groups, {world} ranks": c.gloo_groups <= GOAL_GLOO_GROUPS for world, c in counted.items()}

    model = sized_model(load_recipe("mowe_70b"))
    saved = {t.world: measure(model, t) for t in LARGE}
    judged = {t.world: judge_sec(t.world) for t in LARGE}
    planned = {t.world: planning_sec(t) for t in LARGE}
    print("\nfor the recipe mowe_70b")
    _print_row("ranks", "grows with", [t.world for t in LARGE])
    _print_row("metadata that a rank sends, KB", "1", [m.sent_bytes / 1e3 for m in saved.values()])
    _print_row("metadata that rank 0 receives, KB", "N", [m.gathered_bytes / 1e3 for m in saved.values()])
    _print_row("checkpoint manifest, KB", "N", [m.manifest_bytes / 1e3 for m in saved.values()])
    _print_row("files of a checkpoint, 8 ranks per node", "nodes", [m.num_files for m in saved.values()])
    _print_row("making the manifest on rank 0, CPU ms", "N", [1e3 * m.merge_sec for m in saved.values()])
    _print_row("reading the manifest on a rank, CPU ms", "N", [1e3 * m.parse_sec for m in saved.values()])
    _print_row("looking for stragglers on rank 0, CPU ms", "N log N", [1e3 * s for s in judged.values()])
    _print_row("planning a step, CPU ms", "N log N", [1e3 * sum(p.values()) for p in planned.values()])
    _print_row("rounds of a small collective", "log N", [rounds(t.world) for t in LARGE])
    most = LARGE[-1].world
    goals[f"metadata, {most} ranks"] = (
        max(saved[most].gathered_bytes, saved[most].manifest_bytes) <= GOAL_METADATA_BYTES
    )
    goals["files of a checkpoint"] = all(m.num_files <= world / RANKS_PER_NODE + 2 for world, m in saved.items())
    goals[f"judging, {most} ranks"] = judged[most] <= GOAL_JUDGE_SEC
    goals[f"planning, {most} ranks"] = sum(planned[most].values()) <= GOAL_PLANNING_SEC

    calls = {num: collective_sec(num) for num in PROCESSES}
    print("\nsmall collective on processes of this machine, ms")
    _print_row("processes", "grows with", list(PROCESSES))
    for arm, law in (("tree", "log N"), ("ring", "N")):
        _print_row(arm, law, [1e3 * found[arm] for found in calls.values()])
    starts = {num: start_sec(num) for num in STARTED}
    print("\ncreation of a gloo group by processes of this machine, ms")
    _print_row("processes", "grows with", list(STARTED))
    _print_row("start", "N²", [1e3 * sec for sec in starts.values()])
    _print_row("per pair, µs", "1", [1e6 * sec / num**2 for num, sec in starts.items()])
    print("\nlimits for the start, s")
    _print_row("ranks", "grows with", [t.world for t in LARGE])
    _print_row("all ranks have connected", "N²", [meeting_limit_sec(t.world, {}) for t in LARGE])
    _print_row("the preflight's all-reduce has ended", "N²", [start_limit_sec(t.world, {}) for t in LARGE])
    modelled = {t.world: modelled_sec(t.world, calls[PROCESSES[0]]["undisturbed"]) for t in LARGE}
    print("\nsmall collectives of a step, estimated by the model, ms")
    _print_row("ranks", "grows with", [t.world for t in LARGE])
    _print_row(f"{COLLECTIVES} small collectives", "log N", [1e3 * sec for sec in modelled.values()])
    goals["small collectives, 1,024 ranks"] = modelled[1024] <= GOAL_COLLECTIVES_SEC
    found = {str(world): asdict(c) | {"files": files[world]} for world, c in counted.items()}
    large = {
        str(t.world): asdict(saved[t.world]) | {"judge_sec": judged[t.world], "planning_sec": planned[t.world]}
        for t in LARGE
    }
    passed = all(goals.values())
    times = {"start_sec": starts, "collective_sec": calls, "modelled_collectives_sec": modelled}
    print(json.dumps({"ranks": found, "large": large, **times, "goals": goals, "passed": passed}))
    return 0 if passed else 1


def _print_row(name: str, law: str, values: Sequence[float]) -> None:
    print(f"{name:46}{law:>11}" + "".join(f"{v:>11,.{0 if v >= 100 or v == int(v) else 1}f}" for v in values))


if __name__ == "__main__":
    sys.exit(main())
