"""The strided waveform convolutions of HuBERT, WavLM and wav2vec2, computed so that padding has no effect.

Shapes: B windows, T audio samples, C channels, F frames (20 ms), D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.activations import ACT2FN

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import (
    AudioEncoder,
    DrawnAsTransformers,
    call_layer,
    join_frames,
    layer_flops,
    length_mask,
    normalized,
)
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error
from model.lengths import FRAME_SAMPLES, Windowing

CONV_STACK_DEFAULTS: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
"""Config fields that switch off dropout, LayerDrop and SpecAugment."""


class ConvStackEncoder(AudioEncoder):
    """An `AudioEncoder` whose network has convolutions over waveforms.

    The parameters under `encoder.` have transformers' names.

    Args:
        encoder: The network. `encoder(waves[B, T], num_samples, recompute)` returns [B, F, D].
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: nn.Module, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.hidden_size, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.do_normalize = resolved.do_normalize
        self.kernels, self.strides = tuple(config.conv_kernel), tuple(config.conv_stride)

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`.

        A window shorter than the receptive field is padded with zeros until it yields one frame.
        """
        waves = windows.padded().float()
        if self.do_normalize:
            waves = normalized(waves, windows.lengths)
        num_samples = [max(t, self.windowing.least_samples) for t in windows.lengths]
        waves = F.pad(waves, (0, max(num_samples) - waves.shape[1]))
        hidden = self.encoder(waves.to(self.dtype), num_samples, recompute=self.recompute)
        valid = [conv_lengths(t, self.kernels, self.strides)[-1] for t in num_samples]
        return join_frames(hidden, valid, [self.num_own_frames(t) for t in windows.lengths])


class ConvStackNetwork(DrawnAsTransformers):
    """The forward pass that HuBERT, wav2vec2, data2vec and UniSpeech-SAT share, for waveforms of unequal length.

    A network has the attributes `feature_extractor`, `feature_projection` and `encoder`, as in transformers.
    """

    config: Any
    post_init: Callable[[], None]
    feature_extractor: Any
    feature_projection: Any
    encoder: Any

    def _add_modules(
        self, feature_encoder: type[nn.Module], projection: type[nn.Module], encoder: type[nn.Module]
    ) -> None:
        """Add the modules, which are instances of transformers' classes for this architecture, and initialize them."""
        self.feature_extractor = feature_encoder(self.config)
        if self.config.feat_extract_norm == "group":
            self.feature_extractor.conv_layers[0] = RaggedGroupNormConvLayer(self.config)
        self.feature_projection = projection(self.config)
        self.encoder = encoder(self.config)
        self.post_init()

    def forward(self, waves: Tensor, num_samples: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode waveforms.

        Args:
            waves: [B, max T], zero after the end of each window.
            num_samples: The length of each window.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, max F, D]. The number F of valid frames of each window is the last of `conv_lengths`.
        """
        stable, encoder = getattr(self.config, "do_stable_layer_norm", False), self.encoder
        features, frames = conv_features(self.feature_extractor.conv_layers, self.config, waves, num_samples, recompute)
        hidden = self.feature_projection(features)
        if isinstance(hidden, tuple):  # The second element is used only in pre-training.
            hidden = hidden[0]
        mask = length_mask(frames, hidden.shape[1], hidden.device)
        attention_mask = None if mask is None else mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        hidden = add_positions(encoder.pos_conv_embed, hidden, mask)
        hidden = encoder.dropout(hidden if stable else encoder.layer_norm(hidden))
        for layer in encoder.layers:
            hidden = call_layer(layer, hidden, attention_mask, recompute=recompute)
        return encoder.layer_norm(hidden) if stable else hidden


class RaggedGroupNorm(nn.GroupNorm):
    """A GroupNorm over each window's real length, with the same parameters as `nn.GroupNorm`."""

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:  # type: ignore[override]
        """Normalize `hidden` [B, C, T] over the first `lengths` steps of each window; return zeros after them."""
        size = hidden.shape[2]
        if min(lengths) == size:
            return super().forward(hidden)
        rows = [
            F.pad(F.group_norm(row[None, :, :n], self.num_groups, self.weight, self.bias, self.eps), (0, size - n))
            for row, n in zip(hidden.unbind(0), lengths, strict=True)
        ]
        return torch.cat(rows)


class RaggedGroupNormConvLayer(nn.Module):
    """The first layer of hubert-base and wavlm-base, with the same names as in transformers' `*GroupNormConvLayer`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        channels = config.conv_dim[0]
        self.conv = nn.Conv1d(1, channels, config.conv_kernel[0], stride=config.conv_stride[0], bias=config.conv_bias)
        self.activation = ACT2FN[config.feat_extract_activation]
        self.layer_norm = RaggedGroupNorm(num_groups=channels, num_channels=channels)

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Convolve `hidden` [B, 1, T] to [B, C, T'], of which the first `lengths` steps are valid, and normalize it."""
        return self.activation(self.layer_norm(self.conv(hidden), lengths))


class MaskedPositions(nn.Module):
    """The base class of position embeddings that consist of several convolutions and also expect a mask."""


def conv_stack_windowing(_config: EncoderConfig, hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing.

    Windows are computed at their own length, but at least at the length of the receptive field.
    """
    return Windowing(window_samples, receptive_field(hf_config.conv_kernel, hf_config.conv_stride))


def check_conv_stack(config: EncoderConfig, hf_config: Any, frame_samples: int = FRAME_SAMPLES) -> None:
    """Check that the network supports all settings of a transformers config.

    Raises:
        UserError: If a frame does not have `frame_samples` audio samples, or a feature is not supported.
    """
    hop = math.prod(hf_config.conv_stride)
    if hop != frame_samples:
        rate = f"must be {frame_samples} ({frame_samples / 16:g} ms frames)"
        raise encoder_error(config, f"config.conv_stride: the strides multiply to {hop}", rate)
    if feature_norm(hf_config) not in ("group", "layer"):
        raise encoder_error(config, f"config.feat_extract_norm = {feature_norm(hf_config)}", "set it to group or layer")
    for key in ("add_adapter", "conv_pos_batch_norm"):
        if getattr(hf_config, key, False):
            why = "it changes the frame rate" if key == "add_adapter" else "it mixes the clips of a batch"
            raise encoder_error(config, f"config.{key} = true", f"not supported ({why}): use another checkpoint")


def feature_norm(hf_config: Any) -> str:
    """Return the kind of normalization that the convolutions use (`group` or `layer`).

    data2vec, whose config has no such field, always normalizes each step.
    """
    return str(getattr(hf_config, "feat_extract_norm", "layer"))


def normalizes_as_published(hf_config: Any) -> bool:
    """Return the value of `do_normalize` for published models, as in fairseq and torchaudio.

    It is true for networks with layer norm, such as the large ones, and false for others.
    """
    return feature_norm(hf_config) == "layer"


def receptive_field(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of audio samples on which one frame depends."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def conv_lengths(samples: int, kernels: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the number of steps after each convolution. Inputs are not padded, so every number is rounded down."""
    lengths = []
    for kernel, stride in zip(kernels, strides, strict=True):
        samples = (samples - kernel) // stride + 1
        lengths.append(samples)
    return tuple(lengths)


def conv_stack_flops(hf: Any, samples: int, position_taps: int | None = None) -> float:
    """Return the forward FLOPs of one window, for convolutions, projections and Transformer layers.

    Args:
        hf: The transformers config.
        samples: The length of the padded window in samples.
        position_taps: The total number of taps of the positional convolutions; None for a single convolution with
            `num_conv_pos_embeddings` taps.
    """
    frames, width = padded_conv_lengths(hf, samples)[-1], hf.hidden_size
    taps = hf.num_conv_pos_embeddings if position_taps is None else position_taps
    positions = 2.0 * frames * taps * width * width / hf.num_conv_pos_embedding_groups
    layers = hf.num_hidden_layers * layer_flops(frames, width, hf.intermediate_size)
    return conv_only_flops(hf, samples) + positions + layers


def conv_only_flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of the convolutions over one window and of the projection of their output."""
    flops, channels = 0.0, 1
    steps = padded_conv_lengths(hf, samples)
    for kernel, width, length in zip(hf.conv_kernel, hf.conv_dim, steps, strict=True):
        flops += 2.0 * kernel * channels * width * length
        channels = width
    return flops + 2.0 * steps[-1] * channels * hf.hidden_size


def padded_conv_lengths(hf: Any, samples: int) -> tuple[int, ...]:
    """Return the number of steps after each convolution for a window that is padded to the receptive field."""
    padded = max(samples, receptive_field(hf.conv_kernel, hf.conv_stride))
    return conv_lengths(padded, hf.conv_kernel, hf.conv_stride)


def conv_features(
    layers: nn.ModuleList, config: Any, waves: Tensor, num_samples: Sequence[int], recompute: bool
) -> tuple[Tensor, list[int]]:
    """Run waveforms through the convolutions.

    The valid output of unpadded convolutions depends only on a window's own steps, so no mask is needed between the
    layers.

    Args:
        layers: The convolutional layers.
        config: The transformers config.
        waves: [B, T].
        num_samples: The length of each window.
        recompute: True to recompute the layers in the backward pass.

    Returns:
        The features [B, max F, C], and the number F of valid frames of each window.
    """
    lengths = [conv_lengths(t, config.conv_kernel, config.conv_stride) for t in num_samples]
    hidden = waves[:, None]
    for i, layer in enumerate(layers):
        extra = ([n[i] for n in lengths],) if isinstance(layer, RaggedGroupNormConvLayer) else ()
        hidden = call_layer(layer, hidden, *extra, recompute=recompute)
    return hidden.transpose(1, 2), [n[-1] for n in lengths]


def add_positions(pos_conv_embed: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Add the convolutional position embedding to `hidden` [B, F, D].

    Padding is first set to zero, because the convolution also reads zeros after the end of an unpadded window.
    """
    if mask is not None:
        hidden = hidden.masked_fill(~mask[:, :, None], 0.0)
    if isinstance(pos_conv_embed, MaskedPositions):
        return hidden + pos_conv_embed(hidden, mask)
    return hidden + pos_conv_embed(hidden)


def conv_stack_family(
    config_class: type[PreTrainedConfig],
    network: type[PreTrainedModel],
    flops: Callable[[Any, int], float] = conv_stack_flops,
    defaults: Mapping[str, Any] = CONV_STACK_DEFAULTS,
) -> EncoderFamily:
    """Return the family of a network with convolutions over waveforms.

    Args:
        config_class: The transformers config.
        network: The class of the network, which `ConvStackEncoder` can call.
        flops: See `EncoderFamily.flops`.
        defaults: See `EncoderFamily.defaults`.
    """
    return EncoderFamily(
        config_class=config_class,
        network=network,
        wrapper=ConvStackEncoder,
        windowing=conv_stack_windowing,
        flops=flops,
        defaults=defaults,
        check=check_conv_stack,
        normalizes=normalizes_as_published,
        feature_extractor=Wav2Vec2FeatureExtractor,
    )
