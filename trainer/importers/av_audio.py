"""Decode, with PyAV, audio files that libsndfile cannot read (m4a, mp4, aac, 3gp, webm, mka, wma, amr).

PyAV is an optional dependency. Its code has a BSD license, but its wheels contain FFmpeg and codecs under the LGPL and
the GPL.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from trainer.data.containers import MIN_SHARE
from trainer.importers.row import RowError


def av_format(head: bytes, name: str) -> str | None:
    """Return FFmpeg's name for a file's format, or None if libsndfile should read the file.

    The format is always passed to FFmpeg. If FFmpeg guessed the format, a playlist could make it open other files and
    URLs.

    Args:
        head: The first bytes of the file.
        name: The name of the file.
    """
    if head[4:8] == b"ftyp":
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11":
        return "asf"
    if head[:5] == b"#!AMR":
        return "amr"
    # The layer is 0 in the header of an AAC frame, but not in the header of an MP3 frame.
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    return "aac" if PurePath(name).suffix.lower() == ".aac" and head[:3] == b"ID3" else None


def av_audio(file: IO[bytes], form: str, name: str) -> tuple[int, int, Iterator[NDArray[np.int16]]]:
    """Open the first audio stream of a file.

    Args:
        file: The file.
        form: The format of the file; see `av_format`.
        name: The name of the file, for messages.

    Returns:
        The sampling rate in Hz, the number of channels, and an iterator over the audio: `[frames, channels]` int16.

    Raises:
        RowError: If the audio cannot be decoded. The iterator can also raise this error.
        UserError: If PyAV is not installed.
    """
    av = _av(name)
    try:
        container = av.open(file, "r", format=form)
        if not container.streams.audio:
            raise RowError("broken", f"{name}: has no audio")
        stream = container.streams.audio[0]
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    except (av.error.FFmpegError, ValueError) as error:
        raise RowError("broken", f"{name}: {_reason(error)}") from None
    return rate, channels, _blocks(container, stream, name)


def opus_of(file: IO[bytes], form: str, name: str) -> bytes | None:
    """Return the Opus audio of a WebM or Matroska file as an Ogg file with the same packets.

    Args:
        file: The file.
        form: The format of the file; see `av_format`.
        name: The name of the file, for messages.

    Returns:
        The Ogg file, or None if the audio is not Opus.

    Raises:
        RowError: If the file cannot be read.
        UserError: If PyAV is not installed.
    """
    if form != "matroska":
        return None
    av, buffer = _av(name), io.BytesIO()
    try:
        with av.open(file, "r", format=form) as container:
            if not container.streams.audio or container.streams.audio[0].codec_context.name not in ("opus", "libopus"):
                return None
            stream = container.streams.audio[0]
            with av.open(buffer, "w", format="ogg") as out:
                copy = out.add_stream_from_template(stream)
                for packet in container.demux(stream):
                    if packet.dts is not None:  # The last packet only marks the end.
                        packet.stream = copy
                        out.mux(packet)
    except (av.error.FFmpegError, ValueError) as error:
        raise RowError("broken", f"{name}: {_reason(error)}") from None
    return buffer.getvalue()


def _av(name: str) -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            f"{name}: needs the package av; pip install 'earshot[import]', then rerun the same command"
        ) from None
    return av


def _blocks(container: Any, stream: Any, name: str) -> Iterator[NDArray[np.int16]]:
    av = _av(name)
    context = stream.codec_context
    resampler = av.AudioResampler(format="s16", layout=context.layout, rate=context.sample_rate)
    declared = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    num = 0
    try:
        with container:
            for frame in _with_end(container.decode(stream)):
                for part in resampler.resample(frame):
                    values: NDArray[np.int16] = part.to_ndarray().reshape(-1, context.layout.nb_channels)
                    num += len(values)
                    yield values
    except (av.error.FFmpegError, ValueError) as error:
        raise RowError("broken", f"{name}: {_reason(error)}") from None
    if num == 0:
        raise RowError("empty", f"{name}: has no audio")
    if num < MIN_SHARE * declared * context.sample_rate:
        raise RowError("broken", f"{name}: only {num / context.sample_rate:.2f} of {declared:.2f} s could be decoded")


def _with_end(frames: Iterator[Any]) -> Iterator[Any]:
    """Yield the frames and then None, which makes a resampler return its remaining audio."""
    yield from frames
    yield None


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0][:200] or "cannot be decoded"
