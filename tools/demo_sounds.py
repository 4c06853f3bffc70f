"""The synthetic sounds of the demo corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE

Wave = NDArray[np.float32]

SOUNDS = {
    "beep": "a beep",
    "noise": "a hiss",
    "chirp": "a rising whistle",
    "clicks": "a ticking",
    "siren": "a siren",
    "hum": "a low hum",
}
"""The noun phrase for each sound in questions and captions, by the sound's name."""


def make_sound(name: str, setting: int, rng: np.random.Generator) -> Wave:
    """Return a sound of 0.6 to 1.0 seconds.

    Args:
        name: A key of `SOUNDS`.
        setting: The seed for the sound's pitch and tempo. Sounds of one setting resemble each other, like clips of one
            speaker.
        rng: The generator for the variation between sounds of the same setting.

    Returns:
        A waveform `[T]` at 16 kHz with peak 1.
    """
    source = np.random.default_rng([setting, list(SOUNDS).index(name)])
    num_samples = int(SAMPLE_RATE * rng.uniform(0.6, 1.0))
    time_sec = np.arange(num_samples) / SAMPLE_RATE
    wave = _MAKERS[name](time_sec, source, rng)
    edge = np.minimum(np.arange(num_samples), np.arange(num_samples)[::-1]) / (0.01 * SAMPLE_RATE)
    wave = wave * np.minimum(edge, 1.0)
    return (wave / np.abs(wave).max()).astype(np.float32)


def _beep(time_sec: NDArray, source: np.random.Generator, rng: np.random.Generator) -> NDArray:
    return np.sin(2 * np.pi * source.uniform(700, 1400) * rng.uniform(0.97, 1.03) * time_sec)


def _noise(time_sec: NDArray, source: np.random.Generator, rng: np.random.Generator) -> NDArray:
    white = rng.normal(size=len(time_sec))
    return white - source.uniform(0.0, 0.6) * np.roll(white, 1)


def _chirp(time_sec: NDArray, source: np.random.Generator, rng: np.random.Generator) -> NDArray:
    start_hz, end_hz = source.uniform(300, 600), source.uniform(2000, 3500)
    progress = time_sec / time_sec[-1]
    return np.sin(2 * np.pi * time_sec * (start_hz + 0.5 * (end_hz - start_hz) * progress))


def _clicks(time_sec: NDArray, source: np.random.Generator, rng: np.random.Generator) -> NDArray:
    phase_sec = np.mod(time_sec + rng.uniform(0, 0.1), 1 / source.uniform(6, 10))
    return np.exp(-phase_sec / 0.004) * rng.normal(size=len(time_sec))


def _siren(time_sec: NDArray, source: np.random.Generator, rng: np.random.Generator) -> NDArray:
    centre_hz, rate_hz, swing_hz = source.uniform(700, 1000), source.uniform(2.5, 4), source.uniform(250, 350)
    sweep = -np.cos(2 * np.pi * rate_hz * time_sec + rng.uniform(0, 2 * np.pi)) / rate_hz
    return np.sin(2 * np.pi * centre_hz * time_sec + swing_hz * sweep)


def _hum(time_sec: NDArray, source: np.random.Generator, rng: np.random.Generator) -> NDArray:
    base_hz = source.uniform(80, 130) * rng.uniform(0.97, 1.03)
    return sum((np.sin(2 * np.pi * base_hz * k * time_sec) / k for k in range(1, 6)), np.zeros(len(time_sec)))


_MAKERS: dict[str, Callable[[NDArray, np.random.Generator, np.random.Generator], NDArray]] = {
    "beep": _beep,
    "noise": _noise,
    "chirp": _chirp,
    "clicks": _clicks,
    "siren": _siren,
    "hum": _hum,
}
