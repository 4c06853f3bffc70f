"""Find the samples in WebDataset tars that other programs wrote, and the role of each file of a sample.

A sample consists of neighboring files that have the same name up to the first dot. This module refuses ambiguous
names, so that it never merges two samples and never splits one.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from model.json_text import parse_json
from trainer.data.decode import AUDIO_TYPES
from trainer.data.errors import SampleError
from trainer.data.metadata import with_last_turn

Member = tuple[str, int, int]
"""(extension, first byte, number of bytes) of a file in a tar."""

_OTHER_AUDIO = ("m4a", "mp4", "aac", "webm", "mka", "wma", "amr", "3gp", "sph", "aiff", "aif", "au", "caf", "w64")
"""Audio types that are recognized, for a precise error message, but not supported."""
_TEXT_TYPES = ("json", "txt")
_BLOCK_BYTES = tarfile.BLOCKSIZE
_NOT_ZERO = re.compile(rb"[^\0]")


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar."""

    key: str
    members: tuple[Member, ...]
    """The files of the sample, in the order of the tar."""
    problem: SampleError | None = None
    """The reason why the sample cannot be used; None if the headers of its files show no problem."""


@dataclass(frozen=True)
class _File:
    """A file of a tar."""

    place: int
    """The number of usable files before it."""
    key: str
    extension: str
    offset: int
    size: int
    problem: SampleError | None


def tar_samples(data: bytes | memoryview, where: str) -> list[TarSample]:
    """Return the samples of a tar, or of several concatenated ones, in stored order.

    Folders and the companion files of macOS (`._*`) are ignored.

    Args:
        data: The content of the tar.
        where: The name of the tar, for error messages.

    Raises:
        UserError: If the content is not a tar.
    """
    samples: list[tuple[int, TarSample]] = []
    first = 0
    for part in _infos(data, where):
        groups: dict[str, list[_File]] = {}
        for info in part:
            if (file := _file(info, first, len(data))) is not None:
                groups.setdefault(file.key, []).append(file)
                first += 1
        samples += (placed for group in groups.values() for placed in _samples_of_group(group))
    return [sample for _, sample in sorted(samples, key=lambda placed: placed[0])]


def arrange(extensions: Sequence[str]) -> tuple[list[int], int | None, int | None]:
    """Find the clips, the `.json` and the `.txt` among the files of a sample.

    Args:
        extensions: The extension of each file. Several clips are numbered (`0.flac`, `1.flac`).

    Returns:
        The positions in `extensions` of the clips (in the order of their numbers), of the `.json`, and of the `.txt`.
        The last two are None if the sample has no such file.

    Raises:
        SampleError: If a file occurs twice, or several audio files are not numbered from 0 or 1 (`ambiguous`).
    """
    if len(set(extensions)) < len(extensions):
        raise SampleError("ambiguous", f"a file occurs twice among {list(extensions)}")
    clips = [i for i, extension in enumerate(extensions) if _kind(extension) in AUDIO_TYPES]
    texts = {kind: [i for i, extension in enumerate(extensions) if _kind(extension) == kind] for kind in _TEXT_TYPES}
    if any(len(places) > 1 for places in texts.values()):
        raise SampleError("ambiguous", f"several .json or .txt files: {list(extensions)}")
    stems = [_stem(extensions[i]) for i in clips]
    if all(stem.isascii() and stem.isdigit() and len(stem) < 7 for stem in stems):
        clips.sort(key=lambda i: int(_stem(extensions[i])))
        numbers = sorted(map(int, stems))
        usual = numbers in (list(range(len(clips))), list(range(1, len(clips) + 1)))
    else:
        usual = len(clips) == 1 and re.fullmatch("[^.0-9]*", stems[0]) is not None
    if not usual:
        names = ", ".join(extensions[i] for i in clips)
        raise SampleError("ambiguous", f"its audio files are {names}; name clips as in KEY.0.flac, KEY.1.flac")
    return clips, next(iter(texts["json"]), None), next(iter(texts["txt"]), None)


def metadata_of(defaults: Mapping[str, Any], json_text: bytes | None, answer_text: bytes | None) -> dict[str, Any]:
    """Return the fields of a sample.

    Args:
        defaults: The values of fields that the sample may lack.
        json_text: The content of its `.json`; None if it has none.
        answer_text: The content of its `.txt`, which is the answer; None if it has none.

    Raises:
        SampleError: If the content is not a JSON object or not UTF-8 (`wrong_type`), or there are two different answers
            (`ambiguous`).
    """
    fields: dict[str, Any] = {}
    if json_text is not None:
        try:
            fields = parse_json(json_text)
        except ValueError as error:
            raise SampleError("wrong_type", f"metadata is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise SampleError("wrong_type", "metadata is not a JSON object")
    fields = with_last_turn(fields)
    if answer_text is not None:
        try:
            answer = answer_text.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SampleError("wrong_type", f"the .txt is not UTF-8 at byte {error.start}") from None
        if fields.get("answer", answer) != answer:
            raise SampleError("ambiguous", "the .txt and the field answer of the .json differ")
        fields = {**fields, "answer": answer}
    return {**defaults, **fields}


def _infos(data: bytes | memoryview, where: str) -> list[list[tarfile.TarInfo]]:
    """Return the headers of the files in each of several concatenated tars. The very last file may be truncated.

    Raises:
        UserError: If the content is not a tar.
    """
    parts: list[list[tarfile.TarInfo]] = []
    begin, file = 0, io.BytesIO(data)
    if not data:
        raise UserError(f"{where}: cannot be read as a tar (empty file); copy or make it again")
    while (found := _NOT_ZERO.search(data, begin)) is not None:
        begin = found.start() - (found.start() - begin) % _BLOCK_BYTES
        file.seek(begin)
        infos: list[tarfile.TarInfo] = []
        parts.append(infos)
        try:
            # tarfile stops without an error at a damaged header, unless it is the first header.
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.size < 0 or infos and info.offset <= infos[-1].offset:
                        raise tarfile.ReadError(f"damaged header at byte {info.offset}")
                    infos.append(info)
                    if info.offset_data + info.size > len(data):
                        return parts
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
            raise UserError(f"{where}: cannot be read as a tar ({error}); copy or make it again") from None
        if end <= begin:
            raise UserError(f"{where}: cannot be read as a tar (damaged at byte {begin}); copy or make it again")
        begin = end
    return parts


def _file(info: tarfile.TarInfo, place: int, num_bytes: int) -> _File | None:
    # tarfile decodes names in other encodings to lone surrogates, which cannot be written to the index.
    name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").removeprefix("./")
    folder, slash, base = name.rpartition("/")
    if info.isdir() or base.startswith("._") or f"/{folder}/".find("/__MACOSX/") >= 0:
        return None
    stem, _, extension = base.partition(".")
    problem = None
    if info.issym() or info.islnk():
        problem = SampleError("wrong_type", f"{name} is a link to {info.linkname!r}; store the file itself")
    elif not info.isreg() or info.issparse():
        problem = SampleError("wrong_type", f"{name} is not a plain file")
    elif info.offset_data + info.size > num_bytes:
        problem = SampleError("broken", f"{name} is truncated")
    return _File(place, folder + slash + stem, extension.lower(), info.offset_data, info.size, problem)


def _samples_of_group(group: Sequence[_File]) -> list[tuple[int, TarSample]]:
    """Divide files with the same name up to the first dot into samples, and return each sample with its place.

    There may be several samples if names have more dots: `a.1.flac`, `a.1.txt`, `a.2.flac` and `a.2.txt` are two
    samples. The name of a sample's `.json` or `.txt` shows where the sample's name ends.
    """
    base = group[0].key
    ends = {_stem(f.extension) for f in group if _kind(f.extension) in _TEXT_TYPES}
    parts: dict[str, list[_File]] = {}
    for file in group:
        owner = next((begin for begin in _beginnings(_stem(file.extension)) if begin in ends), None)
        if owner is None and _kind(file.extension) in AUDIO_TYPES and ends:
            return [_unclear(group)]
        if owner is not None or not ends:
            parts.setdefault(owner or "", []).append(file)
    clips = {
        end: [_stem(f.extension) for f in files if _kind(f.extension) in AUDIO_TYPES] for end, files in parts.items()
    }
    if not ends and len(clips[""]) > 1:  # The clips may belong to one sample or to several.
        return [_unclear(group)]
    # The numbered clip `a.1.flac` of `a` could be the clip of `a.1`, if there is one.
    outer = {begin for end in ends for begin in _beginnings(end)[1:] if begin in ends}
    if any(clips[end] != [end] for end in outer):
        return [_unclear(group)]
    return [(files[0].place, _sample(files, f"{base}.{end}" if end else base, end)) for end, files in parts.items()]


def _beginnings(stem: str) -> list[str]:
    """Return a name and its prefixes that end before a dot, the longest first. The last one is the empty string."""
    words = stem.split(".") if stem else []
    return [".".join(words[:length]) for length in range(len(words), -1, -1)]


def _unclear(group: Sequence[_File]) -> tuple[int, TarSample]:
    sample = _sample(group, group[0].key, "")
    return group[0].place, _refused(sample, "the names do not show to which sample each file belongs")


def _sample(files: Sequence[_File], key: str, end: str) -> TarSample:
    members = tuple((f.extension[len(end) :].lstrip("."), f.offset, f.size) for f in files)
    found = next((f.problem for f in files if f.problem is not None), None)
    if found is not None:
        return TarSample(key, members, found)
    if files[-1].place - files[0].place != len(files) - 1:
        return _refused(TarSample(key, members), "its files are not next to each other; sort the tar by name")
    names = [extension for extension, _, _ in members]
    kinds = [_kind(name) for name in names]
    problem = None
    try:
        arrange(names)
        if not set(kinds) & {*AUDIO_TYPES, *_TEXT_TYPES}:
            problem = SampleError("wrong_type", f"no audio, .json or .txt among its files {names}")
        elif not set(kinds) & set(AUDIO_TYPES) and (other := set(kinds) & set(_OTHER_AUDIO)):
            known = ", ".join(AUDIO_TYPES)
            problem = SampleError("wrong_type", f"its audio is {'/'.join(sorted(other))}, but must be one of {known}")
    except SampleError as error:
        problem = error
    return TarSample(key, members, problem)


def _refused(sample: TarSample, why: str) -> TarSample:
    """Return the sample with the reason why it is ambiguous, unless it has another problem."""
    if sample.problem is not None and sample.problem.reason != "ambiguous":
        return sample
    names = [extension for extension, _, _ in sample.members]
    return TarSample(sample.key, sample.members, SampleError("ambiguous", f"{why} ({', '.join(names[:8])})"))


def _stem(extension: str) -> str:
    return extension.rpartition(".")[0]


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]
