"""Tests that imports of damaged or ambiguous sources never lose, merge or replace anything silently."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import resource
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.trainer.data_corpus import audio_bytes
from tests.trainer.import_runs import av_bytes, manifest, run, skipped
from tests.trainer.import_sources import SOURCES, heard, lines
from tools.make_shards import main as make_shards
from trainer.data.manifest import read_manifest
from trainer.importers.fields import Ids


@pytest.fixture
def clip(tmp_path: Path) -> bytes:
    """Write `a.wav` to the folder of the source, and return its content."""
    data = audio_bytes(0.2, kind="WAV")
    (tmp_path / "a.wav").write_bytes(data)
    return data


def tar_bytes(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    """Return a tar with only two blocks of zeros at its end."""
    buffer = io.BytesIO()
    for name, data in files.items():
        info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
        content = b"" if isinstance(data, tarfile.TarInfo) else data
        info.size = info.size or len(content)
        buffer.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
    return buffer.getvalue() + bytes(1024)


def sample(key: str, clip: bytes) -> dict[str, bytes | tarfile.TarInfo]:
    return {f"{key}.wav": clip, f"{key}.txt": key.encode()}


def test_no_clip_replaces_one_of_another_sample(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.m").write_bytes(audio_bytes(0.2 + 0.1 * i, seed=i, kind="WAV"))
    rows = [{"id": "conv", "audio": ["0.m", "1.m"], "text": "t"}, {"id": "conv-1", "audio": "2.m", "text": "t"}]
    assert run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out") == 0
    first, second = read_manifest(tmp_path / "out" / "manifest.jsonl")
    for i, path in enumerate((*first.audio, *second.audio)):
        assert np.array_equal(heard(path.read_bytes()), heard((tmp_path / f"{i}.m").read_bytes()))
    assert make_shards([str(tmp_path / "out" / "manifest.jsonl"), str(tmp_path / "shards")]) == 0


@pytest.mark.parametrize("form", ["webdataset", "wenet"])
@pytest.mark.parametrize("ending", [".tar", ".tgz"])
def test_concatenated_tars_are_read_to_their_end(form: str, ending: str, tmp_path: Path, clip: bytes) -> None:
    parts = [tar_bytes(sample("a", clip)), tar_bytes(sample("b", clip) | sample("c", clip)), bytes(9000)]
    (tmp_path / f"t{ending}").write_bytes(b"".join(parts) if ending == ".tar" else b"".join(map(gzip.compress, parts)))
    assert run(form, tmp_path / f"t{ending}", tmp_path / "out") == 0
    assert [r["id"] for r in manifest(tmp_path / "out")] == ["a", "b", "c"]


def test_what_is_lost_of_a_damaged_tar_is_reported(tmp_path: Path, clip: bytes) -> None:
    whole = tar_bytes(sample("a", clip) | sample("b", clip) | sample("c", clip))
    third = whole.index(b"c.wav\0")
    damaged = {
        "header": whole[:third] + b"\xff" * 512 + whole[third + 512 :],
        "cut": whole[:third],
        "cut_in_header": whole[: third + 100],
        "cut_in_file": whole[: third + 1000],
        "other": whole[:third] + bytes(1024) + b"no tar" * 200,
    }
    (tmp_path / "in").mkdir()
    for name, data in damaged.items():
        (tmp_path / "in" / f"{name}.tar").write_bytes(data)
        (tmp_path / "in" / f"{name}.tar.gz").write_bytes(gzip.compress(data))
    (tmp_path / "in" / "half.tar.gz").write_bytes(gzip.compress(whole)[:-400])
    assert run("webdataset", tmp_path / "in", tmp_path / "out") == 1
    names = sorted([*(f"{n}.tar" for n in damaged), *(f"{n}.tar.gz" for n in damaged), "half.tar.gz"])
    assert skipped(tmp_path / "out") == [(name, "broken") for name in names]
    found = [r.get("original_id", r["id"])[0] for r in manifest(tmp_path / "out")]
    assert found.count("a") >= 2 * len(damaged) and "c" not in found


def test_a_damaged_shar_tar_is_reported(tmp_path: Path) -> None:
    source = SOURCES["shar"](tmp_path / "in")
    path = source / "recording.000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"b-2.")])
    assert run("shar", source, tmp_path / "out") == 1
    assert ("recording.000000.tar", "broken") in skipped(tmp_path / "out")


@pytest.mark.slow
def test_sparse_huge_and_linked_files_of_tars_are_not_read(tmp_path: Path, clip: bytes) -> None:
    sparse, huge, link = (tarfile.TarInfo(f"{name}.wav") for name in ("sparse", "huge", "link"))
    sparse.type, link.type, link.linkname = tarfile.GNUTYPE_SPARSE, tarfile.LNKTYPE, "a.wav"
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"77777777777\0"  # the sparse file claims a size of 8 GiB
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    files = tar_bytes(sample("a", clip) | {"link.wav": link, "link.txt": b"link"})[:-1024]
    text = tar_bytes({"sparse.txt": b"sparse"})[:-1024]
    huge.size = (2 << 30) + 1
    with open(tmp_path / "t.tar", "wb") as file:
        file.write(files + bytes(header) + text + huge.tobuf(tarfile.GNU_FORMAT))
        file.seek(huge.size + -huge.size % 512, os.SEEK_CUR)
        file.write(tar_bytes({"huge.txt": b"huge"} | sample("z", clip)))
    assert run("webdataset", tmp_path / "t.tar", tmp_path / "out") == 1
    wanted = [("t.tar/link", "wrong_type"), ("t.tar/sparse", "wrong_type"), ("t.tar/huge", "too_long")]
    assert skipped(tmp_path / "out") == wanted
    assert [r["id"] for r in manifest(tmp_path / "out")] == ["a", "z"]


def test_an_empty_mapped_field_is_not_taken_from_another_column(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "t.csv").write_text("audio,emotion,text,answer\na.wav,sad,hello,x\na.wav,,hello,x\n")
    options = ["--set", "task=er", "--set", "instruction=?"]
    assert run("csv", tmp_path / "t.csv", tmp_path / "out", "--map", "answer=emotion", *options) == 1
    assert [r["answer"] for r in manifest(tmp_path / "out")] == ["sad"]
    assert skipped(tmp_path / "out") == [("t.csv:3", "empty_answer")]


def test_a_mapping_of_a_column_to_itself_turns_its_alias_off(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "t.csv").write_text("audio,text,question,target\na.wav,hello,why,x\n")
    assert run("csv", tmp_path / "t.csv", tmp_path / "plain") == 0
    (row,) = manifest(tmp_path / "plain")
    assert row["instruction"] == "why"
    assert run("csv", tmp_path / "t.csv", tmp_path / "out", "--map", "question=question") == 0
    (row,) = manifest(tmp_path / "out")
    assert row["question"] == "why" and row["instruction"].startswith("Transcribe")


def test_one_column_may_give_two_fields(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "t.csv").write_text("audio,name\na.wav,dog\n")
    options = ["--map", "answer=name", "--map", "subset=name", "--set", "task=ac", "--set", "instruction=?"]
    assert run("csv", tmp_path / "t.csv", tmp_path / "out", *options) == 0
    (row,) = manifest(tmp_path / "out")
    assert (row["answer"], row["subset"]) == ("dog", "dog")


@pytest.mark.parametrize(
    ("rows", "answers", "bad_lines"),
    [
        # A quotation mark in a later row closes the stray one, and the rest of that row is malformed.
        (['a.wav,"two', "a.wav,three", 'a.wav,"four"'], ["three", "four"], [3]),
        # A quotation mark at the end of a later cell closes the stray one, so the joined record is well-formed.
        (['a.wav,"two', "a.wav,three", 'a.wav,four"'], ["three"], [3, 5]),
        (['a.wav,"two', 'a.wav,three"', "a.wav,four"], ["four"], [3, 4]),
        (['"a.wav,two', 'a.wav,three"', "a.wav,four"], ["four"], [3, 4]),
        (['a.wav,"two', "a.wav,three", "a.wav,four"], ["three", "four"], [3]),
        # Quoted texts may have several lines.
        (
            ['a.wav,"two', "lines, or", 'three, in a.wav"', 'a.wav,"a, b"'],
            ["two\nlines, or\nthree, in a.wav", "a, b"],
            [],
        ),
    ],
)
def test_a_stray_quotation_mark_joins_no_rows(
    rows: list[str], answers: list[str], bad_lines: list[int], tmp_path: Path, clip: bytes
) -> None:
    (tmp_path / "t.csv").write_text("\n".join(["audio,text", "a.wav,one", *rows, "a.wav,five"]) + "\n")
    assert run("csv", tmp_path / "t.csv", tmp_path / "out") == bool(bad_lines)
    assert [r["answer"] for r in manifest(tmp_path / "out")] == ["one", *answers, "five"]
    lines = [json.loads(s) for s in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"t.csv:{number}" for number in bad_lines]
    assert all("quotation mark" in line["detail"] or "not a row" in line["detail"] for line in lines)


def test_quotation_marks_of_tsv_are_text(tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "t.tsv").write_text('audio\ttext\na.wav\t"one\na.wav\t"two" three\n')
    assert run("csv", tmp_path / "t.tsv", tmp_path / "tsv") == 0
    assert [r["answer"] for r in manifest(tmp_path / "tsv")] == ['"one', '"two" three']


@pytest.mark.parametrize("shards", [[], ["--shards"]])
def test_names_that_are_not_utf8_are_skipped(shards: list[str], tmp_path: Path, clip: bytes) -> None:
    (tmp_path / "in" / "dog").mkdir(parents=True)
    for name in (b"dog/ok.wav", b"dog/\xff.wav"):
        with open(os.fsencode(tmp_path / "in") + b"/" + name, "wb") as file:
            file.write(clip)
    options = ["--set", "task=aqa", "--set", "instruction=?", *shards]
    assert run("audiofolder", tmp_path / "in", tmp_path / "out", *options) == 1
    assert skipped(tmp_path / "out") == [("dog/\\udcff.wav", "wrong_type")]


def test_ids_stay_different_however_short_their_hashes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["same", "same", "same", "other"])
    monkeypatch.setattr("trainer.importers.fields._digest", lambda text: next(digests))
    ids = Ids()
    taken = [ids.take("x", number) for number in range(3)]
    assert taken == ["x", "x-same", "x-other"]


def test_the_channel_of_a_segment_of_kaldi_is_used(tmp_path: Path) -> None:
    stereo = np.random.default_rng(0).integers(-9000, 9000, (16_000, 2), dtype=np.int16)
    soundfile.write(tmp_path / "s.wav", stereo, 16_000)
    (tmp_path / "wav.scp").write_text("rec s.wav\nleft sph2pipe -f wav -p -c 1 s.wav |\n")
    segments = [
        "a rec 0.25 0.75 1",
        "b rec 0.25 0.75 0",
        "c left 0.25 0.75 0",
        "d left 0 1 1",
        "e rec 0 1 x",
        "f rec 0 1 0 0",
    ]
    (tmp_path / "segments").write_text("".join(f"{line}\n" for line in segments))
    (tmp_path / "text").write_text("".join(f"{line[0]} t\n" for line in segments))
    assert run("kaldi", tmp_path, tmp_path / "out") == 1
    for row, channel in zip(manifest(tmp_path / "out"), (1, 0, 0), strict=True):
        values = soundfile.read(tmp_path / "out" / row["audio"], dtype="int16")[0]
        assert np.array_equal(values, stereo[4000:12_000, channel])
    assert skipped(tmp_path / "out") == [(f"{tmp_path.name}/{k}", "wrong_type") for k in "def"]


def test_an_unknown_label_is_no_answer(tmp_path: Path, clip: bytes) -> None:
    pa = pytest.importorskip("pyarrow")
    features = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}, "audio": {"_type": "Audio"}}
    columns = {"audio": pa.array([{"bytes": clip, "path": "a.wav"}] * 3), "label": [1, -1, 2]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow_parquet.write_table(table, tmp_path / "t.parquet")
    options = ["--map", "answer=label", "--set", "task=aqa", "--set", "instruction=?"]
    assert run("hf", tmp_path / "t.parquet", tmp_path / "out", *options) == 1
    assert [r["answer"] for r in manifest(tmp_path / "out")] == ["cat"]
    assert skipped(tmp_path / "out") == [(f"t.parquet:{i}", "empty_answer") for i in (1, 2)]


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_gigaspeech_is_a_user_error(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = gzip.compress(json.dumps({"audios": [{"path": f"{i:x}"} for i in range(10_000)]}).encode())
    content = content[:-3000] if damage == "cut" else content[:2000] + b"\xff" * 100 + content[2100:]
    (tmp_path / "g.json.gz").write_bytes(content)
    assert run("gigaspeech", tmp_path / "g.json.gz", tmp_path / "out") == 2
    assert "g.json.gz: cannot be read" in capsys.readouterr().err


def test_an_unreadable_source_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: object, *args: object) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "x.ark").write_bytes(b"RIFF1234")
    (tmp_path / "wav.scp").write_text("a x.ark:0\n")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.importers.formats.kaldi.open", refuse, raising=False)
        assert run("kaldi", tmp_path, tmp_path / "out", "--check") == 2
    assert "x.ark: cannot be read (Permission denied)" in capsys.readouterr().err
    monkeypatch.setattr(Path, "exists", refuse)
    assert run("kaldi", tmp_path, tmp_path / "out", "--check") == 2
    assert f"{tmp_path}: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_problem_with_the_disk_is_not_a_missing_file(
    number: int, tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.wav").write_bytes(clip)
    source = lines(tmp_path / "m.json", [{"audio": f"{k}.wav", "text": "t"} for k in ("a", "b", "missing")])
    original = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path.name == "b.wav":
            raise OSError(number, os.strerror(number), str(path))
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert run("nemo", source, tmp_path / "out") == 2
    assert f"b.wav: {os.strerror(number)}" in capsys.readouterr().err
    monkeypatch.undo()
    assert run("nemo", source, tmp_path / "out") == 1
    assert skipped(tmp_path / "out") == [("m.json:3", "no_file")] and len(manifest(tmp_path / "out")) == 2


@pytest.mark.parametrize("kind", ["MP3", "webm"])
def test_a_full_disk_for_temporary_files_ends_the_import(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = audio_bytes(3.0, kind="MP3") if kind == "MP3" else av_bytes("webm", "libopus")
    (tmp_path / "a.x").write_bytes(data)
    source = lines(tmp_path / "m.json", [{"audio": "a.x", "start": 0.5, "end": 0.6, "text": "t"}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limits[1]))
    try:
        assert run("nemo", source, tmp_path / "out") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert "m.json:1: a temporary file in" in message and "set TMPDIR" in message and "broken" not in message
    assert run("nemo", source, tmp_path / "out") == 0


def test_a_missing_package_ends_an_import_with_other_rows(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    source = lines(tmp_path / "m.json", [{"audio": name, "text": "t"} for name in ("a.wav", "a.m4a")])
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("nemo", source, tmp_path / "out", "--max-skipped-fraction", "1") == 2


@pytest.mark.parametrize("peak", [1.0, 1.5])
def test_values_above_full_scale_are_not_clipped(peak: float, tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 2)).astype(np.float32)
    values[4000, 1] = peak
    soundfile.write(tmp_path / "a.wav", values, 16_000, subtype="FLOAT")
    rows = [{"audio": "a.wav", "text": "t", "channel": c, "offset": 0.2, "duration": 0.2} for c in (0, 1)]
    assert run("nemo", lines(tmp_path / "m.json", rows), tmp_path / "out") == 0
    paths = [tmp_path / "out" / row["audio"] for row in manifest(tmp_path / "out")]
    assert [path.suffix for path in paths] == [".flac", ".wav" if peak > 1 else ".flac"]
    for channel, path in enumerate(paths):
        part = soundfile.read(path, dtype="float32")[0]
        step = 0.0 if path.suffix == ".wav" else 1.01 / 32768
        assert np.abs(part - values[3200:6400, channel]).max() <= step
    assert make_shards([str(tmp_path / "out" / "manifest.jsonl"), str(tmp_path / "shards")]) == 0


@pytest.mark.parametrize("kind", ["WAV", "MP3"])
def test_parts_of_recordings_that_are_longer_than_a_clip_may_be(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.importers.audio.MAX_SEC", 1.0)
    monkeypatch.setattr("trainer.data.decode.MAX_SEC", 1.0)
    (tmp_path / "a.x").write_bytes(audio_bytes(3.0, kind=kind))
    rows = [{"audio": "a.x", "text": "t", "offset": 2.2, "duration": 0.5}, {"audio": "a.x", "text": "t"}]
    rows += [{"audio": "a.x", "text": "t", "offset": 0.5, "duration": 1.5}]
    source = lines(tmp_path / "m.json", rows)
    assert run("nemo", source, tmp_path / "out", "--max-skipped-fraction", "1") == 0
    assert [row["duration"] for row in manifest(tmp_path / "out")] == [0.5]
    assert skipped(tmp_path / "out") == [("m.json:2", "too_long"), ("m.json:3", "too_long")]
    monkeypatch.setattr("trainer.importers.audio._MAX_RECORDING_SEC", 2.5)
    # A part of a WAV file is read without decoding the rest of the file.
    assert run("nemo", source, tmp_path / "again", "--max-skipped-fraction", "1") == (0 if kind == "WAV" else 2)
