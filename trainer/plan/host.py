"""The host memory of a node, and the disk space of checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.schema import Recipe
from trainer.data.lanes import lanes_of_rank
from trainer.data.node_cache import QUEUE_BYTES
from trainer.plan.ranks import RankStates
from trainer.plan.states import States
from trainer.plan.workload import Workload
from trainer.storage.open import scheme_of

_RANK_BYTES = 600 << 20
"""The resident memory of a rank after its imports. 582 MB were measured on a CPU, that is, without CUDA's context."""
_WORKER_BYTES = 45 << 20
"""The resident memory of a decoding process before it reads data. 43 MB were measured."""
_SAMPLE_BYTES = 4
"""The size of an audio sample in bytes. Audio samples are float32."""


@dataclass(frozen=True)
class HostMemory:
    """The host memory that a node needs, in bytes, without the page cache."""

    processes: int
    """The memory of the ranks and their decoding processes, except the memory that the other fields count."""
    loading: int
    """Encoded audio that is read in advance, decoded clips in caches, and data to be written to the node's cache."""
    shared: int
    """The shared memory (`/dev/shm`) through which decoding processes return audio."""
    pinned: int
    """The pinned copies of a batch's audio, from which it is copied to the devices."""
    snapshot: int
    """The pinned copies of weights and moments for checkpoints."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.processes + self.loading + self.shared + self.pinned + self.snapshot


@dataclass(frozen=True)
class DiskSpace:
    """The disk space of a run's checkpoints, in bytes."""

    checkpoint: int
    """The size of one checkpoint: fp32 weights and moments, and weights that are not trained."""
    shared: int
    """The size of the weights that are not trained, of which all checkpoints share one copy."""
    num_kept: int
    """The largest number of checkpoints that exist at once, including one that is being written."""
    in_bucket: bool
    """Whether checkpoints are written to a bucket."""

    @property
    def run(self) -> int:
        """The size of all checkpoints that exist at once."""
        return self.shared + (self.checkpoint - self.shared) * self.num_kept


def host_memory(recipe: Recipe, states: RankStates, workload: Workload, per_node: int) -> HostMemory:
    """Return the host memory of the node that needs the most.

    Args:
        recipe: The recipe of the run.
        states: The model states of all ranks.
        workload: The samples of a step.
        per_node: The number of ranks per node.
    """
    data, world = recipe.data, states.topology.world
    nodes = [range(first, min(first + per_node, world)) for first in range(0, world, per_node)]
    num_ranks = len(nodes[0])
    num_lanes = max(len(lanes_of_rank(rank, world, data.num_lanes)) for rank in nodes[0])
    workers = min(data.num_workers, num_lanes)
    chunks = num_lanes * len(data.datasets) * data.read_kib << 10
    queue = QUEUE_BYTES if data.node_cache_gib else 0
    audio = int(workload.audio_samples.sum()) * _SAMPLE_BYTES // world
    return HostMemory(
        num_ranks * (_RANK_BYTES + workers * _WORKER_BYTES),
        num_ranks * ((data.read_ahead_mib + data.cache_decoded_mib << 20) + chunks + queue),
        num_ranks * (data.buffer_mib << 20 if workers else 0),
        num_ranks * audio,
        max(sum(states.of_rank(rank).snapshot for rank in node) for node in nodes),
    )


def disk_space(recipe: Recipe, states: RankStates) -> DiskSpace:
    """Return the disk space of the run's checkpoints."""
    config, steps = recipe.checkpoint, recipe.train.steps
    total = sum((states.of_rank(rank) for rank in range(states.topology.world)), States())
    saved = 1 + (-(-steps // config.every_steps) - 1 if config.every_steps else 0)
    # A checkpoint is kept forever if its step is a multiple of both numbers.
    both = math.lcm(config.every_steps, config.keep_every_steps)
    forever = steps // both if both else 0
    kept = config.keep_last + forever + (config.best_metric is not None) + 1
    return DiskSpace(total.snapshot, total.saved_once, min(kept, saved), bool(scheme_of(recipe.run_url)))
