"""Frame stacking and a gated perceptron with RMSNorm, as in Ultravox (fixie-ai/ultravox).

Shapes: F frames, S audio tokens, D width, k frames per audio token, C hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.base import Adapter
from model.connectors.groups import count_groups, group_size, grouped
from model.errors import UserError

_EPSILON = 1e-6


class SwiGLU(Adapter):
    """RMSNorm, a linear layer, SwiGLU and a second RMSNorm, applied in this order to groups of concatenated frames.

    A group has k frames, where k is the product of the strides. The linear layer has C = `hidden_size` outputs. Their
    first half is multiplied by the SiLU of their second half, so the width of the output is C / 2. Ultravox has these
    norms from version 0.5 on, and no biases (`bias: false`).
    """

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        if config.hidden_size % 2:
            raise UserError(f"model.adapter.hidden_size = {config.hidden_size}: must be even for kind swiglu")
        self.dim = config.hidden_size // 2
        width = group_size(config.rate) * input_dim
        self.norm = nn.RMSNorm(width, eps=_EPSILON)
        self.linear = nn.Linear(width, config.hidden_size, config.bias)
        self.mid_norm = nn.Identity() if self.normalizes_embeddings else nn.RMSNorm(self.dim, eps=_EPSILON)

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        stacked = grouped(features, self.rate).flatten(1)
        value, gate = self.linear(self.norm(stacked)).chunk(2, dim=-1)
        return Ragged(self.mid_norm(nn.functional.silu(gate) * value), count_groups(features.lengths, self.rate))

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`.

        The inputs of each norm and of each linear layer are saved, and so are the two factors of SwiGLU and the SiLU of
        one of them.
        """
        return sum(count_groups(frames, self.rate)) * (2 * self.linear.in_features + 5 * self.dim)


class SwiGLUPostNorm(SwiGLU):
    """A variant of `SwiGLU` whose second norm follows the projector, as in Ultravox up to version 0.4.1."""

    normalizes_embeddings = True
