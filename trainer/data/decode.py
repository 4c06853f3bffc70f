"""Decode audio to 16 kHz mono float32."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from model.lengths import SAMPLE_RATE
from trainer.data.containers import MIN_SHARE, declares_length, whole_files
from trainer.data.errors import SampleError

AUDIO_TYPES = ("flac", "wav", "mp3", "ogg", "opus")
"""The audio types that shards may contain, by file extension."""

MIN_RATE, MAX_RATE = 1_000, 768_000
"""The bounds of the accepted sampling rates, in Hz."""
MAX_SEC = 6 * 3600.0
"""The maximum length of a clip if the caller sets no limit, in seconds."""
MAX_VALUES_PER_BYTE = 4096
"""The maximum number of decoded values per byte of a file. The limit applies to the number of frames times channels,
and also to the number of samples after resampling. FLAC and Opus reach about 3000 for digital silence. A file that
exceeds the limit was probably made to exhaust memory."""
_FREE_VALUES = 1 << 16
"""The number of decoded values that every file may contain in addition to `MAX_VALUES_PER_BYTE` values per byte."""
MAX_LEVEL = 100.0
"""The maximum absolute value of a sample. Full scale is 1; floating-point files may exceed it slightly."""
_BLOCK_VALUES = 1 << 20
"""The number of values that are decoded at once."""


def decode_audio(data: bytes | memoryview, max_sec: float | None = None) -> NDArray[np.float32]:
    """Decode one clip, average its channels, and resample it to 16 kHz (soxr HQ).

    The clip is decoded and resampled in blocks, so that little memory is needed in addition to the result. Concatenated
    files are decoded as one clip.

    Args:
        data: The content of a FLAC, WAV, MP3, OGG or Opus file.
        max_sec: The maximum length of the clip, in seconds; None for `MAX_SEC`. A longer clip is rejected, if possible
            before it is decoded.

    Returns:
        `[T]` float32 with T > 0; all values are finite.

    Raises:
        SampleError: If the clip cannot be used, with reason `broken`, `empty`, `nan`, `out_of_range` or `too_long`.
    """
    blocks: list[NDArray[np.float32]] = []
    resampler: soxr.ResampleStream | None = None
    rate = SAMPLE_RATE
    for block in _blocks(data, max_sec):
        if block.rate != rate:
            blocks += _rest(resampler)
            rate = block.rate
            resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
        blocks.append(block.mono if resampler is None else resampler.resample_chunk(block.mono))
    blocks += _rest(resampler)
    mono = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if len(mono) == 0:
        raise SampleError("empty", "no audio")
    return np.ascontiguousarray(mono, dtype=np.float32)


def check_audio(data: bytes | memoryview) -> float:
    """Check that a clip can be decoded, and return its length in seconds.

    Raises:
        SampleError: If the clip cannot be used; see `decode_audio`.
    """
    return sum(len(block.mono) / block.rate for block in _blocks(data, None))


@dataclass(frozen=True)
class _Block:
    """A block of consecutive decoded frames."""

    mono: NDArray[np.float32]
    """`[N]`: the mean of the channels."""
    rate: int
    """The sampling rate in Hz."""


class _Sequential(soundfile.SoundFile):
    """A file that is read from beginning to end.

    soundfile seeks after each read if a file is seekable. Seeking changes the samples of some MP3 files, and fails if
    the number of frames is unknown.
    """

    def seekable(self) -> bool:
        return False


def _rest(resampler: soxr.ResampleStream | None) -> list[NDArray[np.float32]]:
    return [] if resampler is None else [resampler.resample_chunk(np.zeros(0, np.float32), last=True)]


def _blocks(data: bytes | memoryview, max_sec: float | None) -> Iterator[_Block]:
    """Yield the audio of one clip in blocks, which contain at least one frame in total.

    Raises:
        SampleError: If the clip cannot be used; see `decode_audio`.
    """
    if not data:
        raise SampleError("empty", "0 bytes")
    limit, seconds = MAX_SEC if max_sec is None else max_sec, 0.0
    for file in whole_files(data):
        try:
            for block in _blocks_of_file(file, seconds, limit):
                seconds += len(block.mono) / block.rate
                yield block
        except (soundfile.LibsndfileError, ValueError, TypeError, OverflowError) as error:
            reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
            raise SampleError("broken", str(reason).strip() or "cannot be decoded") from None
    if seconds == 0:
        raise SampleError("empty", "no audio")


def _blocks_of_file(data: bytes | memoryview, start_sec: float, max_sec: float) -> Iterator[_Block]:
    """Yield the audio of one file, which begins `start_sec` after the beginning of its clip."""
    most_values = MAX_VALUES_PER_BYTE * len(data) + _FREE_VALUES
    with _Sequential(io.BytesIO(data)) as file:
        rate, channels = file.samplerate, file.channels
        if not MIN_RATE <= rate <= MAX_RATE:
            raise SampleError("broken", f"the sampling rate is {rate} Hz, but must be {MIN_RATE} to {MAX_RATE} Hz")
        # The header of a FLAC file written to a pipe does not state the length, and a damaged one may state any length.
        declared = file.frames if file.frames * channels <= most_values and declares_length(data) else None
        if declared is not None and declared > (max_sec - start_sec) * rate:
            seconds = start_sec + declared / rate
            raise SampleError("too_long", f"the audio is {seconds:.2f} s long, but the limit is {max_sec:g} s")
        at_once = _BLOCK_VALUES // channels
        at_once = at_once if declared is None else min(at_once, declared + 1)
        num = 0
        while len(frames := file.read(at_once, dtype="float32", always_2d=True)):
            num += len(frames)
            if num > (max_sec - start_sec) * rate:
                raise SampleError("too_long", f"the audio is longer than the limit of {max_sec:g} s")
            if max(num * channels, num * SAMPLE_RATE / rate) > most_values:
                raise SampleError("broken", f"{len(data)} bytes decode to more than {most_values} values")
            yield _Block(_checked_mono(frames), rate)
    if declared is not None and num < MIN_SHARE * declared:
        raise SampleError("broken", f"only {num} of {declared} audio frames could be decoded")


def _checked_mono(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of the channels: `[N, channels]` → `[N]`.

    Raises:
        SampleError: If a value is not finite (`nan`) or larger than `MAX_LEVEL` (`out_of_range`).
    """
    lowest, highest = float(frames.min()), float(frames.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise SampleError("nan", f"{int((~np.isfinite(frames)).sum())} of {frames.size} values are not finite")
    if max(-lowest, highest) > MAX_LEVEL:
        level = max(-lowest, highest)
        raise SampleError("out_of_range", f"the audio has a value of {level:g}, but full scale is 1; scale the file")
    mono: NDArray[np.float32] = frames.mean(axis=1) if frames.shape[1] > 1 else frames[:, 0]
    return mono
