"""Tests of the notes that `earshot evaluate` prints to prevent misreading of scores, and of an export's model card."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from model.errors import UserError
from tests.trainer.data_corpus import clip_rows, write_manifest
from tools.evaluate import _note_choice
from trainer.data.stored import open_stored
from trainer.export.card import _scores, _without_paths
from trainer.scoring import wordnet
from trainer.scoring.wordnet import wordnet_if_any


def test_choice_of_samples_is_reported_if_it_may_surprise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = clip_rows(tmp_path, 5)
    for i, row in enumerate(rows):
        row["split"] = "train" if i < 3 else "test"
    stored = open_stored(str(write_manifest(tmp_path, rows)))

    def note(indices: list[int], split: str | None, max_samples: int | None) -> str:
        _note_choice(Namespace(split=split, max_samples=max_samples), stored, indices)
        return capsys.readouterr().err

    said = note([0, 1, 2, 3, 4], None, None)
    assert "no --split: all splits are evaluated (3 of train, 2 of test), which include training data" in said
    assert note([3, 4], "test", None) == "" and note([3, 4], "test", 2) == ""
    assert note([3, 4], "test", 9) == "note: --max-samples 9: the data contains only 2 samples\n"


def test_missing_wordnet_is_a_note_unless_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wordnet, "FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    assert wordnet_if_any(None, "captions are scored") is None
    said = capsys.readouterr().err
    assert said.startswith("note: captions are scored without METEOR; ") and "apt-get install wordnet-base" in said
    with pytest.raises(UserError, match="index.noun is missing"):
        wordnet_if_any(str(tmp_path), "captions are scored")


def test_card_has_no_local_paths_and_no_doubled_scores() -> None:
    recipe = (
        "run_dir: /home/me/runs\nroot: s3://bucket/data\nshards: ../data/shards\ndeepspeed: ds_configs/zero3.json\n"
    )
    kept = _without_paths(recipe + "files: ['/a/b/c.jsonl', \"~/x/d\"]\nurl: https://host/a/b\n")
    assert "/home" not in kept and "run_dir: …/runs\n" in kept and "files: ['…/c.jsonl', \"…/d\"]" in kept
    assert "s3://bucket/data" in kept and "ds_configs/zero3.json" in kept and "https://host/a/b" in kept
    scores = {
        "unfinished": 1,
        "asr/wer": 0.5,
        "asr/default/wer": 0.5,
        "er/accuracy": 0.5,
        "er/a/accuracy": 0.4,
        "er/b/accuracy": 0.6,
    }
    lines = "\n".join(_scores({"scores": {"test": scores}}))
    assert "asr/wer" in lines and "unfinished" in lines and "asr/default" not in lines and "er/a/accuracy" in lines
