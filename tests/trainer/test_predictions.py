"""Tests that predictions are read from files as they were written, and that bad files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.errors import UserError
from trainer.evaluation.predictions import Prediction, read_predictions, score_predictions, write_predictions

PREDICTIONS = [
    Prediction("a", "one\u2028two", True, 1.5, {"task": "asr", "answer": "one", "subset": "x", "licence": "CC"}),
    Prediction("b", "(B)", False, 0.25, {"task": "er", "answer": "sad", "choices": ["happy", "sad"], "source": "s"}),
    Prediction("c", "", True, 2.0, {"task": "ac", "answer": "rain", "references": ["rain"], "instruction": "What?"}),
    Prediction("d", "很好", True, 1.0, {"task": "st", "answer": "天气很好", "language": "en", "target_language": "zh"}),
]


def test_read_predictions_have_the_same_scores(tmp_path: Path) -> None:
    path = tmp_path / "predictions-test-step3.jsonl"
    write_predictions(path, PREDICTIONS)
    found = read_predictions(path)
    assert [(p.key, p.hypothesis, p.finished, p.audio_sec) for p in found] == [
        (p.key, p.hypothesis, p.finished, p.audio_sec) for p in PREDICTIONS
    ]
    assert found[0].meta == {"task": "asr", "answer": "one", "subset": "x"}
    assert score_predictions(found) == score_predictions(PREDICTIONS)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"key": "a", "task": "asr", "reference": "x"}', "hypothesis"),
        ('{"key": "a", "task": "asr", "reference": "x", "hypothesis": 3}', "hypothesis = 3"),
        ('{"key": "a", "task": "er", "reference": "x", "hypothesis": "y", "choices": [1]}', "choices"),
        ('{"key": "a", "task": "er", "reference": "x", "hypothesis": "y", "finished": null}', "finished"),
        ('{"key": "a", "task": "er", "reference": "x", "hypothesis": "y", "messages": [1]}', "messages"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps({"key": "k", "task": "asr", "reference": "x", "hypothesis": "y"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match="line 2") as caught:
        read_predictions(path)
    assert word in str(caught.value)


def test_duplicate_keys_and_empty_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [PREDICTIONS[0], PREDICTIONS[0]])
    with pytest.raises(UserError, match="twice"):
        read_predictions(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="no predictions"):
        read_predictions(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_predictions(tmp_path)
