"""Kaldi's log-mel filter bank of a batch, computed on the device. The results equal those of transformers.

Shapes: B clips, T audio samples (16 kHz), M mel frames (10 ms), N mel bins.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank, window_function

from model.batch import Ragged
from model.encoders.base import length_mask
from model.lengths import SAMPLE_RATE

HOP_SAMPLES = 160
FRAME_LENGTH = 400
FFT_SAMPLES = 512
PREEMPHASIS = 0.97
FLOOR = 1.192092955078125e-07
"""The smallest energy of a mel bin, which is the machine epsilon of fp32."""


def num_fbank_frames(samples: int) -> int:
    """Return the number of mel frames that are completely within a clip, at least one."""
    return 1 + (max(samples, FRAME_LENGTH) - FRAME_LENGTH) // HOP_SAMPLES


@torch.no_grad()
def padded_fbank(
    audio: Ragged, num_mels: int, window: str, scale: float = 1.0, least_frames: int = 1
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the padded log-mel filter banks of clips. No gradient flows to the waveforms.

    Spectra are computed in fp64, as in transformers, because fp32 is not precise enough for quiet bins next to loud
    ones.

    Args:
        audio: The waveforms [ΣT].
        num_mels: The number N of mel bins.
        window: The name of the window for transformers' `window_function`.
        scale: The factor by which samples are multiplied; 2¹⁵ for models that were trained on 16-bit integers.
        least_frames: The number of frames to which shorter clips are padded with zeros.

    Returns:
        [B, max M, N] in fp32, zero after each clip's M frames, and the number M for each clip.
    """
    lengths = tuple(max(num_fbank_frames(t), least_frames) for t in audio.lengths)
    waves = audio.padded().double() * scale
    device, size = waves.device, FRAME_LENGTH + (max(lengths) - 1) * HOP_SAMPLES
    waves = torch.nn.functional.pad(waves, (0, max(0, size - waves.shape[1])))[:, :size]
    frames = waves.unfold(1, FRAME_LENGTH, HOP_SAMPLES)
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)
    frames = (frames - PREEMPHASIS * before) * _window(window, device)
    spectrum = torch.fft.rfft(frames, n=FFT_SAMPLES)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = (power @ _mel_filters(num_mels, device)).clamp(min=FLOOR).log().float()
    mask = length_mask(lengths, mel.shape[1], device)
    return mel if mask is None else mel.masked_fill(~mask[:, :, None], 0.0), lengths


@cache
def _window(name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(window_function(FRAME_LENGTH, name, periodic=False)).to(device)


@cache
def _mel_filters(num_mels: int, device: torch.device) -> Tensor:
    """Return the mel filters [FFT bins, N]. They are not registered as a buffer, so casting the module to another
    dtype leaves them unchanged.
    """
    bank = mel_filter_bank(
        num_frequency_bins=FFT_SAMPLES // 2 + 1,
        num_mel_filters=num_mels,
        min_frequency=20.0,
        max_frequency=SAMPLE_RATE // 2,
        sampling_rate=SAMPLE_RATE,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(bank).to(device)
