"""Tests of decoding clips, checking their metadata, and augmenting them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from tests.trainer.data_corpus import audio_bytes
from trainer.data.augment import augment
from trainer.data.config import AugmentConfig
from trainer.data.decode import check_audio, decode_audio
from trainer.data.errors import SampleError
from trainer.data.metadata import check_metadata


@pytest.mark.parametrize("kind", ["FLAC", "WAV", "MP3", "OGG", "OPUS"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2)])
def test_every_type_becomes_16_khz_mono(kind: str, rate: int, channels: int) -> None:
    clip = decode_audio(audio_bytes(1.0, kind=kind, rate=rate, channels=channels))
    assert clip.dtype == np.float32
    assert clip.ndim == 1
    assert abs(len(clip) - 16_000) <= (2400 if kind == "MP3" else 1)  # MP3 encodes whole frames, after a delay


def test_channels_are_averaged() -> None:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.stack([np.full(100, 0.5), np.full(100, -0.25)], 1), 16_000, format="WAV", subtype="FLOAT"
    )
    np.testing.assert_allclose(decode_audio(buffer.getvalue()), 0.125)


def wav_of(values: list[float]) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array(values), 16_000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not audio at all", "broken"),
        (audio_bytes(1.0)[:9000], "broken"),
        (audio_bytes(1.0, kind="WAV")[:9000], "broken"),
        (wav_of([]), "empty"),
        (wav_of([0.0, float("nan")]), "nan"),
        (wav_of([0.0, float("inf")]), "nan"),
        (audio_bytes(2.0), "too_long"),
    ],
    # Every process that collects the tests must give them the same names. Names from the data would differ, because
    # libsndfile writes the time into WAV files.
    ids=["nothing", "text", "half-a-flac", "half-a-wav", "no-samples", "nan", "infinity", "two-seconds"],
)
def test_bad_audio_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_audio(data, max_sec=1.5)
    assert caught.value.reason == reason
    if reason != "too_long":
        with pytest.raises(SampleError) as caught:
            check_audio(data)
        assert caught.value.reason == reason


def test_clip_of_exactly_max_sec_is_accepted() -> None:
    assert len(decode_audio(audio_bytes(1.5), max_sec=1.5)) == 24_000


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answer": "  "}, "empty_answer"),
        ({"answer": 7}, "wrong_type"),
        ({"instruction": None}, "wrong_type"),
        ({"task": "asrr"}, "unknown_task"),
    ],
)
def test_bad_metadata_is_named(fields: dict, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        check_metadata({"task": "asr", "instruction": "?", "answer": "yes", **fields}, 1)
    assert caught.value.reason == reason


def test_augmentation_is_off_at_strength_0_and_repeats_with_its_seed() -> None:
    clip = decode_audio(audio_bytes(0.5))
    config = AugmentConfig(speed=0.1, gain_db=6, noise_snr_db=10, num_time_masks=2, num_freq_masks=2)
    before = clip.copy()
    assert augment(clip, config, 0.0, np.random.default_rng(1)) is clip
    one, two = (augment(clip, config, 1.0, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(clip, before)  # the clip may be in a cache
    assert one.dtype == np.float32
    assert 0.9 * len(clip) <= len(one) <= 1.12 * len(clip)
    assert not np.array_equal(one[: len(clip)], clip[: len(one)])


def test_augmentation_ramps_in() -> None:
    config = AugmentConfig(start=0.2, end=0.6)
    assert [config.strength_at(p) for p in (0.0, 0.19, 0.6, 1.0)] == [0, 0, 1, 1]
    assert config.strength_at(0.4) == pytest.approx(0.5)
    assert AugmentConfig(start=0, end=0).strength_at(0) == 1


@pytest.mark.parametrize("samples", [16_001, 8192, 5])
def test_frequency_masks_change_one_band_only(samples: int) -> None:
    config = AugmentConfig(speed=0, gain_db=0, noise_snr_db=None, num_time_masks=0, num_freq_masks=1, freq_mask_hz=2000)
    clip = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    masked = augment(clip, config, 1.0, np.random.default_rng(3))
    assert masked.shape == clip.shape
    if samples > 2048:
        lost = np.abs(np.fft.rfft(clip - masked))
        taken = lost > 0.1 * lost.max()
        hz = np.flatnonzero(taken) * 16_000 / samples
        assert 0 < hz.max() - hz.min() <= 2100
        assert np.square(clip - masked).sum() < 0.3 * np.square(clip).sum()
