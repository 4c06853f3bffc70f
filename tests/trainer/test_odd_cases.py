"""Odd inputs that were found in the wild, from a folder of cases (CASES_DIR, or `cases` next to the kit of KIT_DIR)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.errors import UserError
from trainer.data.shard_build import build_shards
from trainer.data.shard_check import build_index
from trainer.data.shards import ShardSet
from trainer.storage.store import LocalStore

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[2] / ".." / "shared" / "kit"))
CASES = Path(os.environ.get("CASES_DIR", KIT.parent / "cases"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no odd inputs at {CASES}; set CASES_DIR")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("field-types/m.jsonl", "choices = [1, 2], but must be a list of texts"),
        ("field-types/language.jsonl", "language = ['en'], but must be text"),
        ("field-types/references.jsonl", "references = 5, but must be a list of texts"),
        ("mp3-cut/m.jsonl", "12719 of 32000 audio frames could be decoded"),
        ("no-audio/m.jsonl", "3 no_audio"),
        ("subset-names/all.jsonl", "subset = 'all'"),
        ("surrogate/m.jsonl", "line 1"),
        ("wav-1-hz/m.jsonl", "sampling rate 1 Hz"),
    ],
)
def test_an_odd_manifest_is_refused_with_a_reason(tmp_path: Path, manifest: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_shards(CASES / manifest, str(tmp_path / "out"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("manifest", "num"), [("flac-no-count/m.jsonl", 1), ("wav-piped/m.jsonl", 2), ("subset-names/m.jsonl", 10)]
)
def test_whole_files_are_used(tmp_path: Path, manifest: str, num: int) -> None:
    report = build_shards(CASES / manifest, str(tmp_path / "out"))
    assert (report.num_samples, report.skipped) == (num, ())


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tar-m4a", "2 wrong_type (first: a.tar s0: its audio is m4a"),
        ("tar-no-text", "2 wrong_type (first: a.tar s0: task is missing"),
        ("tar-symlink", "2 wrong_type (first: a.tar s0: s0.flac is a link to '/data/x.flac'"),
        ("tar-twice", "2 ambiguous (first: a.tar s0: a file occurs twice"),
    ],
)
def test_an_odd_tar_is_refused_with_a_reason(tmp_path: Path, case: str, words: str) -> None:
    (tmp_path / "a.tar").write_bytes((CASES / case / "a.tar").read_bytes())
    with pytest.raises(UserError) as caught:
        build_index(LocalStore(tmp_path), {"split": "train"})
    assert words in str(caught.value)


def test_companions_of_macos_do_not_part_a_sample(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((CASES / "tar-macos" / "a.tar").read_bytes())
    assert build_index(LocalStore(tmp_path), {"split": "train"}) == []
    assert [e.num_clips for e in ShardSet(LocalStore(tmp_path)).table(0)] == [1, 1]
