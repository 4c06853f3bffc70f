"""Tests of the table of scores in an export's model card."""

from __future__ import annotations

from trainer.export.card import _scores


def test_scores_of_a_single_subset_are_omitted_and_plain_numbers_are_kept() -> None:
    own = {"asr/wer": 0.5, "asr/only/wer": 0.5, "aqa/accuracy": 0.4, "aqa/a/accuracy": 0.4, "aqa/b/accuracy": 0.4}
    lines = _scores({"scores": {"test": {**own, "num_unfinished": 3}}})
    named = [line.split("|")[2].strip(" `") for line in lines if line.startswith("| `test`")]
    assert named == ["asr/wer", "aqa/accuracy", "aqa/a/accuracy", "aqa/b/accuracy", "num_unfinished"]
