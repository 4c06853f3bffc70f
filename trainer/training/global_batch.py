"""What every rank knows of a step's global batch, and the plan that follows from it.

Each rank contributes a few integers per sample; from all of them every rank computes the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.batch import Batch
from model.loss import Counts
from trainer.parallel.exchange import gather_ragged
from trainer.parallel.groups import Groups
from trainer.parallel.packs import PackPlan, plan_packs
from trainer.parallel.plan import Ints
from trainer.scoring.tasks import task_names

_FIELDS = 4


@dataclass(frozen=True)
class GlobalBatch:
    """Samples of all ranks, by rank, in the order in which each rank holds them."""

    source_ranks: Ints
    """[n] rank that loaded the sample."""
    num_tokens: Ints
    """[n]"""
    num_targets: Ints
    """[n]"""
    tasks: Ints
    """[n] index into `task_names()`."""
    audio_samples: Ints
    """[n]"""
    counts: Counts
    """Divisors of the loss terms."""
    first_sample: int
    """Index of this rank's first sample."""

    def __len__(self) -> int:
        return len(self.source_ranks)


def gather(batch: Batch, counts: Counts, groups: Groups) -> GlobalBatch:
    """Tell all ranks what this one loaded. Every rank must call it, also without samples."""
    tasks = {name: index for index, name in enumerate(task_names())}
    table = [(s.num_tokens, s.num_targets, tasks[s.task], sum(c.shape[0] for c in s.clips)) for s in batch.samples]
    mine = [counts.targets, counts.ctc_targets, counts.clips, *(v for row in table for v in row)]
    everyone = gather_ragged(np.array(mine, dtype=np.int64), groups.world)
    rows = [r[3:].reshape(-1, _FIELDS) for r in everyone]
    source_ranks = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    tokens, targets, task_indices, audio = np.ascontiguousarray(np.concatenate(rows).T)
    total = Counts(*(int(sum(r[i] for r in everyone)) for i in range(3)))
    before = sum(len(r) for r in rows[: groups.rank])
    return GlobalBatch(source_ranks, tokens, targets, task_indices, audio, total, before)


def plan(whole: GlobalBatch, groups: Groups, budget_tokens: int, multiple_tokens: int | None = None) -> PackPlan:
    """Return where the samples go in the LLM; `multiple_tokens` None: the tensor-parallel size."""
    topology = groups.topology
    return plan_packs(whole.num_tokens, topology.dp, budget_tokens, multiple=multiple_tokens or topology.tp)
