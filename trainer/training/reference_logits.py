"""The LLM's logits for references, which are the sequences that a loss compares with the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from model.batch import Batch, Sample
from model.transfer import to_device
from trainer.engine.llm import LLMEngine
from trainer.parallel.packs import PackPlan
from trainer.parallel.plan import Ints
from trainer.training.global_batch import GlobalBatch
from trainer.training.send import send_text


def reference_logits(
    llm: LLMEngine,
    loss: str,
    whole: GlobalBatch,
    packing: PackPlan,
    references: Sequence[Sample | None],
    multiple_tokens: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the rows that a loss compares with references, and the logits of the references in these rows.

    Collective: every rank of the world must call it.

    Args:
        llm: The engine of the LLM.
        loss: The name of the loss.
        whole: The global batch.
        packing: The plan of the batch's packs.
        references: The reference of each of this rank's samples; None for a sample without one.
        multiple_tokens: The number of rows in a pack of references is a multiple of this.

    Returns:
        rows: For each pack of this rank's replica, the indices [n] of the rows that are compared.
        logits: For each pack, this rank's columns [n, V/TP] of the logits; empty on all stages but the last.
    """
    groups, chosen = llm.groups, whole.references(loss)
    own_packing = _plan(whole, packing, loss, multiple_tokens)
    packs = send_text(Batch(tuple(s for s in references if s is not None)), chosen, own_packing, groups)

    def rows(batch: GlobalBatch, packing: PackPlan, kept: Ints) -> list[Ints]:
        return [_target_rows(batch, packing, groups.place.dp, m, kept) for m in range(packing.num_microbatches)]

    wanted = rows(chosen, own_packing, np.arange(len(chosen)))
    compared = rows(whole, packing, np.flatnonzero(whole.reference_tokens[loss]))
    # Each context-parallel rank computes the whole references, which are short, and keeps the logits of its rows.
    place = np.full(packing.pack_tokens, -1)
    place[groups.part.rows(packing.pack_tokens)] = np.arange(packing.pack_tokens // groups.topology.cp)
    own = [place[r] >= 0 for r in compared]
    wanted_here = tuple(to_device(r[kept], groups.device) for r, kept in zip(wanted, own, strict=True))
    compared_here = tuple(to_device(place[r[kept]], groups.device) for r, kept in zip(compared, own, strict=True))
    return compared_here, llm.reference_logits(packs, wanted_here)


def _plan(whole: GlobalBatch, packing: PackPlan, loss: str, multiple_tokens: int) -> PackPlan:
    """Return a plan that assigns each reference of a loss to the replica and micro-batch of its sample."""
    tokens = whole.reference_tokens[loss]
    return packing.with_lengths(np.flatnonzero(tokens), tokens[tokens > 0], multiple_tokens)


def _target_rows(whole: GlobalBatch, packing: PackPlan, replica: int, microbatch: int, kept: Ints) -> Ints:
    """Return the rows of a pack that have a label and belong to the samples `kept`, in the order of `kept`.

    The samples are given by their indices in the global batch.
    """
    members = kept[packing.pack[kept] == replica * packing.num_microbatches + microbatch]
    ends = packing.replica_rows(members) - microbatch * packing.pack_tokens + packing.num_tokens[members]
    targets = whole.num_targets[members]
    return np.concatenate([np.arange(e - n, e) for e, n in zip(ends, targets, strict=True)] or [ends[:0]])
