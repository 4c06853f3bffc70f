"""The micro-batches of the LLM: their inputs on the first stage, and their losses on the last stage.

Shapes: t rows of a pack on one rank, H hidden width, V vocabulary size. With context parallelism, a rank holds only a
part of the rows of each pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.batch import IGNORE
from model.llm.megatron import embed_tokens
from model.llm.packing import PackedSequences
from trainer.engine.packs import Packs
from trainer.engine.router_meter import RouterMeter
from trainer.engine.token_losses import PackedLoss
from trainer.parallel.groups import Groups


class TrainedPacks:
    """The inputs of a step's micro-batches on the first stage, and the losses on the last stage.

    Args:
        gpt: This rank's first chunk of the model, which embeds tokens on the first stage.
        groups: The process groups of this rank.
        packs: The packed sequences of this replica.
        losses: The losses that are computed from the logits.
        router: The meter of the routers' choices; None for an LLM without FFN experts.
    """

    def __init__(
        self, gpt: Any, groups: Groups, packs: Packs, losses: Sequence[PackedLoss], router: RouterMeter | None
    ) -> None:
        self.gpt, self.groups, self.packs, self.losses = gpt, groups, packs, losses
        self.router = router
        self.share = packs.pack_tokens // groups.topology.tp
        parts = packs.audio.detach().split(self.share) if groups.is_first_stage else ()
        self.audio = [part.requires_grad_() for part in parts]
        """The audio embeddings [t/TP, H] of each pack, each a separate leaf of the graph. With a single leaf, autograd
        would allocate a gradient for all packs in every micro-batch."""
        self.token_losses: list[list[Tensor]] = [[] for _ in losses]
        """For each loss, the token losses [t] in fp32 of the packs so far; empty on all stages but the last."""

    def sequences(self, m: int) -> PackedSequences:
        """Return the segments of a pack, with the function through which its layers report to the meter of routers."""
        observe = None if self.router is None else partial(self.router.observe, m)
        return replace(self.packs.sequences(m), observe=observe, output_rows=self.labelled_rows(m))

    def labelled_rows(self, m: int) -> Tensor | None:
        """Return the rows [n], n ≥ 1, of a pack whose logits are computed; None for all rows.

        On CPUs, the logits of rows without a label are not computed, because a large vocabulary takes much of the
        time. On GPUs, all logits are computed: the number of rows with a label depends on the data, so the host would
        have to wait for it, and shapes would change from pack to pack.
        """
        topology, device = self.groups.topology, self.packs.labels.device
        if device.type != "cpu" or topology.tp > 1 or any(packed.rows for packed in self.losses):
            return None
        rows = (self.packs.labels[self.packs.rows(m)] != IGNORE).nonzero().flatten()
        return rows if len(rows) else torch.zeros(1, dtype=torch.int64)

    def embed(self, m: int) -> Tensor:
        """Return the input [t/TP, 1, H] of a pack on the first stage."""
        mask = self.packs.audio_mask[m * self.share : (m + 1) * self.share]
        return embed_pack(self.gpt, self.packs.token_ids[self.packs.rows(m)], self.audio[m], mask)

    def loss(self, m: int, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of a pack in the form that Megatron's schedule expects, given its logits [1, t, V/TP].

        If only some rows have logits (`labelled_rows`), their number replaces t.
        """
        labels, rows = self.packs.labels[self.packs.rows(m)], self.labelled_rows(m)
        wanted = labels if rows is None else labels.index_select(0, rows)
        total = torch.zeros((), device=logits.device)
        for packed, kept in zip(self.losses, self.token_losses, strict=True):
            token_losses = packed.token_losses(m, logits[0], wanted)
            kept.append(token_losses.detach() if rows is None else _at_rows(token_losses.detach(), rows, len(labels)))
            if packed.sample_weights is not None:
                weights = self.packs.row_weights(m, packed.sample_weights)
                token_losses = token_losses * (weights if rows is None else weights.index_select(0, rows))
            total = total + packed.factor * token_losses.sum()
        # Megatron would divide gradients by this count if `data_parallel` had not replaced its finalization.
        return total, torch.ones((), dtype=torch.int32, device=logits.device), {}


def _at_rows(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return `values` [n] at `rows` [n] of a tensor [count] of zeros."""
    return values.new_zeros(count).index_copy(0, rows, values)


def embed_pack(gpt: Any, token_ids: Tensor, audio: Tensor, audio_mask: Tensor) -> Tensor:
    """Return the first stage's input [t/TP, 1, H]: the embeddings of text and audio in this rank's slice of a pack.

    Args:
        gpt: This rank's stage of the model.
        token_ids: The token ids [t] of the whole pack.
        audio: The audio embeddings [t/TP, H] of the slice.
        audio_mask: The rows [t/TP] of the slice that are audio.
    """
    text = embed_tokens(gpt, token_ids)
    # With masked_scatter, the audio embeddings would not be in the graph of a pack that contains only text.
    return torch.where(audio_mask[:, None, None], audio[:, None].to(text.dtype), text)
