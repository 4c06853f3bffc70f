"""Average pooling over frames, followed by LayerNorm.

Qwen2-Audio (arXiv 2407.10759) and Audio Flamingo 3 (arXiv 2507.08128) use such adapters. Both models apply the norm of
Whisper's encoder after the average instead of before it, so use the encoder family `whisper_no_norm` with these
adapters.

Shapes: F frames, S audio tokens, D width, k frames per audio token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.base import Adapter
from model.connectors.groups import count_groups, grouped, real_frames
from model.errors import UserError


class Pooling(Adapter):
    """An adapter that averages k frames, where k is the product of the strides, and then applies LayerNorm.

    As in Qwen2-Audio, the projector is the only linear layer after the norm.
    """

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        if config.kind == "pooling" and config.hidden_size != input_dim:
            raise UserError(
                f"model.adapter.hidden_size = {config.hidden_size}: pooling does not change the width of the features, "
                f"so hidden_size must be {input_dim}"
            )
        self.dim = input_dim
        self.norm = nn.LayerNorm(input_dim)

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        return Ragged(self._pooled(features), count_groups(features.lengths, self.rate))

    def _pooled(self, features: Ragged) -> Tensor:
        """Return the normalized averages [ΣS, D]. The average of a padded group is over its real frames."""
        groups = grouped(features, self.rate)
        num_real = real_frames(features.lengths, self.rate, groups.device).sum(1, keepdim=True)
        return self.norm(groups.sum(1) / num_real)  # type: ignore[no-any-return]

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`: the input and the output of the norm."""
        return 2 * sum(count_groups(frames, self.rate)) * self.norm.normalized_shape[0]


class PoolingPerceptron(Pooling):
    """`Pooling`, followed by a linear layer with GELU before the projector, as in Audio Flamingo 3."""

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        self.dim = config.hidden_size
        self.linear = nn.Linear(input_dim, config.hidden_size, config.bias)

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        hidden = nn.functional.gelu(self.linear(self._pooled(features)))
        return Ragged(hidden, count_groups(features.lengths, self.rate))

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`: as in `Pooling`, and the input and the output of GELU."""
        return super().kept_elements(frames, device) + 2 * sum(count_groups(frames, self.rate)) * self.dim
