"""The next-token loss: the cross entropy of the answers' tokens, divided by their number in the global batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.losses.base import TokenLoss
from model.losses.vocabulary import Vocabulary


class NextToken(TokenLoss):
    """The cross entropy of the LLM's logits at the labels. This loss is always active, with weight 1.

    With the option `length_exponent`, p, the tokens of a sample with n labels are weighted by n⁻ᵖ. With 0, the default,
    all tokens have the same weight, so samples with long answers dominate the loss. With 1, all samples have the same
    weight. InternVL 2.5 (arXiv 2412.05271, section 3.3) uses 0.5. The weights are scaled so that their mean over the
    tokens of the global batch is 1.
    """

    name = "next_token"
    options = {"length_exponent": 0.0}
    by_task = True

    def weight(self, config: ModelConfig) -> float:
        """Return 1."""
        return 1.0

    def sample_weights(self, num_targets: NDArray[np.int64], config: ModelConfig) -> NDArray[np.float64] | None:
        """Return the factor of the token losses of each sample, [n]; None if all are 1."""
        exponent = self.option(config, "length_exponent")
        if exponent == 0 or not num_targets.any():
            return None
        weights: NDArray[np.float64] = np.maximum(num_targets, 1.0) ** -exponent
        return weights * (num_targets.sum() / (weights @ num_targets))

    def token_losses(
        self, logits: Tensor, labels: Tensor, reference: Tensor | None, vocabulary: Vocabulary, config: ModelConfig
    ) -> Tensor:
        """Return the cross entropy of every row."""
        return vocabulary.cross_entropy(logits, labels)
