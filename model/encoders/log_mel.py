"""Whisper's log-mel spectrogram of a batch, computed on the device with the results of `WhisperFeatureExtractor`.

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
"""The length in samples to which shorter clips are padded, so that half an FFT window can be mirrored at their
edges."""


def num_mel_frames(samples: int) -> int:
    """Return the number of mel frames (10 ms) of a clip, rounded up. It is at least two."""
    return -(-max(samples, MIN_SAMPLES) // HOP_SAMPLES)


def log_mel(audio: Ragged, num_mels: int = 80) -> Ragged:
    """Return the log-mel frames of clips, computed separately for each clip.

    The result equals that of `WhisperFeatureExtractor(feature_size=num_mels)` on the clip, padded with zeros to a
    multiple of 10 ms.

    Args:
        audio: The waveforms [ΣT].
        num_mels: The number N of mel bins.

    Returns:
        [ΣM, N] in fp32, with M = `num_mel_frames(T)` for each clip.
    """
    mel, lengths = padded_log_mel(audio, num_mels)
    return Ragged(torch.cat([row[:m] for row, m in zip(mel.transpose(1, 2), lengths, strict=True)]), lengths)


@torch.no_grad()
def padded_log_mel(audio: Ragged, num_mels: int, pad_samples: int | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """Return the padded log-mel spectrograms of clips. No gradient flows to the waveforms.

    Args:
        audio: The waveforms [ΣT].
        num_mels: The number N of mel bins.
        pad_samples: The length to which every clip is first padded with silence (Whisper's 30 s). The spectrogram
            includes the silence. None if clips keep their length.

    Returns:
        [B, N, max M] in fp32, zero after each clip's M frames, and the number M for each clip.
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
    log_spec = (mel_filters(num_mels, FFT_SAMPLES, device) @ power).clamp(min=1e-10).log10()
    mask = length_mask(num_frames, log_spec.shape[2], device)
    # The floor is relative to the loudest bin within the clip, excluding frames past its end.
    inside = log_spec if mask is None else log_spec.masked_fill(~mask[:, None], -torch.inf)
    log_spec = torch.maximum(log_spec, inside.amax(dim=(1, 2), keepdim=True) - 8.0)
    log_spec = (log_spec + 4.0) / 4.0
    return log_spec if mask is None else log_spec.masked_fill(~mask[:, None], 0.0), num_frames


def _mirrored(audio: Ragged, num_frames: tuple[int, ...]) -> Tensor:
    """Return padded clips whose edges are reflected as by `torch.stft(center=True)`, each at its own length."""
    half = FFT_SAMPLES // 2
    tail = half - HOP_SAMPLES  # The frame whose center is the end of the clip is not used.
    ends = [m * HOP_SAMPLES for m in num_frames]
    waves = audio.padded().float()
    waves = F.pad(waves, (half, max(ends) + tail - waves.shape[1]))
    waves[:, :half] = waves[:, half + 1 : 2 * half + 1].flip(1)
    end = to_device(ends, waves.device)[:, None] + half
    offset = torch.arange(tail, device=waves.device)
    return waves.scatter_(1, end + offset, waves.gather(1, end - 2 - offset))


@cache
def mel_filters(num_mels: int, fft_samples: int, device: torch.device) -> Tensor:
    """Return the mel filters [N, fft_samples // 2 + 1] of Slaney's scale, up to the highest frequency.

    The filters are not a buffer, so they remain in fp32 if a module is cast to bf16.
    """
    bank = mel_filter_bank(
        num_frequency_bins=fft_samples // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=SAMPLE_RATE / 2,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(bank).float().T.contiguous().to(device)
