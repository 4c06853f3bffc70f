"""Code that Conformer encoders (arXiv 2005.08100) share: positions, batch norms, and the FLOPs of a layer.

Positions are computed in fp32 for every call, from the number of frames alone. transformers keeps them in buffers,
which lose precision when a model is cast to half precision.

Shapes: B windows, F frames, D width, H heads, d width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model.encoders.base import layer_flops


def relative_positions(hidden: Tensor) -> Tensor:
    """Return the sinusoids of Transformer-XL (arXiv 1901.02860) for the distances F - 1 to 1 - F.

    Args:
        hidden: [B, F, D]; only its shape, dtype and device are used.

    Returns:
        [1, 2F - 1, D], in the dtype of `hidden`.
    """
    _, frames, width = hidden.shape
    distance = torch.arange(frames - 1, -frames, -1, device=hidden.device, dtype=torch.float32)
    even = torch.arange(0, width, 2, device=hidden.device, dtype=torch.float32)
    angles = distance[:, None] * 10_000.0 ** (-even / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[None].to(hidden.dtype)


def rotary_positions(hidden: Tensor, head_width: int, base: float) -> Tensor:
    """Return the cosines and sines of rotary positions (arXiv 2104.09864).

    Args:
        hidden: [B, F, D]; only its shape, dtype and device are used.
        head_width: The width d of a head.
        base: The base of the frequencies.

    Returns:
        [2, F, 1, 1, d], in the dtype of `hidden`.
    """
    even = torch.arange(0, head_width, 2, device=hidden.device, dtype=torch.float32)
    time = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.float32)
    angles = (time[:, None] * base ** (-even / head_width)).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))[:, :, None, None].to(hidden.dtype)


def positions_of(config: Any, hidden: Tensor) -> Tensor | None:
    """Return the positions that the layers of a transformers Conformer expect; None if they need none."""
    if config.position_embeddings_type == "relative":
        return relative_positions(hidden)
    if config.position_embeddings_type == "rotary":
        return rotary_positions(hidden, config.hidden_size // config.num_attention_heads, config.rotary_embedding_base)
    return None


def by_distance(scores: Tensor) -> Tensor:
    """Rearrange scores by distance to scores by key (arXiv 1901.02860, appendix B).

    Args:
        scores: [B, H, F, 2F - 1], for the distances query - key from F - 1 to 1 - F.

    Returns:
        [B, H, F, F], for each query and key.
    """
    batch, heads, frames, distances = scores.shape
    shifted = functional.pad(scores, (1, 0)).view(batch, heads, distances + 1, frames)[:, :, 1:]
    return shifted.reshape(batch, heads, frames, distances)[..., :frames]


class FixedBatchNorm(nn.BatchNorm1d):
    """A batch norm that always uses the statistics in the checkpoint.

    With batch statistics, the features of a clip would depend on the other clips and on the number of ranks.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        # This counter is only needed if statistics change, so it is not stored.
        self.register_buffer("num_batches_tracked", torch.tensor(0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` [B, C, F] by the running statistics, even in training mode."""
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def conformer_flops(hf: Any, frames: int, kernel_size: int) -> float:
    """Return the forward FLOPs of one layer: attention, two feed-forward networks and the convolutions."""
    width = hf.hidden_size
    convolutions = 6.0 * frames * width**2 + 2.0 * frames * kernel_size * width
    return layer_flops(frames, width, hf.intermediate_size) + 4.0 * frames * width * hf.intermediate_size + convolutions


def relative_flops(hf: Any, frames: int, projected: bool = True) -> float:
    """Return the forward FLOPs of the relative positions in one layer: their projection, and the scores by distance."""
    distances, width = 2 * frames - 1, hf.hidden_size
    return 2.0 * frames * distances * width + (2.0 * distances * width**2 if projected else 0.0)
