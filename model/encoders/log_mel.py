"""Whisper's log-mel spectrogram, batched and on the device; equals transformers' `WhisperFeatureExtractor`.

Shapes: B clips, T audio samples (16 kHz), M mel frames (10 ms), N mel bins.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from model.batch import Ragged
from model.encoders.base import length_mask
from model.lengths import SAMPLE_RATE
from model.transfer import to_device

HOP_SAMPLES = 160
FFT_SAMPLES = 400
MIN_SAMPLES = 2 * HOP_SAMPLES
"""Shorter clips are padded to this, so that their edges (half an FFT window) can be mirrored."""


def num_mel_frames(samples: int) -> int:
    """Mel frames (10 ms) of a clip: ceil, at least two."""
    return -(-max(samples, MIN_SAMPLES) // HOP_SAMPLES)


def log_mel(audio: Ragged, num_mels: int = 80) -> Ragged:
    """Log-mel frames `[ΣM, N]` fp32 of clips `[ΣT]`, M = `num_mel_frames(T)`, each clip by itself.

    Equals `WhisperFeatureExtractor(feature_size=num_mels)` on the clip padded with zeros to whole 10 ms.
    """
    mel, lengths = padded_log_mel(audio, num_mels)
    return Ragged(torch.cat([row[:m] for row, m in zip(mel.transpose(1, 2), lengths, strict=True)]), lengths)


@torch.no_grad()
def padded_log_mel(audio: Ragged, num_mels: int, pad_samples: int | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """Log-mel `[B, N, max M]` fp32 of clips `[ΣT]`, zero past each clip's M frames; and every M.

    `pad_samples` pads every clip with silence to this length first (Whisper's 30 s), and the spectrogram covers it.
    No gradient flows to the waveform.
    """
    if pad_samples is None:
        num_frames = tuple(num_mel_frames(t) for t in audio.lengths)
    else:
        assert pad_samples % HOP_SAMPLES == 0 and max(audio.lengths) <= pad_samples, (audio.lengths, pad_samples)
        num_frames = (pad_samples // HOP_SAMPLES,) * len(audio)
    device = audio.values.device
    spectrum = torch.stft(
        _mirrored(audio, num_frames),
        FFT_SAMPLES,
        HOP_SAMPLES,
        window=torch.hann_window(FFT_SAMPLES, device=device),
        center=False,
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    log_spec = (_mel_filters(num_mels, device) @ power).clamp(min=1e-10).log10()
    mask = length_mask(num_frames, log_spec.shape[2], device)
    # The floor is relative to the clip's own loudest bin; a frame past its end may still see its last samples.
    inside = log_spec if mask is None else log_spec.masked_fill(~mask[:, None], -torch.inf)
    log_spec = torch.maximum(log_spec, inside.amax(dim=(1, 2), keepdim=True) - 8.0)
    log_spec = (log_spec + 4.0) / 4.0
    return log_spec if mask is None else log_spec.masked_fill(~mask[:, None], 0.0), num_frames


def _mirrored(audio: Ragged, num_frames: tuple[int, ...]) -> Tensor:
    """Padded clips with both edges reflected as `torch.stft(center=True)` does, but each at its own length."""
    half = FFT_SAMPLES // 2
    tail = half - HOP_SAMPLES  # the frame centred on the end is not used, so less of the right edge is needed
    ends = [m * HOP_SAMPLES for m in num_frames]
    waves = audio.padded().float()
    waves = F.pad(waves, (half, max(ends) + tail - waves.shape[1]))
    waves[:, :half] = waves[:, half + 1 : 2 * half + 1].flip(1)
    end = to_device(ends, waves.device)[:, None] + half
    offset = torch.arange(tail, device=waves.device)
    return waves.scatter_(1, end + offset, waves.gather(1, end - 2 - offset))


@cache
def _mel_filters(num_mels: int, device: torch.device) -> Tensor:
    """`[N, FFT bins]`; a constant, not a buffer, so that it stays fp32 when a module is cast to bf16."""
    bank = mel_filter_bank(
        num_frequency_bins=FFT_SAMPLES // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank).float().T.contiguous().to(device)
