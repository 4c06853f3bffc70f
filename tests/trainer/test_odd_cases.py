"""Tests of odd inputs from real sources, in the folder $CASES_DIR or in `cases` next to $KIT_DIR."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from model.errors import UserError
from trainer.data.shard_build import build_shards
from trainer.data.shard_check import build_index
from trainer.data.shards import ShardSet
from trainer.storage.store import LocalStore

ROOT = Path(__file__).parents[2]
KIT = Path(os.environ.get("KIT_DIR", ROOT / ".." / "shared" / "kit"))
CASES = Path(os.environ.get("CASES_DIR", KIT.parent / "cases"))
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"there are no odd inputs in {CASES}; set CASES_DIR")

ELSEWHERE = {
    "slurm": "tests/trainer/test_odd_files.py: test_gpus_of_slurm_are_counted",
    "special-tokens": "tests/trainer/test_odd_fields.py: test_tokens_that_control_the_model_are_refused_by_name",
    "tokenizer-swap": "tests/test_run_tokenizer.py: test_dataset_added_at_a_resume_keeps_the_tokenizer",
}
"""The cases whose input is made by a test in another file, with that test."""


def test_every_case_has_a_test() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for folder in sorted(path.name for path in CASES.iterdir() if path.is_dir()):
        path, _, name = ELSEWHERE.get(folder, "").partition(": ")
        tested = f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if path else f'"{folder}' in here
        assert tested, f"the case {folder} has no test"


def test_words_and_choices_are_told_apart_in_every_language(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(CASES / "scoring" / "try.py"))
    *words, choices = capsys.readouterr().out.splitlines()
    errors = [line.rsplit("[", 1)[1].rstrip("]") for line in words]
    assert errors == [
        *("1.0, 1.0", "1.0, 1.0"),  # vowel signs of Indic scripts distinguish words
        *("0.0, 1.0", "0.0, 1.0"),  # vowel points of Arabic and Hebrew do not
        *["1.0, 4.0"] * 4,  # Chinese, by any of its names
        *["0.0, 4.0"] * 2,  # English, by any of its names
        *("0.0, 3.0", "0.0, 1.0", "0.0, 2.0", "0.0, 1.0"),  # apostrophes, dots and invisible characters
    ]
    assert choices == "C++ -5 दीन 猫"


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("field-types/m.jsonl", "choices = [1, 2], but must be a list of texts"),
        ("field-types/language.jsonl", "language = ['en'], but must be text"),
        ("field-types/references.jsonl", "references = 5, but must be a list of texts"),
        ("mp3-cut/m.jsonl", "only 12719 of 32000 audio frames could be decoded"),
        ("no-audio/m.jsonl", "3 no_audio"),
        ("subset-names/all.jsonl", "subset = 'all'"),
        ("surrogate/m.jsonl", "line 1"),
        ("wav-1-hz/m.jsonl", "the sampling rate is 1 Hz"),
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


def test_macos_companion_files_do_not_split_a_sample(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((CASES / "tar-macos" / "a.tar").read_bytes())
    assert build_index(LocalStore(tmp_path), {"split": "train"}) == []
    assert [e.num_clips for e in ShardSet(LocalStore(tmp_path)).table(0)] == [1, 1]
