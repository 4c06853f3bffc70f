"""Tests of `earshot shards make` and `earshot tokenizer`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from model.errors import UserError
from tests.trainer.data_corpus import clip_rows, row, write_manifest
from tools.make_shards import main
from tools.train_tokenizer import main as train_tokenizer
from trainer.data import row_check, shard_build
from trainer.data.manifest import Row
from trainer.data.shards import read_index
from trainer.storage.store import LocalStore


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_bytes_are_independent_of_the_order_and_the_number_of_workers(tmp_path: Path) -> None:
    rows = clip_rows(tmp_path, 9)
    options = ["--max-shard-samples", "4"]
    assert main([str(write_manifest(tmp_path, rows)), str(tmp_path / "one"), "--workers", "1", *options]) == 0
    again = write_manifest(tmp_path, rows[::-1])
    assert main([str(again), str(tmp_path / "two"), "--workers", "3", *options]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.tar"))) == 3


def test_bad_samples_are_skipped_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clip_rows(tmp_path, 4)
    (tmp_path / "broken.flac").write_bytes((tmp_path / "clip-0.flac").read_bytes()[:500])
    (tmp_path / "note.txt").write_text("no audio")
    rows += [
        row("broken", audio="broken.flac"),
        row("no-answer", audio="clip-0.flac", answer=" "),
        row("wrong-type", audio="clip-0.flac", answer=["a"]),
        row("other-task", audio="clip-0.flac", task="dance"),
        row("text-file", audio="note.txt"),
        row("no-split", audio="clip-0.flac", split=None),
        {**row("x"), "id": "a/b"},
    ]
    manifest = write_manifest(tmp_path, rows)
    out = tmp_path / "out"
    arguments = [str(manifest), str(out), "--json", "--split", "train"]
    assert main([*arguments, "--max-skipped-fraction", "0.5"]) == 2
    message = capsys.readouterr().err
    assert "7 of 11 samples cannot be used (1 broken, 1 empty_answer, 1 unknown_task, 4 wrong_type)" in message
    assert message.count("\n") == 1
    assert list(out.iterdir()) == []
    assert main([*arguments, "--max-skipped-fraction", "0.7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == 4
    assert report["skipped"] == {"broken": 1, "empty_answer": 1, "unknown_task": 1, "wrong_type": 4}
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {s["key"]: s["line"] for s in listed if s["reason"] == "broken"} == {"broken": 5}


def test_a_missing_file_stops_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*clip_rows(tmp_path, 2), row("gone", audio="gone.flac")]
    assert main([str(write_manifest(tmp_path, rows)), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "set.jsonl, line 3 (id gone): no audio file" in error
    assert error.count("\n") == 1
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 1: not JSON"),
        ("[]\n", "line 1: not a JSON object"),
        ('{"id": "a", "split": "train"}\n{"id": "a", "split": "train"}\n', "lines 1 and 2: both have id 'a'"),
        ("", "no samples"),
    ],
)
def test_a_bad_manifest_is_a_one_line_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "set.jsonl").write_text(text)
    assert main([str(tmp_path / "set.jsonl"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main([str(tmp_path / "none.jsonl"), str(tmp_path / "out")]) == 2


def test_existing_folder_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert main([str(write_manifest(tmp_path, clip_rows(tmp_path, 1))), str(out)]) == 2
    assert "is neither empty nor an unfinished build" in capsys.readouterr().err
    assert contents(out) == {"mine": b"x"}


def test_file_in_place_of_the_folder_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    manifest = str(write_manifest(tmp_path, clip_rows(tmp_path, 1)))
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        assert main([manifest, str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {out}: cannot be written (Not a directory") and error.count("\n") == 1
    with pytest.raises(UserError, match="out: is a file, not a folder"):
        shard_build.build_shards(Path(manifest), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


class Cut(BaseException):
    """An exception that simulates the death of the process."""


@pytest.mark.parametrize("end", [Cut(), UserError("the store is unreachable"), OSError(5, "Input/output error")])
def test_an_interrupted_build_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    rows = [*clip_rows(tmp_path, 9), row("mute", answer=" "), row("quiet", answer=" ")]
    manifest, options = str(write_manifest(tmp_path, rows)), ["--max-shard-samples", "2", "--max-skipped-fraction", "1"]
    assert main([manifest, str(tmp_path / "whole"), *options]) == 0
    checked: list[str] = []
    check = row_check._check

    def check_some(candidate: Row) -> row_check.Checked:
        if len(checked) == 7:
            if isinstance(end, OSError):
                monkeypatch.setattr(Path, "read_bytes", unreadable)
                return check(candidate)
            raise end
        checked.append(candidate.key)
        return check(candidate)

    def unreadable(path: Path) -> bytes:
        raise end

    monkeypatch.setattr(row_check, "_check", check_some)
    monkeypatch.setattr(row_check, "_CHECKED_AHEAD", 1)
    with contextlib.suppress(Cut):
        assert main([manifest, str(tmp_path / "cut"), *options, "--workers", "1"]) == 2
    monkeypatch.undo()
    left = set(contents(tmp_path / "cut"))
    assert "shards.json" not in left and "shard-000000.tar" in left
    with pytest.raises(UserError, match="shards.json"):
        read_index(LocalStore(tmp_path / "cut"))
    checked.clear()
    monkeypatch.setattr(row_check, "_CHECKED_AHEAD", 1)
    monkeypatch.setattr(row_check, "_check", lambda candidate: checked.append(candidate.key) or check(candidate))
    capsys.readouterr()
    assert main([manifest, str(tmp_path / "cut"), *options, "--json"]) == 0
    num_before = json.loads(capsys.readouterr().out)["num_resumed_shards"]
    assert num_before >= 1 and len(checked) <= len(rows) - 2 * num_before
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_unfinished_build_of_other_shards_is_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "building.json").write_text('{"source": "other"}')
    assert main([str(write_manifest(tmp_path, clip_rows(tmp_path, 1))), str(out)]) == 2
    assert "neither empty nor an unfinished build of this manifest" in capsys.readouterr().err


def test_train_tokenizer_writes_an_exact_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"k{i}", answer=f"the word number {i} of many words") for i in range(50)]
    manifest, out = write_manifest(tmp_path, rows), tmp_path / "t.model"
    assert train_tokenizer([str(manifest), "--vocab-size", "48", "--out", str(out)]) == 0
    assert "48 pieces" in capsys.readouterr().out
    assert train_tokenizer([str(manifest), "--vocab-size", "9999", "--out", str(tmp_path / "u.model")]) == 2
    error = capsys.readouterr().err
    assert "a vocabulary of 9999 cannot be trained" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "u.model").exists()
    for place in ("/proc/a.model", f"{manifest}/a.model"):
        assert train_tokenizer([str(manifest), "--vocab-size", "48", "--out", place]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --out {place}: cannot be written (") and error.count("\n") == 1
