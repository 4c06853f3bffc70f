"""Waveform augmentation of training clips: speed, gain, noise, and masks in time and frequency."""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE
from trainer.data.config import AugmentConfig

_FFT_STEP = 2048


def augment(
    clip: NDArray[np.float32], config: AugmentConfig, strength: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return an augmented copy of a clip, or `clip` itself if `strength` is 0.

    Args:
        clip: `[T]` float32 at 16 kHz; it is not modified.
        config: The largest change of each kind, at full strength.
        strength: The factor in [0, 1] that scales these changes.
        rng: The source of randomness. The same state gives the same result.

    Returns:
        `[T']` float32. T' differs from T only if `config.speed` is positive.
    """
    if strength <= 0:
        return clip
    if config.speed:
        # The factor is rounded to 1 %, because soxr needs large filters for ratios of large integers.
        percent = round(100 * config.speed * strength * rng.uniform(-1, 1))
        if percent:
            clip = soxr.resample(clip, 100 + percent, 100, quality="LQ")
    if config.num_freq_masks:
        clip = _mask_frequencies(clip, config, strength, rng)
    if config.num_time_masks:
        clip = clip.copy()
        longest = strength * min(config.time_mask_sec, len(clip) / SAMPLE_RATE / 10)
        for _ in range(config.num_time_masks):
            width = int(rng.uniform(0, longest) * SAMPLE_RATE)
            start = int(rng.uniform(0, len(clip) - width))
            clip[start : start + width] = 0
    if config.noise_snr_db is not None:
        # At low strength, the ratio is raised by up to 30 dB, so that the noise is hardly audible.
        snr_db = config.noise_snr_db + rng.uniform(0, 20) + 30 * (1 - strength)
        level = float(np.sqrt(np.mean(np.square(clip)))) * 10 ** (-snr_db / 20)
        clip = clip + level * rng.standard_normal(len(clip), dtype=np.float32)
    if config.gain_db:
        clip = clip * 10 ** (strength * rng.uniform(-config.gain_db, config.gain_db) / 20)
    return clip.astype(np.float32, copy=False)


def _mask_frequencies(
    clip: NDArray[np.float32], config: AugmentConfig, strength: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    # The clip is padded with zeros, because an FFT whose length is a large prime takes ten times as long.
    size = -(-len(clip) // _FFT_STEP) * _FFT_STEP
    spectrum = np.fft.rfft(clip, size)
    bins_per_hz = size / SAMPLE_RATE
    for _ in range(config.num_freq_masks):
        width = rng.uniform(0, config.freq_mask_hz * strength)
        low = rng.uniform(0, SAMPLE_RATE / 2 - width)
        spectrum[int(low * bins_per_hz) : int((low + width) * bins_per_hz)] = 0
    return np.fft.irfft(spectrum, size)[: len(clip)].astype(np.float32)
