"""Whisper's encoder (arXiv 2212.04356), at 30 s as pre-trained or at the clip's real length.

Shapes: B windows, N mel bins, M mel frames (10 ms), F frames (20 ms), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model.batch import Ragged
from model.encoders.base import (
    AudioEncoder,
    DrawnAsTransformers,
    call_layer,
    join_frames,
    length_mask,
    normalized,
)
from model.encoders.log_mel import MIN_SAMPLES, padded_log_mel
from model.lengths import Windowing, num_frames, num_samples

LengthMode: TypeAlias = Literal["full", "trim"]


def whisper_windowing(window_samples: int, length_mode: LengthMode, trailing_silence_sec: float) -> Windowing:
    """Return what a call of the encoder computes: with `full`, every window at the full length."""
    if length_mode == "full":
        return Windowing(window_samples, window_samples)
    return Windowing(window_samples, MIN_SAMPLES, num_samples(trailing_silence_sec))


class RaggedWhisperEncoder(DrawnAsTransformers, WhisperEncoder):
    """transformers' `WhisperEncoder`, same parameters, for mel spectrograms of unequal length."""

    def forward(  # type: ignore[override]
        self, mel: Tensor, num_mel_frames: Sequence[int], recompute: bool = False
    ) -> Tensor:
        """Encode `mel[B, N, max M]`, zero past each clip's M, to `[B, max F, D]`, F = ceil(M / 2)."""
        hidden = F.gelu(self.conv1(mel))
        mel_mask = length_mask(num_mel_frames, hidden.shape[2], hidden.device)
        if mel_mask is not None:
            hidden = hidden.masked_fill(~mel_mask[:, None], 0.0)  # what conv2's own padding would hold
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + self.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
        hidden = F.dropout(hidden, p=self.dropout, training=self.training)
        mask = length_mask([-(-m // 2) for m in num_mel_frames], hidden.shape[1], hidden.device)
        attention_mask = None if mask is None else mask[:, None, None].expand(-1, -1, hidden.shape[1], -1)
        for layer in self.layers:
            hidden = call_layer(layer, hidden, attention_mask, recompute=recompute)
        return self.layer_norm(hidden)


class Whisper(AudioEncoder):
    """Whisper as an `AudioEncoder`; `encoder.*` holds transformers' parameter names."""

    def __init__(
        self,
        encoder: RaggedWhisperEncoder,
        window_samples: int,
        length_mode: LengthMode,
        do_normalize: bool,
        trailing_silence_sec: float = 0.0,
    ) -> None:
        """`full`: every window is padded to `window_samples`, frames of the padding are dropped after encoding, as are
        those of the trailing silence; `do_normalize`: see `normalized`."""
        config: WhisperConfig = encoder.config
        super().__init__(config.d_model, whisper_windowing(window_samples, length_mode, trailing_silence_sec))
        self.encoder = encoder
        self.num_mels = config.num_mel_bins
        self.length_mode = length_mode
        self.do_normalize = do_normalize

    def encode(self, windows: Ragged) -> Tensor:
        """See `AudioEncoder.encode`."""
        if self.do_normalize:
            waves = normalized(windows.padded().float(), windows.lengths)
            windows = Ragged(torch.cat([w[:t] for w, t in zip(waves, windows.lengths, strict=True)]), windows.lengths)
        frames = [num_frames(t) for t in windows.lengths]
        pad_samples = self.windowing.window_samples if self.length_mode == "full" else None
        if self.windowing.silence_samples:
            windows = self._with_silence(windows)
        mel, num_mel_frames = padded_log_mel(windows, self.num_mels, pad_samples)
        hidden = self.encoder(mel.to(self.dtype), num_mel_frames, recompute=self.recompute)
        return join_frames(hidden, frames, frames)

    def _with_silence(self, windows: Ragged) -> Ragged:
        """Return windows [ΣT] with the trailing silence of `windowing`."""
        lengths = tuple(map(self.windowing.padded_samples, windows.lengths))
        padded = [F.pad(w, (0, n - len(w))) for w, n in zip(windows.split(), lengths, strict=True)]
        return Ragged(torch.cat(padded), lengths)
