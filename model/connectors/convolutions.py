"""Strided convolutions, which reduce 50 frames per second to the rate of audio tokens (MoWE-Audio, arXiv 2409.06635).

Shapes: B clips, F frames, S audio tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.base import Adapter, check_default_shape
from model.conv import Conv1d
from model.errors import UserError
from model.lengths import TokenRate
from model.transfer import to_device


class Convolutions(Adapter):
    """A stack of strided convolutions, each followed by GELU.

    Positions past the end of a clip are set to zero after every layer, so the output for a clip does not depend on the
    other clips in the batch.
    """

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        check_default_shape(config)
        if config.kernel_size % 2 == 0:
            raise UserError(f"model.adapter.kernel_size = {config.kernel_size}: must be odd")
        widths = [input_dim] + [config.hidden_size] * len(config.strides)
        layers = [
            Conv1d(a, b, config.kernel_size, stride, config.kernel_size // 2)
            for a, b, stride in zip(widths, widths[1:], config.strides, strict=False)
        ]
        for layer in layers:
            # He initialization (arXiv 1502.01852) preserves the variance. With PyTorch's default, each layer would
            # reduce the signal to a third, so that all audio tokens would initially be almost equal.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.dim = widths[-1]

    def forward(self, features: Ragged) -> Ragged:
        """Implement `Adapter.forward`."""
        x = features.padded().transpose(1, 2)
        counts = [features.lengths]
        for stride in self.rate.strides:
            counts.append(tuple(TokenRate((stride,)).tokens_of_frames(c) for c in counts[-1]))
        for layer, ends in zip(self.layers, to_device(counts[1:], x.device), strict=True):
            x = nn.functional.gelu(layer(x))
            real = torch.arange(x.shape[-1], device=x.device) < ends[:, None]
            x = x * real[:, None]
        rows = x.transpose(1, 2).unbind(0)
        return Ragged(torch.cat([row[:n] for row, n in zip(rows, counts[-1], strict=True)]), counts[-1])

    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Implement `Adapter.kept_elements`: the padded input, and the input and output of every GELU."""
        longest, kept = max(frames), 0
        for number, (layer, stride) in enumerate(zip(self.layers, self.rate.strides, strict=True)):
            assert isinstance(layer, Conv1d)
            if number == 0:
                kept += len(frames) * longest * layer.in_channels
            longest = TokenRate((stride,)).tokens_of_frames(longest)
            kept += 2 * len(frames) * longest * layer.out_channels
            if device == "cpu":  # The convolution also saves its unfolded windows.
                kept += len(frames) * longest * layer.kernel_size[0] * layer.in_channels
        return kept
