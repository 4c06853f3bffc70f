"""The description of a global batch, and the assignment of its samples to packs (the LLM's packed sequences).

Each rank contributes a few integers per sample and clip. After these are gathered, every rank computes the same
assignment, the plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.batch import Batch, Sample
from model.config import ModelConfig
from model.losses.base import Loss, TokenLoss
from trainer.parallel.balance import Floats
from trainer.parallel.dispatch import ClipLengths
from trainer.parallel.exchange import FIRST, gather_ragged, take_spans
from trainer.parallel.groups import Groups
from trainer.parallel.packs import PackPlan, plan_packs
from trainer.parallel.plan import Ints
from trainer.scoring.tasks import task_names
from trainer.telemetry.token_load import SampleKinds
from trainer.training.router_noise import sample_digest

_FIELDS = 4
_KIND_SHIFT = 20
"""The position of the lowest bit of a sample's kind in the integer that also holds the index of its task."""


@dataclass(frozen=True)
class GlobalBatch:
    """The description of the n samples of all ranks, ordered by rank and then by their order in the rank's batch."""

    source_ranks: Ints
    """[n] the rank that loaded the sample."""
    num_tokens: Ints
    """[n] the number of LLM positions."""
    num_targets: Ints
    """[n] the number of positions with a label."""
    tasks: Ints
    """[n] the index of the sample's task in `task_names()`."""
    kinds: Ints
    """[n] the index of the sample's task and language; see `SampleKinds`; 0 if kinds are not counted."""
    audio_samples: Ints
    """[n] the total length of the sample's clips, in audio samples."""
    counts: Mapping[str, int]
    """The divisor of each loss, by its name."""
    reference_tokens: Mapping[str, Ints]
    """[n] the number of LLM positions of the sample's reference, by the name of the loss; 0 if it has no reference."""
    first_sample: int
    """The index of this rank's first sample."""
    clips: ClipLengths
    """The lengths of the clips of all samples."""
    notes: Floats
    """[world, number of notes] further numbers of each rank; see `gather`."""
    num_values: int
    """The largest number of integers that a rank contributed."""
    digests: Ints | None = None
    """[n] the hash of the sample's key; see `trainer.training.router_noise`; None if they were not gathered."""

    def __len__(self) -> int:
        return len(self.source_ranks)

    def references(self, loss: str) -> GlobalBatch:
        """Return the references of one loss as a global batch. Samples without a reference are omitted."""
        tokens = self.reference_tokens[loss]
        kept = np.flatnonzero(tokens)
        return GlobalBatch(
            self.source_ranks[kept],
            tokens[kept],
            self.num_targets[kept],
            self.tasks[kept],
            self.kinds[kept],
            np.zeros_like(kept),
            {},
            {},
            int(np.count_nonzero(tokens[: self.first_sample])),
            ClipLengths(kept[:0], kept[:0]),
            self.notes[:, :0],
            0,
        )

    def losses_by_task(self, sample_losses: Tensor) -> dict[str, tuple[float, int]]:
        """Return the sum of the token losses and the number of target tokens, by task.

        Args:
            sample_losses: The sum [n] of the token losses of each sample, in host memory.
        """
        sums: dict[str, tuple[float, int]] = {}
        names = task_names()
        for task, loss, targets in zip(
            self.tasks.tolist(), sample_losses.tolist(), self.num_targets.tolist(), strict=True
        ):
            total, tokens = sums.get(names[task], (0.0, 0))
            sums[names[task]] = (total + loss, tokens + targets)
        return sums


References = Mapping[str, Sequence[Sample | None]]
"""Name of a loss with references → the reference of each of this rank's samples; None for a sample without one."""


@dataclass(frozen=True)
class Shared:
    """The description of a global batch, which is the same on all ranks, and the references of this rank's samples."""

    whole: GlobalBatch
    references: References


def references_of(batch: Batch, losses: Sequence[Loss]) -> References:
    """Return the references of this rank's samples."""
    compared = [loss for loss in losses if isinstance(loss, TokenLoss) and loss.has_reference]
    return {loss.name: [loss.reference(s) for s in batch.samples] for loss in compared}


def gather(
    batch: Batch,
    losses: Sequence[Loss],
    references: References,
    model: ModelConfig,
    groups: Groups,
    kinds: SampleKinds | None = None,
    notes: Sequence[float] | Floats = (),
    expected_values: int = FIRST,
    with_digests: bool = False,
) -> GlobalBatch:
    """Return the description of the global batch.

    Collective: every rank of the world must call it, with the same losses. A rank may have no sample.

    Args:
        batch: This rank's samples.
        losses: The losses whose divisors are computed.
        references: The result of `references_of`.
        model: The model's config.
        groups: The process groups of this rank.
        kinds: The kinds of samples whose tokens are counted separately; None if they are not counted.
        notes: Additional numbers to share in the same exchange. Every rank must pass the same number of them.
        expected_values: The number of integers per rank for which one exchange suffices. It must be the same on all
            ranks. If a rank contributes more integers, there is a second exchange.
        with_digests: Whether the hashes of the samples' keys are gathered.
    """
    counts = [loss.count(batch, model) for loss in losses]
    tasks = {name: index for index, name in enumerate(task_names())}
    table = [
        (
            *(s.num_tokens, s.num_targets, tasks[s.task] | _kind(s, kinds) << _KIND_SHIFT, len(s.clips)),
            *(0 if found[i] is None else found[i].num_tokens for found in references.values()),  # type: ignore[union-attr]
            *([sample_digest(s.key)] if with_digests else []),
        )
        for i, s in enumerate(batch.samples)
    ]
    clips = [c.shape[0] for s in batch.samples for c in s.clips]
    noted = np.array(notes, dtype=np.float64).view(np.int64)
    head = [len(table), len(clips), *counts, *noted.tolist()]
    mine = np.array([*head, *(v for row in table for v in row), *clips], dtype=np.int64)
    everyone, sizes = gather_ragged(mine, groups.world, expected_values)
    names = [loss.name for loss in losses]
    return global_batch(everyone, sizes, names, list(references), len(noted), groups.rank, with_digests)


def global_batch(
    everyone: Ints,
    sizes: Ints,
    losses: Sequence[str],
    references: Sequence[str],
    num_notes: int,
    rank: int,
    with_digests: bool = False,
) -> GlobalBatch:
    """Return the description of the global batch, assembled from the contributions of all ranks.

    Args:
        everyone: The integers of all ranks, [world, at least the largest size]: the number of samples, the number of
            clips, a count for each loss, the bits of the notes, a row for each sample, the length of each clip.
        sizes: The number of integers of each rank, [world].
        losses: The names of the losses.
        references: The names of the losses with references.
        num_notes: The number of notes.
        rank: This rank.
        with_digests: Whether the last number in a sample's row is the hash of its key.
    """
    world = len(everyone)
    num_samples, num_clips = everyone[:, 0], everyone[:, 1]
    head, fields = 2 + len(losses) + num_notes, _FIELDS + len(references) + with_digests
    begins = np.full(world, head)
    rows = take_spans(everyone, begins, num_samples * fields).reshape(-1, fields)
    tokens, targets, tasks, clips_of, *others = np.ascontiguousarray(rows.T)
    digests = others.pop() if with_digests else None
    clips = take_spans(everyone, begins + num_samples * fields, num_clips)
    return GlobalBatch(
        source_ranks=np.repeat(np.arange(world), num_samples),
        num_tokens=tokens,
        num_targets=targets,
        tasks=tasks & (1 << _KIND_SHIFT) - 1,
        kinds=tasks >> _KIND_SHIFT,
        audio_samples=_sums(clips, clips_of),
        counts=dict(zip(losses, everyone[:, 2 : 2 + len(losses)].sum(axis=0).tolist(), strict=True)),
        reference_tokens=dict(zip(references, others, strict=True)),
        first_sample=int(num_samples[:rank].sum()),
        clips=ClipLengths(np.repeat(np.arange(world), num_clips), clips),
        notes=np.ascontiguousarray(everyone[:, head - num_notes : head]).view(np.float64),
        num_values=int(sizes.max()),
        digests=digests,
    )


def _kind(sample: Sample, kinds: SampleKinds | None) -> int:
    return 0 if kinds is None else kinds.place(sample.task, sample.meta.get("language"))


def _sums(values: Ints, counts: Ints) -> Ints:
    """Return the sums of consecutive groups of `values`. Group i has `counts[i]` values."""
    if (counts == 1).all():
        return values
    sums, ends = np.concatenate([[0], np.cumsum(values)]), np.cumsum(counts)
    return (sums[ends] - sums[ends - counts]).astype(np.int64)


def plan(whole: GlobalBatch, groups: Groups, budget_tokens: int | None, multiple_tokens: int | None = None) -> PackPlan:
    """Return the plan that assigns each sample of the global batch to a replica, a micro-batch and rows of its pack.

    Args:
        whole: The global batch.
        groups: The process groups of this rank.
        budget_tokens: The largest number of rows in a pack; None for one pack per replica.
        multiple_tokens: The number of rows in a pack is a multiple of this; None for `Topology.row_multiple`.
    """
    topology = groups.topology
    if budget_tokens is None:
        return plan_packs(whole.num_tokens, topology.dp, int(whole.num_tokens.sum()), topology.row_multiple)
    multiple = multiple_tokens or topology.row_multiple
    return plan_packs(whole.num_tokens, topology.dp, budget_tokens, multiple, topology.microbatch_multiple)
