"""Operations over the whole vocabulary, which allow a loss to be written once for any number of ranks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class Vocabulary:
    """The operations for a rank that holds the logits of the whole vocabulary.

    If tensor parallelism splits the columns among ranks, a subclass replaces this class. All ranks of the
    tensor-parallel group must then call its operations.
    """

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy [N] of `logits` [N, V] at `labels` [N], in fp32."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks that hold columns.

        The backward pass does not sum gradients over ranks, because every rank has a copy of the result.
        """
        return values

    def spread(self, values: Tensor) -> Tensor:
        """Return `values`, which must be equal on all ranks that hold columns, for use with this rank's columns only.

        The backward pass sums the gradients over these ranks.
        """
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum of `values` over the ranks that hold columns. `values` must not require a gradient."""
        return values

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return the log probabilities [N, V] of this rank's columns, normalized over all columns, in fp32."""
        logits = logits.float()
        highest = self.maximum(logits.detach().amax(-1))
        shifted = logits - highest[:, None]
        total = self.sum(shifted.exp().sum(-1)).log()
        return shifted - self.spread(total)[:, None]
