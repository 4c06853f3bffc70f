"""Prepare the audio of imported samples.

Whole files are only checked if shards may contain their type. Other files, and parts of files, are written as 16-bit
FLAC.

Floating-point audio with values above full scale, which FLAC cannot represent, is written as WAV. Lossy audio is
decoded to 16 bits, which clips such values to full scale.
"""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from model.errors import UserError
from trainer.data.containers import MIN_SHARE, whole_files
from trainer.data.decode import AUDIO_TYPES, MAX_LEVEL, MAX_RATE, MAX_SEC, MAX_VALUES_PER_BYTE, MIN_RATE, check_audio
from trainer.data.errors import SampleError
from trainer.importers.av_audio import av_audio, av_format, opus_of
from trainer.importers.row import Clip, RowError

MAX_FILE_BYTES = 2 << 30
"""The size in bytes of the largest file that is read into memory as a whole."""
_SYSTEM_ERROR = 2
"""libsndfile's error code for a system call that failed."""
_HEAD_BYTES = 256
_BLOCK_VALUES = 1 << 20
_FREE_VALUES = 1 << 16
_MAX_RECORDING_SEC = 7 * 24 * 3600.0
"""The longest recording, in seconds, that is decoded to a temporary file from which parts are cut."""
_FLAC_CHANNELS = 8
_EXACT_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF", "NIST")
"""The libsndfile formats in which seeking to any frame is exact. Other formats are decoded from the beginning."""
_EXACT_SUBTYPES = ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_SHORT_SUBTYPES = ("PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW")
"""The encodings whose values fit into 16-bit integers, so that 16-bit FLAC is lossless."""

Values = NDArray[Any]
"""`[frames, channels]`, int16 or float32."""


@dataclass(frozen=True)
class Made:
    """The audio of a clip in a form that shards may contain."""

    kind: str
    """The type of the file, one of `AUDIO_TYPES`."""
    seconds: float
    data: bytes | None
    """The content; None if the file at `path` can be used without changes."""
    path: str = ""


class Recordings:
    """A reader of the audio of clips. It keeps the last recording open, since the next clip is often a part of it."""

    def __init__(self) -> None:
        self._clip: Clip | None = None
        self._file: soundfile.SoundFile | None = None
        self._spool: IO[bytes] | None = None

    def __enter__(self) -> Recordings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def make(self, clip: Clip, with_data: bool) -> Made:
        """Return the audio of a clip.

        Args:
            clip: The clip; its path is absolute.
            with_data: Whether to return the content of files that can be used without changes.

        Raises:
            RowError: If the audio cannot be decoded.
            OSError: If the file cannot be read.
            UserError: If the format needs PyAV, which is not installed.
        """
        try:
            if clip.is_whole and (kind := _kind(_head(clip), clip)) is not None:
                data = _content(clip)
                seconds = check_audio(data)
                is_file = clip.data is None and clip.span is None and Path(clip.path).suffix[1:].lower() in AUDIO_TYPES
                return Made(kind, seconds, data if with_data or not is_file else None, clip.path if is_file else "")
            copied = self._copied_opus(clip) if clip.is_whole else None
            return self._encode(clip) if copied is None else copied
        except UserError:  # A UserError is also a ValueError.
            raise
        except SampleError as error:
            raise RowError(error.reason, error.detail) from None
        except (soundfile.LibsndfileError, ValueError, TypeError, OverflowError) as error:
            raise _broken(clip, error) from None

    def _copied_opus(self, clip: Clip) -> Made | None:
        """Return the Opus audio of a WebM or Matroska file as an Ogg file without re-encoding it; None for others."""
        form = av_format(_head(clip), clip.path)
        if form is None:
            return None
        with _stream(clip) as file:
            opus = opus_of(file, form, clip.path)
        if opus is None:
            return None
        original = self._open(clip)  # This call raises RowError if the file is truncated.
        seconds, wanted = check_audio(opus), original.frames / original.samplerate
        if seconds < MIN_SHARE * wanted:
            raise RowError("broken", f"only {seconds:.2f} of {wanted:.2f} s could be copied")
        return Made("opus", seconds, opus)

    def _encode(self, clip: Clip) -> Made:
        """Return a part of a recording, or a file of a type that shards may not contain, as FLAC."""
        file = self._open(clip)
        rate, first = file.samplerate, round(clip.start * file.samplerate)
        if not MIN_RATE <= rate <= MAX_RATE:
            raise RowError("broken", f"the sampling rate is {rate} Hz, but must be {MIN_RATE} to {MAX_RATE} Hz")
        if clip.channel is not None and clip.channel >= file.channels:
            raise RowError(
                "wrong_type",
                f"there is no channel {clip.channel}; the file has {file.channels} channels, counted from 0",
            )
        wanted = max(0, file.frames - first) if clip.seconds is None else round(clip.seconds * rate)
        here = min(wanted, file.frames - first)
        if here <= 0 or here < MIN_SHARE * wanted:
            end = "the end" if clip.seconds is None else f"{clip.start + clip.seconds:g} s"
            raise RowError(
                "broken",
                f"the part from {clip.start:g} s to {end} is empty or not within the {file.frames / rate:g} s of audio",
            )
        if here > MAX_SEC * rate:
            raise RowError("too_long", f"the audio is {here / rate:.2f} s long, but the limit is {MAX_SEC:g} s")
        try:
            return _written(file, clip.channel, first, here, "flac")
        except _AboveFullScale:
            return _written(file, clip.channel, first, here, "wav")

    def _open(self, clip: Clip) -> soundfile.SoundFile:
        """Return the recording of a clip as a file that supports exact seeking."""
        known = self._clip
        if self._file is not None and known is not None and clip.data is known.data:
            if (clip.path, clip.span) == (known.path, known.span):
                return self._file
        self._close()
        head = _head(clip)
        form = av_format(head, clip.path)
        if form is not None:
            self._file = self._spooled(*av_audio(_stream(clip), form, clip.path), _size(clip))
        else:
            if clip.seconds is None and _kind(head, clip) is not None and len(whole_files(_content(clip))) > 1:
                raise RowError(
                    "unsupported", "the file consists of concatenated files, so no part or channel can be taken from it"
                )
            is_file = clip.data is None and clip.span is None
            file = soundfile.SoundFile(clip.path if is_file else _stream(clip))
            if file.format in _EXACT_FORMATS and file.subtype.startswith(_EXACT_SUBTYPES) and file.seekable():
                self._file = file
            else:
                with file:
                    self._file = self._spooled(file.samplerate, file.channels, _blocks(file, clip), _size(clip))
        self._clip = clip
        return self._file

    def _spooled(self, rate: int, channels: int, blocks: Iterator[Values], num_bytes: int) -> soundfile.SoundFile:
        """Decode a whole recording to a temporary file, and return this file, opened for reading.

        Raises:
            RowError: If the recording has more values than is plausible for its size in bytes, or is too long.
            OSError: If the temporary file cannot be written.
        """
        most, num = MAX_VALUES_PER_BYTE * num_bytes + _FREE_VALUES, 0
        self._spool = tempfile.TemporaryFile(prefix="earshot-import-")
        # libsndfile writes to the file descriptor, because it would not notice errors of a Python file object.
        descriptor = self._spool.fileno()
        try:
            with soundfile.SoundFile(descriptor, "w", rate, channels, "PCM_16", format="W64", closefd=False) as out:
                for values in blocks:
                    num += values.size
                    if num > most:
                        raise RowError("broken", f"{num_bytes} bytes decode to more than {most} values")
                    if num > _MAX_RECORDING_SEC * rate * channels:
                        detail = f"the recording is longer than {_MAX_RECORDING_SEC / 3600:g} h; divide it"
                        raise RowError("too_long", detail)
                    out.write(values)
        except soundfile.LibsndfileError as error:
            folder = f"a temporary file in {tempfile.gettempdir()}"
            raise OSError(errno.EIO, f"{error.error_string.strip()} Free space there or set TMPDIR", folder) from None
        self._spool.seek(0)
        return soundfile.SoundFile(self._spool)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._spool is not None:
            self._spool.close()
        self._clip = self._file = self._spool = None


class _AboveFullScale(Exception):
    """Raised when 16-bit audio cannot represent the values of a recording."""


def _written(file: soundfile.SoundFile, channel: int | None, first: int, num_frames: int, kind: str) -> Made:
    """Write a part of a recording as 16-bit FLAC or floating-point WAV.

    Args:
        file: The recording.
        channel: The channel, counted from 0; None for all channels, or for their mean if FLAC does not support them.
        first: The first frame.
        num_frames: The number of frames.
        kind: `flac` or `wav`.

    Raises:
        RowError: If the audio cannot be decoded, or is too long for a WAV file.
        _AboveFullScale: If the audio cannot be written as FLAC because of values above full scale.
    """
    channels = 1 if channel is not None or file.channels > _FLAC_CHANNELS else file.channels
    if kind == "wav" and (size := 4 * num_frames * channels) > MAX_FILE_BYTES:
        raise RowError("too_long", f"floating-point audio would need {size} bytes, but the limit is {MAX_FILE_BYTES}")
    file.seek(first)
    buffer, num = io.BytesIO(), 0
    form, subtype = ("FLAC", "PCM_16") if kind == "flac" else ("WAV", "FLOAT")
    with soundfile.SoundFile(buffer, "w", file.samplerate, channels, subtype, format=form) as out:
        while num < num_frames:
            values = _read(file, min(num_frames - num, max(1, _BLOCK_VALUES // file.channels)))
            if not len(values):
                break
            num += len(values)
            values = _selected(values, channel)
            if kind == "flac" and values.dtype == np.float32 and np.abs(values).max() > 1:
                raise _AboveFullScale
            out.write(values)
    if num < MIN_SHARE * num_frames:
        raise RowError("broken", f"only {num} of {num_frames} audio frames could be decoded")
    return Made(kind, num / file.samplerate, buffer.getvalue())


def _blocks(file: soundfile.SoundFile, clip: Clip) -> Iterator[Values]:
    while True:
        try:
            values = _read(file, max(1, _BLOCK_VALUES // file.channels))
        except soundfile.LibsndfileError as error:
            raise _broken(clip, error) from None
        if not len(values):
            return
        yield values


def _broken(clip: Clip, error: Exception) -> RowError:
    """Return the error for a clip whose audio cannot be decoded.

    Raises:
        OSError: If the file cannot be read from the disk.
    """
    reason: object = error
    if isinstance(error, soundfile.LibsndfileError):
        reason = error.error_string
        # This error may come from the disk, or from an invalid seek in a damaged file. Reading the file shows which.
        if error.code == _SYSTEM_ERROR and clip.data is None:
            with open(clip.path, "rb") as file:
                while file.read(_BLOCK_VALUES):
                    pass
    return RowError("broken", f"{clip.path}: {str(reason).strip() or 'cannot be decoded'}")


def _read(file: soundfile.SoundFile, frames: int) -> Values:
    """Return the next frames of a file, `[frames, channels]`, as int16 if that is lossless, and otherwise as float32.

    Raises:
        RowError: If a value is not finite (`nan`) or larger than `MAX_LEVEL` (`out_of_range`).
    """
    if file.subtype in _SHORT_SUBTYPES:
        return file.read(frames, dtype="int16", always_2d=True)
    values = file.read(frames, dtype="float32", always_2d=True)
    if len(values):
        level = max(-float(values.min()), float(values.max()))
        if not np.isfinite(level):
            raise RowError("nan", f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite")
        if level > MAX_LEVEL:
            raise RowError("out_of_range", f"the audio has a value of {level:g}, but full scale is 1; scale the file")
    return values


def _selected(values: Values, channel: int | None) -> Values:
    """Return one channel or all channels. If there are more channels than FLAC supports, their mean is returned."""
    if channel is not None:
        return values[:, channel : channel + 1]
    if values.shape[1] > _FLAC_CHANNELS:
        return values.mean(axis=1, keepdims=True).astype(values.dtype)
    return values


def _kind(head: bytes, clip: Clip) -> str | None:
    """Return the type of a file, determined from its content, if shards may contain this type; None otherwise."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS":
        return "opus" if b"OpusHead" in head else "ogg"
    if av_format(head, clip.path) is not None:
        return None
    if head[:3] == b"ID3" or head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE6 == 0xE2:
        return "mp3"
    named = Path(clip.path).suffix[1:].lower()
    return named if named in AUDIO_TYPES else None


def _head(clip: Clip) -> bytes:
    with _stream(clip) as file:
        return file.read(_HEAD_BYTES)


def _size(clip: Clip) -> int:
    if clip.data is not None:
        return len(clip.data)
    return clip.span[1] if clip.span is not None else Path(clip.path).stat().st_size


def _content(clip: Clip) -> bytes:
    if (size := _size(clip)) > MAX_FILE_BYTES:
        raise RowError("too_long", f"the file has {size} bytes, but the limit is {MAX_FILE_BYTES}")
    if clip.data is not None:
        return clip.data
    with _stream(clip) as file:
        return file.read()


def _stream(clip: Clip) -> IO[bytes]:
    """Open the audio file that contains a clip."""
    if clip.data is not None:
        return io.BytesIO(clip.data)
    file = open(clip.path, "rb")
    if clip.span is None:
        return file
    with file:
        file.seek(clip.span[0])
        return io.BytesIO(file.read(clip.span[1]))
