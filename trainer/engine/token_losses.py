"""Losses computed from the LLM's logits on the ranks of the last pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from model.config import ModelConfig
from model.losses.base import TokenLoss, labelled_losses
from model.losses.vocabulary import Vocabulary
from model.transfer import to_device
from trainer.parallel.balance import Floats


@dataclass(frozen=True)
class PackedLoss:
    """One token loss, with its inputs for the M packs (packed sequences) of a replica. Each pack has t rows."""

    loss: TokenLoss
    model: ModelConfig
    factor: float
    """The factor of the sum over tokens in the total loss. It is the weight of the loss divided by its global count."""
    rows: tuple[Tensor, ...] = ()
    """For each pack, the indices [n] of the rows that are compared with a reference; empty if there is no reference."""
    reference: tuple[Tensor, ...] = ()
    """For each pack, the logits [n, V/TP] of the reference in this rank's columns; set only on the last stage."""
    sample_weights: Floats | None = None
    """The factor of the token losses of each sample of the global batch, [number of samples]; None if all are 1."""

    def token_losses(self, microbatch: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every row, [t] in fp32. The loss of a row without a label or a reference is zero.

        Collective: every rank of the tensor-parallel group must call it.

        Args:
            microbatch: The index of the pack.
            logits: The pack's logits [t, V/TP] in the columns that this rank holds.
            labels: The token id [t] that each row must predict; IGNORE for rows without a label.
        """
        vocabulary = TensorParallelVocabulary()
        if not self.loss.has_reference:
            return labelled_losses(self.loss, logits, labels, None, vocabulary, self.model)
        none = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
        if not self.rows:
            return none
        rows, reference = self.rows[microbatch], self.reference[microbatch]
        chosen, wanted = logits.index_select(0, rows), labels.index_select(0, rows)
        found = labelled_losses(self.loss, chosen, wanted, reference, vocabulary, self.model)
        return none.index_copy(0, rows, found)

    def total(self, sample_losses: Tensor) -> Tensor:
        """Return the sum over samples, a scalar, of `sample_losses` [number of samples] with their weights."""
        if self.sample_weights is None:
            return sample_losses.sum()
        return (sample_losses * to_device(self.sample_weights.astype(np.float32), sample_losses.device)).sum()


class TensorParallelVocabulary(Vocabulary):
    """Vocabulary operations for logits whose columns are split over the tensor-parallel group."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy [N] of `logits` [N, V/TP] with target ids `labels` [N], in fp32.

        Collective: every rank of the tensor-parallel group must call it.
        """
        # Megatron overwrites its input, and other losses may read the same logits.
        values = logits.clone() if logits.dtype == torch.float32 else logits.float()
        losses: Tensor = vocab_parallel_cross_entropy(values, labels)
        return losses

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the tensor-parallel group.

        Collective: every rank of the tensor-parallel group must call it. In the backward pass, the gradient of the sum
        is passed to each rank's `values` unchanged, without a reduction.
        """
        total: Tensor = reduce_from_tensor_model_parallel_region(values.clone())  # Megatron reduces in place.
        return total

    def spread(self, values: Tensor) -> Tensor:
        """Return `values` unchanged, for use with the columns that this rank holds.

        Collective: every rank of the tensor-parallel group must call it. In the backward pass, the gradient is summed
        over the tensor-parallel group.
        """
        spread: Tensor = copy_to_tensor_model_parallel_region(values)
        return spread

    def maximum(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over the tensor-parallel group.

        Collective: every rank of the tensor-parallel group must call it. `values` is overwritten with the result.
        """
        group = get_tensor_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
        return values
