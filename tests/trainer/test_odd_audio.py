"""Tests that unusual but complete audio files are decoded, and that incomplete ones only raise a SampleError."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.decode import MAX_VALUES_PER_BYTE, check_audio, decode_audio
from trainer.data.errors import SampleError

FORMATS = {
    **{"FLAC": ("FLAC", "PCM_16"), "WAV": ("WAV", "PCM_16"), "MP3": ("MP3", "MPEG_LAYER_III")},
    **{"VORBIS": ("OGG", "VORBIS"), "OPUS": ("OGG", "OPUS")},
}


def encoded(kind: str, seconds: float, rate: int = 16_000, channels: int = 1, seed: int = 0) -> bytes:
    format_, subtype = FORMATS[kind]
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format=format_, subtype=subtype)
    return buffer.getvalue()


def wav(values: np.ndarray, subtype: str, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def outcome(data: bytes, max_sec: float | None = None) -> int | str:
    """Return the number of decoded samples, or the reason that the error gives."""
    try:
        return len(decode_audio(data, max_sec))
    except SampleError as error:
        return error.reason


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2), (8000, 1)])
def test_decoding_in_blocks_equals_decoding_at_once(
    kind: str, rate: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(kind, 2.0, rate, channels)
    monkeypatch.setattr("trainer.data.decode._BLOCK_VALUES", 5000)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        frames = file.read(dtype="float32", always_2d=True)
    mono = frames.mean(axis=1) if channels > 1 else frames[:, 0]
    expected = mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ")
    np.testing.assert_array_equal(decode_audio(data), expected)


@pytest.mark.parametrize("kind", FORMATS)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
@settings(max_examples=15, deadline=None)
def test_a_part_of_a_file_is_refused_unless_it_is_nearly_whole(kind: str, share: float) -> None:
    data = encoded(kind, 1.0)
    found = outcome(data[: int(len(data) * share)])
    assert found in ("broken", "empty") or (isinstance(found, int) and found >= 0.95 * 16_000 - 1152)


@pytest.mark.parametrize("kind", ["FLAC", "MP3", "VORBIS", "OPUS"])
@given(seconds=st.lists(st.sampled_from([0.3, 0.5, 1.0]), min_size=2, max_size=4))
@settings(max_examples=5, deadline=None)
def test_all_files_that_were_concatenated_are_decoded(kind: str, seconds: list[float]) -> None:
    parts = [encoded(kind, s, seed=i) for i, s in enumerate(seconds)]
    expected = np.concatenate([decode_audio(part) for part in parts])
    np.testing.assert_array_equal(decode_audio(b"".join(parts)), expected)
    assert check_audio(b"".join(parts)) == pytest.approx(len(expected) / 16_000)
    assert outcome(b"".join(parts), max_sec=0.9 * len(expected) / 16_000) == "too_long"


@pytest.mark.parametrize("kind", ["VORBIS", "OPUS"])
def test_ogg_without_its_first_page_is_refused(kind: str) -> None:
    data = bytearray(encoded(kind, 0.3))
    data[5] &= ~2
    assert outcome(bytes(data)) == "broken"
    assert outcome(bytes(data[data.find(b"OggS", 4) :])) == "broken"


def test_concatenated_files_may_have_different_rates() -> None:
    first, second = encoded("FLAC", 0.5, 8000), encoded("FLAC", 0.5, 16_000)
    expected = np.concatenate([decode_audio(first), decode_audio(second)])
    np.testing.assert_array_equal(decode_audio(first + second), expected)


@pytest.mark.parametrize("count", [0, 2**36 - 1, 10**9])
def test_flac_with_an_unknown_or_absurd_number_of_frames_is_decoded_completely(count: int) -> None:
    data = bytearray(encoded("FLAC", 1.0))
    data[21] = data[21] & 0xF0 | count >> 32
    data[22:26] = (count & 0xFFFFFFFF).to_bytes(4, "big")
    assert outcome(bytes(data)) == 16_000
    assert outcome(bytes(data), max_sec=0.5) == "too_long"


@pytest.mark.parametrize("subtype", [s for s in soundfile.available_subtypes("WAV") if s != "MPEG_LAYER_III"])
def test_every_codec_of_wav_is_decoded(subtype: str) -> None:
    data = wav(np.random.default_rng(0).uniform(-0.5, 0.5, 8000), subtype)
    assert isinstance(found := outcome(data), int) and 16_000 <= found <= 16_700
    assert outcome(data[: len(data) // 2]) == "broken"


def test_mp3_in_wav_is_decoded() -> None:
    stream = encoded("MP3", 1.0)
    head = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16_000, 4000, 1, 0, 12, 1, 2, 576, 1, 1393)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(stream)) + stream
    data = b"RIFF" + struct.pack("<I", len(body)) + body
    assert outcome(data) == 16_000
    assert outcome(data[: len(data) // 2]) == "broken"


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000024, 0xFFFFFFFF])
def test_wav_from_a_pipe_is_decoded_completely(size: int) -> None:
    data = bytearray(encoded("WAV", 1.0))
    data[4:8] = data[40:44] = struct.pack("<I", size)
    assert outcome(bytes(data)) == 16_000


@pytest.mark.parametrize("shift", [-8, 8, 1])
def test_the_size_of_riff_may_be_wrong(shift: int) -> None:
    data = bytearray(encoded("WAV", 1.0))
    data[4:8] = struct.pack("<I", len(data) - 8 + shift)
    assert outcome(bytes(data)) == 16_000


def test_an_empty_wav_is_empty() -> None:
    assert outcome(wav(np.zeros(0), "PCM_16")) == "empty"


@pytest.mark.parametrize(("rate", "expected"), [(1, "broken"), (999, "broken"), (768_001, "broken"), (1000, 16_000)])
def test_rates_that_no_recording_has_are_refused(rate: int, expected: int | str) -> None:
    assert outcome(wav(np.zeros(1000), "PCM_16", rate)) == expected


@given(value=st.floats(width=32), place=st.integers(0, 199), channels=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_one_absurd_value_is_refused(value: float, place: int, channels: int) -> None:
    frames = np.zeros((200, channels), np.float32)
    frames[place, -1] = value
    found = outcome(wav(frames, "FLOAT", 8000))
    expected = "nan" if not np.isfinite(value) else "out_of_range" if abs(value) > 100 else 400
    assert found == expected


def silent_flac(num_frames: int) -> bytes:
    """Return the smallest possible FLAC of silence, in which a frame of 65,536 samples takes about 14 bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(num_frames, np.int16), 16_000, format="FLAC")
    return buffer.getvalue()


def test_digital_silence_is_decoded_completely() -> None:
    assert outcome(silent_flac(16_000 * 120)) == 16_000 * 120
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(48_000 * 20), 48_000, format="OGG", subtype="OPUS")
    assert outcome(buffer.getvalue()) == 16_000 * 20


def test_a_small_file_cannot_become_much_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    data = silent_flac(16_000 * 120)
    monkeypatch.setattr("trainer.data.decode._FREE_VALUES", 0)
    monkeypatch.setattr("trainer.data.decode.MAX_VALUES_PER_BYTE", 16_000 * 60 // len(data))
    assert outcome(data) == "broken"
    assert MAX_VALUES_PER_BYTE * 3000 < 25_000_000


_CHILD = """
import resource, sys
from pathlib import Path
from trainer.data.decode import decode_audio
from trainer.data.errors import SampleError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20),) * 2)
try:
    print(len(decode_audio(Path(sys.argv[1]).read_bytes(), 60.0)))
except SampleError as error:
    print(error.reason)
"""


@pytest.mark.parametrize(("count", "expected"), [(0, "too_long"), (2**36 - 1, "too_long"), (16_000 * 1200, "too_long")])
def test_memory_is_bounded_by_the_longest_clip(tmp_path: Path, count: int, expected: str) -> None:
    data = bytearray(silent_flac(16_000 * 1200))  # 77 MB as float32
    data[21] = data[21] & 0xF0 | count >> 32
    data[22:26] = (count & 0xFFFFFFFF).to_bytes(4, "big")
    (tmp_path / "a.flac").write_bytes(data)
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "a.flac")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert found.stdout.strip() == expected, found.stderr


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_only_sample_errors_are_raised(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(FORMATS)))
    content = bytearray(encoded(kind, 0.2))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, min(len(content), 300) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    outcome(bytes(content[:cut] if data.draw(st.booleans()) else content))
