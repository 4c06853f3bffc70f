"""Operations over the whole vocabulary, with which a loss can be written once for any number of ranks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


class Vocabulary:
    """The operations for a rank that holds the logits of the whole vocabulary.

    If tensor parallelism splits the columns over ranks, a subclass is used, whose operations all ranks of the
    tensor-parallel group must call.
    """

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy [N] of `logits` [N, V] at `labels` [N], in fp32."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks that hold columns. The gradient is that of one rank's copy."""
        return values

    def spread(self, values: Tensor) -> Tensor:
        """Return `values`, which are equal on the ranks that hold columns, for use with this rank's columns alone.

        The gradient is the sum over these ranks.
        """
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum of `values`, which have no gradient, over the ranks that hold columns."""
        return values

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return the log probabilities [N, V] of this rank's columns, normalised over all columns, in fp32."""
        logits = logits.float()
        highest = self.maximum(logits.detach().amax(-1))
        shifted = logits - highest[:, None]
        total = self.sum(shifted.exp().sum(-1)).log()
        return shifted - self.spread(total)[:, None]
