"""The losses of the LLM's logits, as a rank of the last pipeline stage computes them."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class PackedLoss:
    """One loss of a replica's packs. M is their number, t the number of rows of each."""

    loss: TokenLoss
    model: ModelConfig
    factor: float
    """The factor of the sum of the token losses in the total loss: the weight divided by the global count."""
    rows: tuple[Tensor, ...] = ()
    """For each of the M packs, the rows [n] that are compared with a reference; empty if there is no reference."""
    reference: tuple[Tensor, ...] = ()
    """For each of the M packs, this rank's columns [n, V/TP] of the reference's logits; last stage only."""

    def token_losses(self, microbatch: int, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every row, [t] in fp32, with zero where a row takes no part.

        Collective: every rank of the tensor-parallel group must call it.

        Args:
            microbatch: The number of the pack.
            logits: This rank's columns [t, V/TP].
            labels: The token ids [t], or IGNORE.
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


class TensorParallelVocabulary(Vocabulary):
    """The operations where each rank of the tensor-parallel group holds some columns of the logits."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy [N] of `logits` [N, V/TP] at `labels` [N], in fp32."""
        # Megatron computes in place, and other losses may read the same logits.
        values = logits.clone() if logits.dtype == torch.float32 else logits.float()
        losses: Tensor = vocab_parallel_cross_entropy(values, labels)
        return losses

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the tensor-parallel group; its gradient is that of one rank's copy."""
        total: Tensor = reduce_from_tensor_model_parallel_region(values.clone())  # it reduces in place
        return total

    def spread(self, values: Tensor) -> Tensor:
        """Return `values`; their gradient is the sum over the tensor-parallel group."""
        spread: Tensor = copy_to_tensor_model_parallel_region(values)
        return spread

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum of `values` over the tensor-parallel group."""
        group = get_tensor_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
        return values
