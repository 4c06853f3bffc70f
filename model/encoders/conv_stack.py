"""What HuBERT and WavLM share: the strided convolutions over waveforms, without a trace of the padding.

Shapes: B windows, T audio samples, C channels, F frames (20 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import HubertConfig, WavLMConfig
from transformers.activations import ACT2FN

from model.batch import Ragged
from model.encoders.base import AudioEncoder, call_layer, join_frames, normalized
from model.lengths import Windowing, num_frames

ConvConfig = HubertConfig | WavLMConfig


class ConvStackEncoder(AudioEncoder):
    """HuBERT or WavLM as an `AudioEncoder`; `encoder.*` holds transformers' parameter names."""

    def __init__(self, encoder: nn.Module, config: ConvConfig, window_samples: int, do_normalize: bool) -> None:
        """`encoder(waves[B, T], num_samples, recompute)` gives `[B, F, D]`; `do_normalize`: see `normalized`."""
        super().__init__(config.hidden_size, conv_stack_windowing(config, window_samples))
        self.encoder = encoder
        self.do_normalize = do_normalize
        self.kernels, self.strides = tuple(config.conv_kernel), tuple(config.conv_stride)

    def encode(self, windows: Ragged) -> Tensor:
        """See `AudioEncoder.encode`. A window below the convolutions' reach is padded with zeros to one frame."""
        waves = windows.padded().float()
        if self.do_normalize:
            waves = normalized(waves, windows.lengths)
        num_samples = [max(t, self.windowing.least_samples) for t in windows.lengths]
        waves = F.pad(waves, (0, max(num_samples) - waves.shape[1]))
        hidden = self.encoder(waves.to(self.dtype), num_samples, recompute=self.recompute)
        valid = [conv_lengths(t, self.kernels, self.strides)[-1] for t in num_samples]
        return join_frames(hidden, valid, [num_frames(t) for t in windows.lengths])


class RaggedGroupNorm(nn.GroupNorm):
    """GroupNorm over each clip's real length; the same parameters as `nn.GroupNorm`."""

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Normalise `hidden[B, C, T]` over the first `lengths` steps of each clip; zero after them."""
        size = hidden.shape[2]
        if min(lengths) == size:
            return super().forward(hidden)
        rows = [
            F.pad(F.group_norm(row[None, :, :n], self.num_groups, self.weight, self.bias, self.eps), (0, size - n))
            for row, n in zip(hidden.unbind(0), lengths, strict=True)
        ]
        return torch.cat(rows)


class RaggedGroupNormConvLayer(nn.Module):
    """First layer of hubert-base and wavlm-base, with the parameter names of transformers' `*GroupNormConvLayer`."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        channels = config.conv_dim[0]
        self.conv = nn.Conv1d(1, channels, config.conv_kernel[0], stride=config.conv_stride[0], bias=config.conv_bias)
        self.activation = ACT2FN[config.feat_extract_activation]
        self.layer_norm = RaggedGroupNorm(num_groups=channels, num_channels=channels)

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """`hidden[B, 1, T]` to `[B, C, T']`; `lengths` are the valid steps of the output."""
        return self.activation(self.layer_norm(self.conv(hidden), lengths))


def conv_stack_windowing(config: ConvConfig, window_samples: int) -> Windowing:
    """What a call of the encoder computes: windows at their length, at least what one frame sees."""
    return Windowing(window_samples, receptive_field(config.conv_kernel, config.conv_stride))


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that one frame of the convolutions sees."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def conv_lengths(samples: int, kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Steps after each convolution (none padded: floor)."""
    lengths = []
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
        lengths.append(samples)
    return tuple(lengths)


def conv_features(
    layers: nn.ModuleList, config: ConvConfig, waves: Tensor, num_samples: Sequence[int], recompute: bool
) -> tuple[Tensor, list[int]]:
    """`waves[B, T]` through the convolutions: `[B, max F, C]` and every clip's valid F.

    Unpadded convolutions read only a clip's own steps for its valid output, so padding needs no mask in between.
    """
    lengths = [conv_lengths(t, config.conv_kernel, config.conv_stride) for t in num_samples]
    hidden = waves[:, None]
    for i, layer in enumerate(layers):
        extra = ([n[i] for n in lengths],) if isinstance(layer, RaggedGroupNormConvLayer) else ()
        hidden = call_layer(layer, hidden, *extra, recompute=recompute)
    return hidden.transpose(1, 2), [n[-1] for n in lengths]


def add_positions(pos_conv_embed: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Add the convolutional position embedding to `hidden[B, F, D]`; padding is zeroed first, as its edges are."""
    if mask is not None:
        hidden = hidden.masked_fill(~mask[:, :, None], 0.0)
    return hidden + pos_conv_embed(hidden)
