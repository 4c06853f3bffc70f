"""Frame stacking and a perceptron, as in Voxtral, SLAM-ASR and Ultravox.

Voxtral (arXiv 2507.13264) stacks 4 frames and has two linear layers with GELU. SLAM-ASR (arXiv 2402.08846) stacks 5
frames, and Ultravox stacks 8. The second linear layer is the projector.

Shapes: F frames, S audio tokens, D width, k frames per audio token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.base import Adapter
from model.connectors.groups import count_groups, group_size, grouped


class Stacking(Adapter):
    """A linear layer with GELU on the concatenation of k frames, where k is the product of the strides."""

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        self.dim = config.hidden_size
        self.linear = nn.Linear(group_size(config.rate) * input_dim, config.hidden_size, config.bias)
        # As in `Convolutions`, the initialization preserves the variance of the signal.
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        if config.bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        stacked = grouped(features, self.rate).flatten(1)
        return Ragged(nn.functional.gelu(self.linear(stacked)), count_groups(features.lengths, self.rate))

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`: the stacked frames, and the input and output of GELU."""
        return sum(count_groups(frames, self.rate)) * (self.linear.in_features + 2 * self.dim)
