"""Tests that samples in unusual tars are never merged or split, and never become text-only because audio is missing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from tests.trainer.data_corpus import audio_bytes, row
from trainer.data.errors import SampleError
from trainer.data.fetch import read_samples
from trainer.data.shard_check import SkippedSample, build_index
from trainer.data.shards import RawSample, ShardSet
from trainer.data.tar_samples import arrange, tar_samples
from trainer.storage.store import LocalStore

CLIPS = [audio_bytes(0.05, seed=i) for i in range(4)]
DEFAULTS = {"task": "asr", "split": "train", "instruction": "Transcribe."}
Files = Sequence[tuple[str, bytes | str]]
"""The files of a tar as pairs of name and content. If the content is a text, the file is a link to that path."""


def tar_of(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def indexed(folder: Path, tars: dict[str, bytes]) -> tuple[dict[str, RawSample], dict[str, SkippedSample]]:
    """Write tars, build their index, and return the usable samples and the skipped samples by key."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, data in tars.items():
        (folder / name).write_bytes(data)
    try:
        skipped = build_index(LocalStore(folder), DEFAULTS)
    except UserError as error:
        assert "no sample can be used" in str(error)
        return {}, {}
    shards = ShardSet(LocalStore(folder))
    found: dict[str, RawSample] = {}
    for shard, info in enumerate(shards.shards):
        for raw in read_samples(shards, shard, range(info.num_samples)).values():
            assert isinstance(raw, RawSample) and raw.key not in found
            found[raw.key] = raw
    return found, {s.key: s for s in skipped}


def facts(raw: RawSample) -> tuple[list[bytes], str]:
    return [bytes(c) for c in raw.clips], raw.metadata["answer"]


GOOD = [("z.flac", CLIPS[3]), ("z.txt", b"good")]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.m4a", b"x"), ("a.txt", b"t")], "wrong_type"),
        ([("a.flac", "/data/a.flac"), ("a.txt", b"t")], "wrong_type"),
        ([("a.txt", b"t")], "no_audio"),
        ([("a.json", json.dumps(row("a")).encode())], "no_audio"),
        ([("a.flac", CLIPS[0])], "wrong_type"),
        ([("a.flac", CLIPS[0]), ("a.cls", b"3")], "wrong_type"),
        ([("a.flac", CLIPS[0]), ("a.flac", CLIPS[1]), ("a.txt", b"t")], "ambiguous"),
        ([("a.flac", CLIPS[0]), ("a.wav", CLIPS[0]), ("a.txt", b"t")], "ambiguous"),
        ([("a.left.flac", CLIPS[0]), ("a.right.flac", CLIPS[1]), ("a.txt", b"t")], "ambiguous"),
        ([("a.1.flac", CLIPS[0]), ("a.2.flac", CLIPS[1])], "ambiguous"),
        ([("a.1.flac", CLIPS[0]), ("a.2.flac", CLIPS[1]), ("a.1.txt", b"t")], "ambiguous"),
        ([("a.flac", CLIPS[0]), ("a.txt", b"t"), ("a.json", b'{"answer": "other"}')], "ambiguous"),
        ([("a.flac", CLIPS[0]), ("b.flac", CLIPS[1]), ("a.txt", b"t"), ("b.txt", b"t")], "ambiguous"),
        ([("a.flac", CLIPS[0]), ("a.txt", b"\xff\xfet\0")], "wrong_type"),
        ([("a.flac", CLIPS[0]), ("a.json", b"[" * 100_000)], "wrong_type"),
        ([("a.flac", CLIPS[0]), ("a.json", b'{"answer": "a\\ud800"}')], "wrong_type"),
        ([("a.flac", CLIPS[0]), ("a.json", b'{"answer": "a", "choices": [1]}')], "wrong_type"),
    ],
)
def test_odd_samples_are_refused_with_a_reason(tmp_path: Path, files: Files, reason: str) -> None:
    found, skipped = indexed(tmp_path, {"a.tar": tar_of([*files, *GOOD])})
    assert set(found) == {"z"}
    assert skipped and {s.reason for s in skipped.values()} == {reason}


def test_a_tar_without_any_usable_sample_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("a.m4a", b"x"), ("a.txt", b"t"), ("b.m4a", b"x"), ("c.txt", b"t")]))
    with pytest.raises(
        UserError, match=r"1 no_audio \(first: a.tar c: .*; 2 wrong_type \(first: a.tar a: its audio is"
    ):
        build_index(LocalStore(tmp_path), DEFAULTS)


def test_macos_companion_files_and_byte_order_marks_are_ignored(tmp_path: Path) -> None:
    files = [("./._a.flac", b"Mac"), ("./a.flac", CLIPS[0]), ("./._a.txt", b"Mac"), ("./a.txt", b"\xef\xbb\xbfone\n")]
    files += [("__MACOSX/._a.flac", b"Mac"), ("b.json", b'\xef\xbb\xbf{"answer": "two"}'), ("b.FLAC", CLIPS[1])]
    found, skipped = indexed(tmp_path, {"a.tar": tar_of(files)})
    assert {k: facts(r) for k, r in found.items()} == {"a": ([CLIPS[0]], "one"), "b": ([CLIPS[1]], "two")}
    assert not skipped


def test_numbered_clips_are_in_numeric_order(tmp_path: Path) -> None:
    names = sorted(f"a.{i}.flac" for i in range(12))  # 0, 1, 10, 11, 2 …
    clips = {f"a.{i}.flac": audio_bytes(0.02, seed=i) for i in range(12)}
    found, _ = indexed(tmp_path, {"a.tar": tar_of([*((n, clips[n]) for n in names), ("a.txt", b"t")])})
    assert facts(found["a"])[0] == [clips[f"a.{i}.flac"] for i in range(12)]


def test_same_keys_in_two_tars_and_in_concatenated_tars_are_samples_of_their_own(tmp_path: Path) -> None:
    parts = [tar_of([("a.flac", CLIPS[i]), ("a.txt", str(i).encode())]) for i in range(4)]
    found, skipped = indexed(tmp_path, {"x.tar": parts[0] + parts[1], "y.tar": parts[2], "z.tar": parts[3]})
    assert {k: facts(r) for k, r in found.items()} == {
        name: ([CLIPS[i]], str(i)) for i, name in enumerate(["a", "a~2", "a~3", "a~4"])
    }
    assert not skipped


def test_names_in_other_encodings_are_escaped(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    found, _ = indexed(tmp_path, {"a.tar": tar_of([(f"{name}.flac", CLIPS[0]), (f"{name}.txt", b"t")])})
    assert list(found) == ["caf\\xe9"]


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_tar_does_not_end_early_in_silence(tmp_path: Path, damage: str) -> None:
    whole = [(f"{key}.{kind}", data) for key in "abc" for kind, data in (("flac", CLIPS[0]), ("txt", b"t"))]
    data = bytearray(tar_of(whole))
    if damage == "cut":
        at = data.find(b"c.flac")
        found, skipped = indexed(tmp_path, {"a.tar": bytes(data[: at + 700])})
        assert set(found) == {"a", "b"} and skipped["c"].reason == "broken"
    else:
        data[data.find(b"b.flac") + 150] ^= 255
        with pytest.raises(UserError, match="a.tar: cannot be read as a tar"):
            tar_samples(bytes(data), "a.tar")


KEYS = st.lists(
    st.sampled_from(["a", "b", "a.1", "a.2", "a.10", "d/a", "b.x", "é"]), min_size=1, max_size=6, unique=True
)


@pytest.mark.slow
@given(keys=KEYS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_sample_is_itself_or_refused(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], data: st.DataObject
) -> None:
    """Check samples with any keys, with any number of clips, and with their files in any order."""
    wanted: dict[str, tuple[list[bytes], str]] = {}
    files: list[tuple[str, bytes]] = []
    for number, key in enumerate(keys):
        num_clips = data.draw(st.integers(1, 3))
        clips = [audio_bytes(0.02, seed=10 * number + i) for i in range(num_clips)]
        own = [(f"{key}.{i}.flac" if num_clips > 1 else f"{key}.flac", clip) for i, clip in enumerate(clips)]
        own.append((f"{key}.txt", f"answer {key}".encode()))
        files += data.draw(st.permutations(own))
        wanted[key] = clips, f"answer {key}"
    if data.draw(st.booleans()):
        files = data.draw(st.permutations(files))
    found, _ = indexed(tmp_path_factory.mktemp("any"), {"a.tar": tar_of(files)})
    for key, raw in found.items():
        assert facts(raw) == wanted[key]


@given(
    st.lists(st.sampled_from(["flac", "wav", "0.flac", "1.flac", "1.wav", "01.flac", "x.mp3", "json", "txt", "cls"]))
)
def test_clips_are_arranged_or_refused(names: list[str]) -> None:
    try:
        clips, json_place, txt_place = arrange(names)
    except SampleError as error:
        assert error.reason == "ambiguous"
        return
    assert [i for i in (json_place, txt_place) if i is not None] == [
        names.index(n) for n in ("json", "txt") if n in names
    ]
    assert sorted(clips) == [i for i, n in enumerate(names) if n.endswith(("flac", "wav", "mp3"))]
