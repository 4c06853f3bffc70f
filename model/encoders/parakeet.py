"""Parakeet's FastConformer (arXiv 2305.05084) on windows of unequal length, from transformers' modules.

Shapes: B windows, T audio samples, M mel frames (10 ms), N mel bins, E frames (80 ms), D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ParakeetEncoderConfig, ParakeetFeatureExtractor
from transformers.models.parakeet.modeling_parakeet import (
    ParakeetEncoderBlock,
    ParakeetEncoderSubsamplingConv2D,
    ParakeetPreTrainedModel,
)

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, DrawnAsTransformers, call_layer, join_frames, length_mask
from model.encoders.conformer import FixedBatchNorm, conformer_flops, relative_flops, relative_positions
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error
from model.encoders.log_mel import mel_filters
from model.lengths import SAMPLE_RATE, Windowing
from model.transfer import to_device

HOP_SAMPLES = 160
FFT_SAMPLES = 512
WINDOW_SAMPLES = 400
PREEMPHASIS = 0.97
LOG_GUARD = 2.0**-24
"""The number that is added to energies before the logarithm is taken."""
EPSILON = 1e-5
"""The number that is added to the standard deviation of a mel bin."""
SUBSAMPLING = 8
MIN_SAMPLES = 2 * HOP_SAMPLES
"""The length to which shorter clips are padded, so that they have two mel frames and a variance."""


class RaggedParakeetEncoder(DrawnAsTransformers, ParakeetPreTrainedModel):
    """The modules of transformers' `ParakeetEncoder` under the same names."""

    def __init__(self, config: ParakeetEncoderConfig) -> None:
        super().__init__(config)
        self.input_scale = math.sqrt(config.hidden_size) if config.scale_input else 1.0
        self.subsampling = ParakeetEncoderSubsamplingConv2D(config)
        layers: Any = torch.nn.ModuleList(ParakeetEncoderBlock(config, i) for i in range(config.num_hidden_layers))
        for layer in layers:
            layer.conv.norm = FixedBatchNorm(config.hidden_size)
        self.layers = layers
        self.post_init()

    def forward(self, mel: Tensor, num_mel_frames: Sequence[int], recompute: bool = False) -> Tensor:
        """Encode mel spectrograms.

        Args:
            mel: [B, max M, N], zero after each window's M frames.
            num_mel_frames: The number M of mel frames of each window.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, max E, D], with E = `subsampled(M)` for each window.
        """
        mel_mask = length_mask(num_mel_frames, mel.shape[1], mel.device)
        hidden = self.subsampling(mel, mel_mask) * self.input_scale
        positions = relative_positions(hidden)
        hidden = F.dropout(hidden, p=self.config.dropout, training=self.training)
        positions = F.dropout(positions, p=self.config.dropout_positions, training=self.training)
        positions = positions.expand(hidden.shape[0], -1, -1)
        mask = length_mask([subsampled(m) for m in num_mel_frames], hidden.shape[1], hidden.device)
        attention_mask = None if mask is None else (mask[:, None] & mask[:, :, None])[:, None]
        for layer in self.layers:
            hidden = call_layer(layer, hidden, attention_mask, positions, recompute=recompute)
        return hidden


class Parakeet(AudioEncoder):
    """Parakeet as an `AudioEncoder`. The parameters under `encoder.` have transformers' names.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: RaggedParakeetEncoder, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.hidden_size, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.num_mels = config.num_mel_bins

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`."""
        mel, lengths = normalized_mel(windows, self.num_mels)
        hidden = self.encoder(mel.to(self.dtype), lengths, recompute=self.recompute)
        wanted = [self.num_own_frames(t) for t in windows.lengths]
        return join_frames(hidden, [subsampled(m) for m in lengths], wanted)


@torch.no_grad()
def normalized_mel(audio: Ragged, num_mels: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return log-mel spectrograms whose bins have zero mean and unit variance over each clip.

    The result equals that of `ParakeetFeatureExtractor(feature_size=num_mels)` on each clip.

    Args:
        audio: The waveforms [ΣT].
        num_mels: The number N of mel bins.

    Returns:
        [B, max M, N] in fp32, zero after each clip's M frames, and the number M for each clip.
    """
    lengths = tuple(max(t, MIN_SAMPLES) // HOP_SAMPLES for t in audio.lengths)
    waves = audio.padded().float()
    waves = F.pad(waves, (0, max(0, MIN_SAMPLES - waves.shape[1])))
    emphasized = torch.cat((waves[:, :1], waves[:, 1:] - PREEMPHASIS * waves[:, :-1]), dim=1)
    inside = length_mask(audio.lengths, waves.shape[1], waves.device)
    if inside is not None:
        emphasized = emphasized.masked_fill(~inside, 0.0)
    window = torch.hann_window(WINDOW_SAMPLES, periodic=False, device=waves.device)
    spectrum = torch.stft(
        emphasized, FFT_SAMPLES, HOP_SAMPLES, WINDOW_SAMPLES, window, pad_mode="constant", return_complex=True
    )
    power = spectrum.real.square() + spectrum.imag.square()
    mel = (
        (mel_filters(num_mels, FFT_SAMPLES, waves.device) @ power + LOG_GUARD).log().transpose(1, 2)[:, : max(lengths)]
    )
    mask = length_mask(lengths, mel.shape[1], mel.device)
    count = to_device(lengths, mel.device)[:, None, None]
    if mask is not None:
        mel = mel.masked_fill(~mask[:, :, None], 0.0)
    centered = mel - mel.sum(1, keepdim=True) / count
    if mask is not None:
        centered = centered.masked_fill(~mask[:, :, None], 0.0)
    return centered / ((centered.square().sum(1, keepdim=True) / (count - 1)).sqrt() + EPSILON), lengths


def subsampled(mel_frames: int) -> int:
    """Return the number of frames for `mel_frames` mel frames. Each of the strided convolutions rounds up."""
    return -(-mel_frames // SUBSAMPLING)


def _windowing(_config: EncoderConfig, _hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. Windows are computed at their own length, but at least at `MIN_SAMPLES`."""
    return Windowing(window_samples, MIN_SAMPLES)


def _check(config: EncoderConfig, hf_config: Any) -> None:
    """Check that a transformers config describes a network with frames of 80 ms.

    Raises:
        UserError: If the config has a different subsampling.
    """
    wanted = {
        "subsampling_factor": SUBSAMPLING,
        "subsampling_conv_stride": 2,
        "subsampling_conv_kernel_size": 3,
    }
    for key, value in wanted.items():
        found = getattr(hf_config, key)
        if found != value:
            raise encoder_error(config, f"config.{key} = {found}", f"only {value} is supported: use another checkpoint")


def _features(hf_config: Any) -> dict[str, Any]:
    """Return the fields of preprocessor_config.json that `normalized_mel` requires."""
    return {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": hf_config.num_mel_bins,
        "hop_length": HOP_SAMPLES,
        "n_fft": FFT_SAMPLES,
        "preemphasis": PREEMPHASIS,
        "sampling_rate": SAMPLE_RATE,
        "win_length": WINDOW_SAMPLES,
    }


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window: mel filters, subsampling and Conformer layers."""
    steps, bins = max(samples, MIN_SAMPLES) // HOP_SAMPLES, hf.num_mel_bins
    channels, taps = hf.subsampling_conv_channels, hf.subsampling_conv_kernel_size**2
    flops = 2.0 * (FFT_SAMPLES // 2 + 1) * bins * (steps + 1)
    for i in range(int(math.log2(SUBSAMPLING))):
        steps, bins = -(-steps // 2), -(-bins // 2)
        flops += 2.0 * steps * bins * channels * (taps + (channels if i else 0))
    flops += 2.0 * steps * bins * channels * hf.hidden_size
    layer = conformer_flops(hf, steps, hf.conv_kernel_size) + relative_flops(hf, steps)
    return flops + hf.num_hidden_layers * layer


PARAKEET = EncoderFamily(
    config_class=ParakeetEncoderConfig,
    network=RaggedParakeetEncoder,
    wrapper=Parakeet,
    windowing=_windowing,
    flops=_flops,
    frame_samples=SUBSAMPLING * HOP_SAMPLES,
    defaults={
        "dropout": 0.0,
        "dropout_positions": 0.0,
        "layerdrop": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    check=_check,
    normalizes=None,
    features=_features,
    feature_extractor=ParakeetFeatureExtractor,
    containers={"parakeet_ctc": "encoder_config", "parakeet_rnnt": "encoder_config", "parakeet_tdt": "encoder_config"},
    # Published checkpoints contain the whole model. The names of the encoder's tensors begin with `encoder.` or
    # `model.encoder.`.
    key_mapping={r"^(model\.)?encoder\.": ""},
)
