"""Measurement of the LLM's router losses, and of the tokens that each FFN expert processes.

Both are measured in the forward pass of each layer with FFN experts, on the rank that routes the tokens.

Shapes: M micro-batches, t rows of a pack (packed sequence), L layers with experts, E experts (the null experts of a
layer count as one), k experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.llm.experts import Choice
from model.llm.mixture import NULL, Mixture
from model.llm.packing import PackedSequences
from model.losses.base import LossTerm
from model.losses.router import RoutedTokens, RouterLoss
from model.transfer import to_device
from trainer.parallel.groups import Groups
from trainer.parallel.plan import Ints


class TokenMeter:
    """A counter of the tokens that each FFN expert processes, over the steps of a logging interval.

    Args:
        mixture: The description of the FFN experts.
        num_kinds: The number of kinds by which tokens are grouped.
        device: The device of this rank.
    """

    def __init__(self, mixture: Mixture, num_kinds: int, device: torch.device) -> None:
        self.mixture = mixture
        self.names = (*mixture.experts, *([NULL] if mixture.num_null else []))
        """The names of the E experts."""
        self.num_steps = 0
        """The number of steps since the last call of `take`."""
        self._index = {layer: index for index, layer in enumerate(mixture.layers)}
        shape = (len(mixture.layers), num_kinds, 2 + 3 * len(self.names))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, layer: int, choice: Choice, kinds: Tensor) -> None:
        """Add the tokens of one pack in one layer.

        Args:
            layer: The number of the layer.
            choice: The choices of the router for n tokens.
            kinds: The kind [n] int64 of each token.
        """
        probs = choice.logits.softmax(-1)
        none = torch.zeros_like(probs)
        chosen = none.scatter(1, choice.experts, 1.0)
        first = none.scatter(1, choice.experts[:, :1], 1.0)
        weights = none.scatter(1, choice.experts, choice.weights)
        if self.mixture.num_null:
            chosen, first, weights = (self._merge_null(values) for values in (chosen, first, weights))
        head = torch.stack([torch.ones_like(probs[:, 0]), torch.special.entr(probs).sum(-1)], dim=1)
        rows = torch.cat([head, chosen, first, weights], dim=1)
        self._sums[self._index[layer]].index_add_(0, kinds, rows.double())

    def _merge_null(self, values: Tensor) -> Tensor:
        """Return `values` [n, choices] with the sum over all null experts as the last column, [n, E]."""
        count = len(self.mixture.experts)
        return torch.cat([values[:, :count], values[:, count:].sum(-1, keepdim=True)], dim=1)

    def take(self, groups: Groups) -> tuple[int, NDArray[np.float64]]:
        """Return the number of steps and the sums over all ranks since the last call, and reset the meter.

        Collective: every rank of the world must call it.

        Returns:
            num_steps: The number of steps.
            sums: [kinds, L, 2 + 3·E]. The columns are the number of tokens; the sum of the entropies of the
                probabilities; and, for each of the E experts, the number of tokens that it processed (E columns), the
                number of tokens for which it had the highest score (E columns), and the sum of its weights (E columns).
        """
        dist.all_reduce(self._sums, group=groups.world)
        taken = self.num_steps, self._sums.transpose(0, 1).cpu().numpy().copy()
        self.num_steps = 0
        self._sums.zero_()
        return taken


class RouterMeter:
    """A collector of the losses and choices of the routers in this rank's stage during a step.

    Args:
        losses: The losses of the routers.
        model: The model's config.
        counts: The count in the global batch by which each loss is divided, by the name of the loss.
        tokens: The meter that counts the tokens of each expert.
        kinds: The kind [M·t] int64 of each row of this replica's packs.
        count: An additional function that is called with the number of a layer and its choices for real tokens; None if
            there is no such function.
    """

    def __init__(
        self,
        losses: Sequence[RouterLoss],
        model: ModelConfig,
        counts: Mapping[str, int],
        tokens: TokenMeter,
        kinds: Tensor,
        count: Callable[[int, Choice], None] | None = None,
    ) -> None:
        self.count = count
        self.losses, self.model, self.tokens, self.kinds = tuple(losses), model, tokens, kinds
        self.num_layers = len(tokens.mixture.layers)
        self.factors = [loss.weight(model) / max(1, counts[loss.name]) / self.num_layers for loss in losses]
        self.sums = torch.zeros(len(self.losses), device=kinds.device)
        """For each loss, this rank's contribution to the sum over the global batch, averaged over the layers with
        experts."""

    def observe(
        self, microbatch: int, layer: int, choice: Choice, packed: PackedSequences, tp_group: dist.ProcessGroup
    ) -> Tensor:
        """Return the contribution of one layer's choices for a pack to the total loss, a scalar with a gradient.

        Collective: every rank of the tensor-parallel group must call it.

        Args:
            microbatch: The number of the pack.
            layer: The number of the layer.
            choice: The choices for this rank's rows of the pack.
            packed: The pack.
            tp_group: The tensor-parallel group, whose other ranks hold the other rows of the pack.
        """
        tokens = routed_tokens(choice, packed, tp_group)
        total = choice.logits.new_zeros(())
        for index, (loss, factor) in enumerate(zip(self.losses, self.factors, strict=True)):
            found = loss.sum(tokens, self.model)
            self.sums[index] += found.detach() / self.num_layers
            total = total + factor * found
        if self.count is not None:
            self.count(layer, tokens.choice)
        with torch.no_grad():
            first = microbatch * packed.num_tokens + tp_group.rank() * len(choice.logits)
            self.tokens.add(layer, tokens.choice, self.kinds[first : first + len(tokens.samples)])
        return total

    def terms(self, batch: Batch) -> list[LossTerm]:
        """Return this rank's contributions to the terms of the loss.

        Args:
            batch: This rank's part of the global batch.
        """
        return [
            LossTerm(loss.name, loss.weight(self.model), value, loss.count(batch, self.model))
            for loss, value in zip(self.losses, self.sums, strict=True)
        ]


def routed_tokens(choice: Choice, packed: PackedSequences, tp_group: dist.ProcessGroup) -> RoutedTokens:
    """Return the choices for this rank's rows of a pack, without padding, and the sample of each row."""
    share, device = len(choice.logits), choice.logits.device
    first = tp_group.rank() * share
    # Padding is at the end of a pack, so the host knows how many rows are real.
    num_real = min(max(sum(packed.lengths[: packed.num_samples]) - first, 0), share)
    kept = choice.rows(slice(num_real))
    samples = packed.row_samples(device)[first : first + num_real]

    def reduce(tensor: Tensor) -> Tensor:
        if tp_group.size() > 1:
            dist.all_reduce(tensor, group=tp_group)
        return tensor

    return RoutedTokens(kept, samples, packed.sample_lengths(device), reduce)


def token_kinds(
    lengths: Sequence[Sequence[int]],
    samples: Sequence[Sequence[int]],
    is_audio: Tensor | None,
    kinds_of_samples: Ints,
    num_modalities: int,
    groups: Groups,
) -> Tensor:
    """Return the kind of every row of this replica's packs, [M·t] int64.

    The kind of a row is the kind of its sample, multiplied by `num_modalities`, plus the row's modality.

    Collective: every rank of the replica must call it.

    Args:
        lengths: The lengths of the segments of each of the M packs.
        samples: For each pack, the index in the global batch of the sample of every segment except the padding.
        is_audio: [M·t] bool, true where a row is audio; None if no row is audio. With more than two pipeline stages,
            the value of the first stage is used on all stages.
        kinds_of_samples: The kind of each sample of the global batch, for example its task.
        num_modalities: The number of modalities. Modality 0 is text and modality 1 is audio.
        groups: The process groups of this rank.
    """
    of_rows = np.zeros((len(lengths), sum(lengths[0])), dtype=np.int64)  # The meter ignores rows of padding.
    for own, own_lengths, own_samples in zip(of_rows, lengths, samples, strict=True):
        repeated = np.repeat(kinds_of_samples[list(own_samples)], own_lengths[: len(own_samples)])
        own[: len(repeated)] = repeated
    flags = torch.zeros(of_rows.size, dtype=torch.uint8, device=groups.device)
    if is_audio is not None and len(is_audio):
        flags.copy_(is_audio)
    if groups.topology.pp > 2:  # Stages between the first and the last one do not receive the packs' rows.
        source = groups.topology.first_stage_ranks(groups.place.dp)[0]
        dist.broadcast(flags, src=source, group=groups.replica)
    return to_device(of_rows.ravel(), groups.device) * num_modalities + flags
