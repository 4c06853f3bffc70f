"""The adapter, whose strided convolutions reduce 50 frames per second to the rate of audio tokens.

Shapes: B clips, F frames, S audio tokens, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from model import lengths as length_arithmetic
from model.batch import Ragged
from model.config import AdapterConfig
from model.conv import Conv1d
from model.errors import UserError
from model.transfer import to_device


class Adapter(nn.Module):
    """A stack of strided convolutions, each followed by GELU.

    Positions past the end of a clip are set to zero after every layer, so the output for a clip does not depend on the
    other clips in the batch.
    """

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__()
        if config.kernel_size % 2 == 0:
            raise UserError(f"model.adapter.kernel_size = {config.kernel_size}: must be odd")
        self.strides = config.strides
        widths = [input_dim] + [config.hidden_size] * len(config.strides)
        layers = [
            Conv1d(a, b, config.kernel_size, stride, config.kernel_size // 2)
            for a, b, stride in zip(widths, widths[1:], config.strides, strict=False)
        ]
        for layer in layers:
            # He initialisation (arXiv 1502.01852) keeps the variance. PyTorch's default would shrink the signal to a
            # third in each layer, and all audio tokens would initially be nearly equal.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.dim = widths[-1]

    def forward(self, features: Ragged) -> Ragged:
        """Return the output [ΣS, hidden_size] for features [ΣF, D], with S = `lengths.num_audio_tokens(F, strides)`."""
        x = features.padded().transpose(1, 2)
        counts = [features.lengths]
        for stride in self.strides:
            counts.append(tuple(length_arithmetic.num_audio_tokens(c, (stride,)) for c in counts[-1]))
        for layer, ends in zip(self.layers, to_device(counts[1:], x.device), strict=True):
            x = nn.functional.gelu(layer(x))
            real = torch.arange(x.shape[-1], device=x.device) < ends[:, None]
            x = x * real[:, None]
        rows = x.transpose(1, 2).unbind(0)
        return Ragged(torch.cat([row[:n] for row, n in zip(rows, counts[-1], strict=True)]), counts[-1])
