"""The exchange that sends tokens and audio embeddings to the ranks whose packs contain them (line 6 in step.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from model.batch import IGNORE, Batch
from model.transfer import to_device
from trainer.engine.packs import Packs
from trainer.parallel.exchange import exchange
from trainer.parallel.groups import Groups
from trainer.parallel.packs import PackPlan, embedding_segments, token_segments
from trainer.parallel.plan import route
from trainer.training.global_batch import GlobalBatch


def send(batch: Batch, embeddings: Tensor, whole: GlobalBatch, packing: PackPlan, groups: Groups) -> Packs:
    """Send tokens and audio embeddings to the LLM.

    Collective: every rank of the world must call it.

    Args:
        batch: This rank's part of the global batch.
        embeddings: The audio embeddings [ΣS, H] of this rank's clips. Each is sent to the rank of the first stage whose
            slice of the pack contains its position.
        whole: The global batch.
        packing: The positions of all samples in the packs.
        groups: The process groups of this rank.

    Returns:
        The packs of this rank's replica. On stages other than the first and the last, they have no rows.
    """
    topology = groups.topology
    arrived = _send_tokens(batch, whole, packing, groups)
    if topology.cp > 1:
        own = to_device(groups.part.rows(packing.pack_tokens), groups.device)
        arrived = arrived.view(-1, packing.pack_tokens, 3).index_select(1, own).flatten(0, 1)
    flags = torch.zeros(0, dtype=torch.bool, device=groups.device)
    if groups.is_first_stage:
        slices = arrived[:, 2].view(packing.num_microbatches, topology.tp, -1)
        flags = slices[:, groups.place.tp].flatten().bool()
    segments = embedding_segments(packing, whole.source_ranks, topology, groups.rank)
    is_audio = batch.audio_mask.numpy()
    audio_tokens = np.cumsum(is_audio) - 1
    all_rows = route(segments, groups.rank, topology.world, len(flags))
    audio_route = all_rows.restricted(is_audio, flags.cpu().numpy()).renumbered(audio_tokens)
    audio = exchange(embeddings, audio_route, groups.world)
    return replace(
        _packs(arrived, whole, packing, groups),
        audio=audio,
        audio_mask=flags,
        is_audio=arrived[:, 2].bool(),
        part=groups.part,
    )


def send_text(batch: Batch, whole: GlobalBatch, packing: PackPlan, groups: Groups) -> Packs:
    """Send only tokens to the LLM, as for samples without audio.

    Collective: every rank of the world must call it.

    Args:
        batch: This rank's part of the global batch.
        whole: The global batch.
        packing: The positions of all samples in the packs, which are not divided among context-parallel ranks.
        groups: The process groups of this rank.

    Returns:
        The packs of this rank's replica, without audio.
    """
    return _packs(_send_tokens(batch, whole, packing, groups), whole, packing, groups)


def _send_tokens(batch: Batch, whole: GlobalBatch, packing: PackPlan, groups: Groups) -> Tensor:
    """Send the tokens of a global batch to the first and the last pipeline stage of the replicas that process them.

    Collective: every rank of the world must call it.

    Returns:
        The token id, the label and the audio flag of every row of this replica's packs, [M·t, 3] int64. There are no
        rows on other stages.
    """
    topology = groups.topology
    # Rows that no rank sends arrive as zeros, which the shift turns into IGNORE.
    tokens = torch.stack([batch.tokens.values, batch.labels.values - IGNORE, batch.audio_mask.long()], dim=1)
    at_ends = groups.is_first_stage or groups.is_last_stage
    rows = packing.num_microbatches * packing.pack_tokens if at_ends else 0
    segments = token_segments(packing, whole.source_ranks, topology, groups.rank)
    arrived = exchange(
        to_device(tokens, groups.device), route(segments, groups.rank, topology.world, rows), groups.world
    )
    arrived[:, 1] += IGNORE
    return arrived


def _packs(arrived: Tensor, whole: GlobalBatch, packing: PackPlan, groups: Groups) -> Packs:
    """Return the whole packs of this replica, without audio, from the result of `_send_tokens`."""
    microbatches = range(packing.num_microbatches)
    return Packs(
        lengths=tuple(packing.lengths(groups.place.dp, m) for m in microbatches),
        token_ids=arrived[:, 0],
        labels=arrived[:, 1],
        samples=tuple(tuple(packing.members(groups.place.dp, m).tolist()) for m in microbatches),
        audio=torch.zeros(0, device=groups.device),
        audio_mask=torch.zeros(0, dtype=torch.bool, device=groups.device),
        num_samples=len(whole),
    )
