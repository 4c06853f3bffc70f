"""Detect truncated audio files, and split concatenated ones.

libsndfile decodes a truncated file as if it were whole, and it decodes only the first of several concatenated files.
The functions of this module therefore read the lengths and end marks that the file formats contain.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from trainer.data.errors import SampleError

MIN_SHARE = 0.95
"""The smallest fraction of the declared audio that a file must contain. A file with less counts as truncated."""

_STREAMED_BYTES = 0x7FFF0000
"""The smallest value in a WAV header that stands for an unknown size. sox writes 0x7FFFF000 if it does not know the
size of the audio, and other programs write 0x7FFFFFFF or 0xFFFFFFFF."""
_FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_OGG_PAGE = re.compile(rb"OggS")
_MP3_INFO = re.compile(rb"Xing|Info")
_BOS, _EOS = 2, 4
_OGG_HEADER_BYTES = 27
_MP3_MPEG1, _MP3_MONO = 3, 3


def whole_files(data: bytes | memoryview) -> list[bytes | memoryview]:
    """Split concatenated audio files. The result contains one file unless files were concatenated.

    Args:
        data: The content of a FLAC, WAV, MP3 or Ogg file.

    Raises:
        SampleError: If an end mark or a declared length shows that a file is truncated (`broken`).
    """
    start = bytes(data[:4])
    if start in (b"RIFF", b"RF64"):
        return [_whole_wav(data)]
    if start == b"OggS":
        return _split(data, list(_ogg_links(memoryview(data))))
    if start == b"fLaC":
        return _split(data, [0, *(m.start() for m in _FLAC_START.finditer(data, 4))])
    return _split(data, list(_mp3_starts(data)))


def declares_length(data: bytes | memoryview) -> bool:
    """Return whether a file states its length. If not, the number of frames that libsndfile reports is an estimate."""
    if bytes(data[:4]) in (b"RIFF", b"RF64", b"OggS", b"fLaC"):
        return True
    header = _mp3_info(data, 0)
    return header is not None and bool(data[header[1] + 7] & 1)


def _split(data: bytes | memoryview, starts: list[int]) -> list[bytes | memoryview]:
    if len(starts) == 1:
        return [data]
    view = memoryview(data)
    return [view[start:end] for start, end in zip(starts, [*starts[1:], len(view)], strict=True)]


def _whole_wav(data: bytes | memoryview) -> bytes | memoryview:
    """Return a WAV file in a form that libsndfile reads completely.

    If the header states the size 0 although there is audio, the size is replaced by the value that libsndfile takes as
    unknown.

    Raises:
        SampleError: If the file is truncated (`broken`).
    """
    size64, at = None, 12
    while at + 8 <= len(data):
        name, size = bytes(data[at : at + 4]), struct.unpack("<I", data[at + 4 : at + 8])[0]
        if name == b"ds64" and at + 24 <= len(data):
            size64 = struct.unpack("<Q", data[at + 16 : at + 24])[0]
        if name == b"data":
            here = len(data) - at - 8
            declared = size64 if size == 0xFFFFFFFF and size64 is not None else size
            total = struct.unpack("<I", data[4:8])[0]
            if declared == 0 and here and (total <= at or total >= _STREAMED_BYTES):
                return bytes(data[: at + 4]) + b"\xff\xff\xff\xff" + bytes(data[at + 8 :])
            if declared < _STREAMED_BYTES and here < MIN_SHARE * declared:
                raise SampleError("broken", f"truncated: {here} of {declared} bytes of audio")
            return data
        at += 8 + size + size % 2
    return data


def _ogg_links(data: memoryview) -> Iterator[int]:
    """Yield the offset of each file in a chained Ogg file, which consists of several concatenated files.

    Raises:
        SampleError: If a page is truncated, there is no first page, or a stream has no end page.
    """
    at, was_first, num_links = 0, False, 0
    unended: set[int] = set()
    while at < len(data):
        if bytes(data[at : at + 4]) != b"OggS":  # Decoders skip bytes between pages, such as tags at the end.
            found = _OGG_PAGE.search(data, at)
            if found is None:
                break
            at = found.start()
        if at + _OGG_HEADER_BYTES > len(data):
            raise SampleError("broken", "truncated: its last page is incomplete")
        flags, serial, num_segments = data[at + 5], int.from_bytes(data[at + 14 : at + 18], "little"), data[at + 26]
        body = at + _OGG_HEADER_BYTES + num_segments
        end = body + sum(data[at + _OGG_HEADER_BYTES : body])
        if end > len(data):
            raise SampleError("broken", "truncated: its last page is incomplete")
        if flags & _BOS:
            if not was_first:
                _check_ended(unended)
                num_links += 1
                yield at
            unended.add(serial)
        if flags & _EOS:
            unended.discard(serial)
        at, was_first = end, bool(flags & _BOS)
    _check_ended(unended)
    if not num_links:
        raise SampleError("broken", "truncated: it has no first page")


def _check_ended(unended: set[int]) -> None:
    if unended:
        raise SampleError("broken", "truncated: a stream has no end page")


def _mp3_starts(data: bytes | memoryview) -> Iterator[int]:
    """Yield the offset of each concatenated MP3 file, as far as Xing and Info headers show where files begin or end."""
    start = 0
    while True:
        yield start
        header = _mp3_info(data, start)
        if header is None:
            return
        frame, tag = header
        following = _mp3_info(data, tag + 4)
        ends = [] if following is None else [following[0]]
        if data[tag + 7] & 2:
            at = tag + 8 + 4 * (data[tag + 7] & 1)
            end = frame + int.from_bytes(data[at : at + 4], "big")
            if tag < end < len(data) - 4 and (bytes(data[end : end + 3]) == b"ID3" or _mp3_side_bytes(data, end)):
                ends.append(end)
        if not ends:
            return
        start = min(ends)


def _mp3_info(data: bytes | memoryview, start: int) -> tuple[int, int] | None:
    """Find the next frame that contains a Xing or Info header.

    Returns:
        The offsets of the frame and of its Xing or Info header; None if there is no such frame.
    """
    for match in _MP3_INFO.finditer(data, start):
        for side_bytes in (32, 17, 9):
            frame = match.start() - 4 - side_bytes
            if frame >= start and _mp3_side_bytes(data, frame) == side_bytes and match.end() + 12 <= len(data):
                return frame, match.start()
    return None


def _mp3_side_bytes(data: bytes | memoryview, at: int) -> int:
    """Return the size in bytes of the side information of the layer III frame at `at`, or 0 if no frame is there."""
    head = int.from_bytes(data[at : at + 4], "big")
    version, layer, rate, mode = head >> 19 & 3, head >> 17 & 3, head >> 10 & 3, head >> 6 & 3
    if head >> 21 != 0x7FF or version == 1 or layer != 1 or rate == 3 or head >> 12 & 15 == 15:
        return 0
    if version == _MP3_MPEG1:
        return 17 if mode == _MP3_MONO else 32
    return 9 if mode == _MP3_MONO else 17
