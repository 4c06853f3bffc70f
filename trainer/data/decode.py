"""Decoding of audio to 16 kHz mono float32, and the reasons why a sample may be skipped."""

from __future__ import annotations

import io
import struct
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE
from trainer.scoring.tasks import TASKS, known_tasks

AUDIO_TYPES = ("flac", "wav", "mp3", "ogg", "opus")
"""The audio types that shards may contain, by file extension."""

Reason = Literal[
    "altered",
    "broken",
    "empty",
    "nan",
    "too_long",
    "wrong_type",
    "empty_answer",
    "unknown_task",
    "placeholder_in_text",
]


class SampleError(Exception):
    """Raised when a sample cannot be used. The sample is skipped, counted by `reason` and listed with `detail`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def decode_audio(data: bytes | memoryview, max_sec: float | None = None) -> NDArray[np.float32]:
    """Decode one clip, average its channels, and resample it to 16 kHz (soxr HQ).

    Args:
        data: content of a FLAC, WAV, MP3, OGG or Opus file.
        max_sec: length of the longest clip that is allowed, in seconds; longer clips are rejected before they are
            decoded. None for no limit.

    Returns:
        `[T]` float32 with T > 0; all values are finite.

    Raises:
        SampleError: If the clip cannot be used, with reason `broken`, `empty`, `nan` or `too_long`.
    """
    mono, rate = _decode_mono(data, max_sec)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if len(mono) == 0:
        raise SampleError("empty", "no audio")
    return np.ascontiguousarray(mono, dtype=np.float32)


def check_audio(data: bytes | memoryview) -> float:
    """Check that a clip can be decoded, and return its length in seconds.

    Raises:
        SampleError: If the clip cannot be used; see `decode_audio`.
    """
    mono, rate = _decode_mono(data, None)
    return len(mono) / rate


def _decode_mono(data: bytes | memoryview, max_sec: float | None) -> tuple[NDArray[np.float32], int]:
    frames, rate = _read(data, max_sec)
    mono = frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0]
    if not np.isfinite(mono).all():
        raise SampleError("nan", f"{int((~np.isfinite(mono)).sum())} of {len(mono)} values are not finite")
    return mono, rate


def _read(data: bytes | memoryview, max_sec: float | None) -> tuple[NDArray[np.float32], int]:
    if not data:
        raise SampleError("empty", "0 bytes")
    # For a truncated WAV file, libsndfile counts only the frames that exist. The RIFF header contains the full size.
    if data[:4] == b"RIFF" and len(data) >= 8 and struct.unpack("<I", data[4:8])[0] not in (0, 0xFFFFFFFF):
        declared = struct.unpack("<I", data[4:8])[0] + 8
        if len(data) < declared - 1:
            raise SampleError("broken", f"truncated: {len(data)} of {declared} bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            declared_frames, rate = file.frames, file.samplerate
            if max_sec is not None and declared_frames > max_sec * rate:
                raise SampleError("too_long", f"{declared_frames / rate:.2f} s, the limit is {max_sec} s")
            frames = file.read(dtype="float32", always_2d=True)
            exact = file.format in ("FLAC", "WAV")
    except soundfile.LibsndfileError as error:
        raise SampleError("broken", str(error.error_string).strip()) from None
    if len(frames) == 0:
        raise SampleError("empty", "no audio")
    if exact and len(frames) != declared_frames:
        raise SampleError("broken", f"{len(frames)} of {declared_frames} audio frames could be decoded")
    return frames, rate


def check_metadata(metadata: dict[str, Any]) -> None:
    """Check the task, instruction and answer of a sample.

    Raises:
        SampleError: If one of them is not a string, the task is unknown, or the answer is empty.
    """
    for name in ("task", "instruction", "answer"):
        if not isinstance(metadata.get(name), str):
            raise SampleError("wrong_type", f"{name} = {metadata.get(name)!r}, but must be a string")
    if metadata["task"] not in TASKS:
        raise SampleError("unknown_task", f"task = {metadata['task']!r}; known tasks are {known_tasks()}")
    if not metadata["answer"].strip():
        raise SampleError("empty_answer", "answer is empty")
