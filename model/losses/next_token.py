"""The next-token loss: the cross entropy of the answer's tokens, divided by their number in the global batch."""

from __future__ import annotations

from torch import Tensor

from model.config import ModelConfig
from model.losses.base import TokenLoss
from model.losses.vocabulary import Vocabulary


class NextToken(TokenLoss):
    """The cross entropy of the LLM's logits at the labels. This loss is always active, with weight 1."""

    name = "next_token"
    options = {}
    by_task = True

    def weight(self, config: ModelConfig) -> float:
        """Return 1."""
        return 1.0

    def token_losses(
        self, logits: Tensor, labels: Tensor, reference: Tensor | None, vocabulary: Vocabulary, config: ModelConfig
    ) -> Tensor:
        """Return the cross entropy of every row."""
        return vocabulary.cross_entropy(logits, labels)
