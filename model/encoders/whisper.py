"""Whisper's encoder (arXiv 2212.04356), on windows padded to 30 s, as in pre-training, or on the clips' real length.

Shapes: B windows, N mel bins, M mel frames (10 ms), F frames (20 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

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
from model.encoders.log_mel import FFT_SAMPLES, MIN_SAMPLES, num_mel_frames, padded_log_mel
from model.lengths import FRAME_SAMPLES, SAMPLE_RATE, Windowing, num_samples

MASKED_SILENCE_SAMPLES = 1600
"""The number of samples of silence that is appended to a clip in the length mode `masked`. The convolutions and the FFT
windows of the clip's last frame reach 520 samples past its end."""


class MelTransformer(DrawnAsTransformers):
    """The forward pass of `WhisperEncoder` and its copies in transformers, for mel spectrograms of unequal length."""

    conv1: nn.Conv1d
    conv2: nn.Conv1d
    embed_positions: nn.Embedding
    layers: nn.ModuleList
    layer_norm: nn.LayerNorm
    dropout: float
    training: bool

    def forward(  # type: ignore[override]
        self, mel: Tensor, num_mel_frames: Sequence[int], recompute: bool = False, kept: Sequence[int] | None = None
    ) -> Tensor:
        """Encode mel spectrograms.

        Args:
            mel: [B, N, max M], zero after each window's M frames.
            num_mel_frames: The number M of mel frames of each window.
            recompute: True to recompute every layer in the backward pass.
            kept: The number F of frames of each window that are kept after the convolutions. None to keep all F =
                ceil(M / 2) frames.

        Returns:
            [B, max F, D].
        """
        hidden = F.gelu(self.conv1(mel))
        mel_mask = length_mask(num_mel_frames, hidden.shape[2], hidden.device)
        if mel_mask is not None:
            hidden = hidden.masked_fill(~mel_mask[:, None], 0.0)  # conv2 also pads with zeros.
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)
        if kept is None:
            kept = [-(-m // 2) for m in num_mel_frames]
        return self.layer_norm(self.transform(hidden[:, : max(kept)], kept, recompute))

    def transform(self, hidden: Tensor, lengths: Sequence[int], recompute: bool) -> Tensor:
        """Add the positions to frames [B, F, D] and pass them through the layers, without the last norm.

        Args:
            hidden: The output of the convolutions.
            lengths: The number of frames of each window that take part in attention.
            recompute: True to recompute every layer in the backward pass.
        """
        hidden = hidden + self.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
        hidden = F.dropout(hidden, p=self.dropout, training=self.training)
        mask = length_mask(lengths, hidden.shape[1], hidden.device)
        attention_mask = None if mask is None else mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        for layer in self.layers:
            hidden = call_layer(layer, hidden, attention_mask, recompute=recompute)
        return hidden


class RaggedWhisperEncoder(MelTransformer, WhisperEncoder):
    """transformers' `WhisperEncoder`, with the same parameters."""


class Whisper(AudioEncoder):
    """Whisper as an `AudioEncoder`. The parameters under `encoder.` have transformers' names.

    In the length mode `full`, every window is padded to the full length, and the frames of padding and of trailing
    silence are dropped after encoding. In the length mode `masked`, only as much silence is appended as the spectrum
    and the convolutions need to give the same results as in a window of full length. The frames of silence are dropped
    before attention.

    Args:
        encoder: The network.
        resolved: The encoder's settings.
    """

    def __init__(self, encoder: PreTrainedModel, resolved: ResolvedEncoder) -> None:
        config: Any = resolved.hf_config
        super().__init__(config.d_model, resolved.windowing, resolved.frame_samples)
        self.encoder = encoder
        self.num_mels = config.num_mel_bins
        self.length_mode = resolved.length_mode
        self.do_normalize = resolved.do_normalize

    def encode(self, windows: Ragged) -> Tensor:
        """Implement `AudioEncoder.encode`."""
        if self.do_normalize:
            waves = normalized(windows.padded().float(), windows.lengths)
            windows = Ragged(torch.cat([w[:t] for w, t in zip(waves, windows.lengths, strict=True)]), windows.lengths)
        frames = [self.num_own_frames(t) for t in windows.lengths]
        pad_samples = self.windowing.window_samples if self.length_mode == "full" else None
        if self.windowing.silence_samples:
            windows = self._with_silence(windows)
        mel, num_mel_frames = padded_log_mel(windows, self.num_mels, pad_samples)
        kept = frames if self.length_mode == "masked" else None
        hidden = self.encoder(mel.to(self.dtype), num_mel_frames, recompute=self.recompute, kept=kept)
        return join_frames(hidden, frames, frames)

    def _with_silence(self, windows: Ragged) -> Ragged:
        """Return the windows [ΣT] with the trailing silence of `windowing` appended to each."""
        lengths = tuple(map(self.windowing.padded_samples, windows.lengths))
        padded = [F.pad(w, (0, n - len(w))) for w, n in zip(windows.split(), lengths, strict=True)]
        return Ragged(torch.cat(padded), lengths)


def whisper_windowing(config: EncoderConfig, hf_config: Any, window_samples: int) -> Windowing:
    """Return the windowing. In the length mode `full`, every window is padded to the full length.

    Raises:
        UserError: If the window exceeds the checkpoint's positions, or is shorter in a length mode other than `trim`.
    """
    check_capacity(config, hf_config, window_samples, config.length_mode != "trim")
    if config.length_mode == "full":
        return Windowing(window_samples, window_samples)
    silence = MASKED_SILENCE_SAMPLES if config.length_mode == "masked" else num_samples(config.trailing_silence_sec)
    return Windowing(window_samples, MIN_SAMPLES, silence)


def check_capacity(config: EncoderConfig, hf_config: Any, window_samples: int, exactly: bool = False) -> None:
    """Check that the window does not need more positions than the checkpoint has.

    Args:
        config: The encoder.
        hf_config: The transformers config.
        window_samples: The window.
        exactly: Whether the window must need all positions of the checkpoint.

    Raises:
        UserError: If the window is too long or, with `exactly`, too short.
    """
    capacity = hf_config.max_source_positions * FRAME_SAMPLES
    longest = f"{capacity / SAMPLE_RATE:g} s ({hf_config.max_source_positions} positions)"
    if window_samples > capacity:
        raise encoder_error(config, f"window_sec = {config.window_sec}", f"must not exceed {longest}")
    if exactly and window_samples != capacity:
        raise encoder_error(
            config, f"window_sec = {config.window_sec}", f"must equal {longest} in length_mode {config.length_mode}"
        )


def whisper_flops(hf: Any, samples: int) -> float:
    """Return the forward FLOPs of one window: mel filters, convolutions and Transformer layers."""
    mel_frames = num_mel_frames(samples)
    frames = -(-mel_frames // 2)
    mel = 2.0 * (FFT_SAMPLES // 2 + 1) * hf.num_mel_bins * mel_frames
    convs = 6.0 * hf.d_model * (hf.num_mel_bins * mel_frames + hf.d_model * frames)
    return mel + convs + hf.encoder_layers * layer_flops(frames, hf.d_model, hf.encoder_ffn_dim)


WHISPER = EncoderFamily(
    config_class=WhisperConfig,
    network=RaggedWhisperEncoder,
    wrapper=Whisper,
    windowing=whisper_windowing,
    flops=whisper_flops,
    defaults={
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "apply_spec_augment": False,
    },
    length_modes=("full", "trim", "masked"),
    # Published checkpoints contain the whole model. The names of the encoder's tensors begin with `encoder.` or
    # `model.encoder.`.
    key_mapping={r"^(model\.)?encoder\.": ""},
)
