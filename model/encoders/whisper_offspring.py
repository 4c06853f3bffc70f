"""The audio towers of Voxtral, Qwen2-Audio and Audio Flamingo 3, which were initialized from Whisper large's encoder.

Voxtral's tower (arXiv 2507.13264) has the same forward pass as Whisper's encoder. Qwen2-Audio (2407.10759) and Audio
Flamingo 3 (2507.08128) do not attend to the silence that pads a window to 30 s, and average pairs of frames before the
last norm.

Shapes: B windows, N mel bins, M mel frames (10 ms), F frames (20 ms), E pooled frames (40 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AudioFlamingo3Encoder,
    AudioFlamingo3EncoderConfig,
    PreTrainedModel,
    Qwen2AudioEncoder,
    Qwen2AudioEncoderConfig,
    VoxtralEncoder,
    VoxtralEncoderConfig,
    WhisperFeatureExtractor,
)

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.base import AudioEncoder, join_frames
from model.encoders.family import EncoderFamily, ResolvedEncoder
from model.encoders.log_mel import HOP_SAMPLES, num_mel_frames, padded_log_mel
from model.encoders.whisper import MelTransformer, Whisper, check_capacity, whisper_flops, whisper_windowing
from model.lengths import FRAME_SAMPLES, SAMPLE_RATE, Windowing

POOL = 2
POOLED_SAMPLES = POOL * FRAME_SAMPLES
AFTER = 3
"""The number of mel frames of silence after a window that affect its last frames, because of FFT windows and
convolutions."""


class RaggedVoxtralEncoder(MelTransformer, VoxtralEncoder):
    """transformers' `VoxtralEncoder`, with the same parameters."""


class PooledTransformer(MelTransformer):
    """The forward pass of Qwen2-Audio's and Audio Flamingo 3's towers, for windows of unequal length."""

    avg_pooler: nn.AvgPool1d

    def forward(  # type: ignore[override]
        self, mel: Tensor, lengths: Sequence[int], recompute: bool = False
    ) -> Tensor:
        """Encode mel spectrograms, which include the silence after each window.

        Args:
            mel: [B, N, M].
            lengths: The number F of frames of each window that take part in attention, at most M / 2.
            recompute: True to recompute every layer in the backward pass.

        Returns:
            [B, max F // 2, D]. The number E of valid frames of each window is F // 2.
        """
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)[:, : max(lengths)]
        hidden = self.transform(hidden, lengths, recompute)
        return self.layer_norm(self.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))


class RaggedQwen2AudioEncoder(PooledTransformer, Qwen2AudioEncoder):
    """transformers' `Qwen2AudioEncoder`, with the same parameters."""


class RaggedAudioFlamingo3Encoder(PooledTransformer, AudioFlamingo3Encoder):
    """transformers' `AudioFlamingo3Encoder`, with the same parameters."""


class PooledWhisper(AudioEncoder):
    """An audio tower with pooled frames as an `AudioEncoder`. The parameters under `encoder.` have transformers' names.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: PreTrainedModel, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.d_model, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.num_mels = config.num_mel_bins
        self.capacity = config.max_source_positions * FRAME_SAMPLES

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`.

        The windows are not padded to 30 s. Only as much silence is appended as affects their frames.
        """
        lengths = [_frames(t) for t in windows.lengths]
        mel_frames = POOL * max(lengths)
        padded = min(self.capacity, (mel_frames + AFTER) * HOP_SAMPLES)
        mel, _ = padded_log_mel(windows, self.num_mels, padded)
        hidden = self.encoder(mel[:, :, : mel_frames + 2].to(self.dtype), lengths, recompute=self.recompute)
        return join_frames(hidden, [n // POOL for n in lengths], [self.num_own_frames(t) for t in windows.lengths])


def _frames(samples: int) -> int:
    """Return the number of frames before pooling. It is at least two, so that there is at least one pooled frame."""
    return max(POOL, -(-num_mel_frames(samples) // 2))


def _windowing(config: EncoderConfig, hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. Windows are computed at their own length, but at least at one pooled frame.

    Raises:
        UserError: If the window exceeds the checkpoint's positions.
    """
    check_capacity(config, hf_config, window_samples)
    return Windowing(window_samples, POOLED_SAMPLES)


def _flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window."""
    return whisper_flops(hf, _frames(samples) * FRAME_SAMPLES)


def _features(hf_config: Any) -> dict[str, Any]:
    """Return the fields of preprocessor_config.json that `padded_log_mel` requires."""
    return {"feature_size": hf_config.num_mel_bins, "sampling_rate": SAMPLE_RATE}


_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
KEY_MAPPING = {r"^(model\.)?audio_tower\.": ""}
VOXTRAL = EncoderFamily(
    config_class=VoxtralEncoderConfig,
    network=RaggedVoxtralEncoder,
    wrapper=Whisper,
    windowing=whisper_windowing,
    flops=whisper_flops,
    defaults={**_NO_DROPOUT, "layerdrop": 0.0},
    length_modes=("full", "trim"),
    normalizes=None,
    features=_features,
    feature_extractor=WhisperFeatureExtractor,
    containers={"voxtral": "audio_config"},
    key_mapping=KEY_MAPPING,
)
QWEN2_AUDIO = EncoderFamily(
    config_class=Qwen2AudioEncoderConfig,
    network=RaggedQwen2AudioEncoder,
    wrapper=PooledWhisper,
    windowing=_windowing,
    flops=_flops,
    frame_samples=POOLED_SAMPLES,
    defaults={**_NO_DROPOUT, "encoder_layerdrop": 0.0},
    normalizes=None,
    features=_features,
    feature_extractor=WhisperFeatureExtractor,
    containers={"qwen2_audio": "audio_config"},
    key_mapping=KEY_MAPPING,
)
AUDIO_FLAMINGO_3 = replace(
    QWEN2_AUDIO,
    config_class=AudioFlamingo3EncoderConfig,
    network=RaggedAudioFlamingo3Encoder,
    defaults=VOXTRAL.defaults,
    containers={"audioflamingo3": "audio_config"},
)
