"""Tests of `earshot compare` with two evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import compare
from trainer.evaluation.predictions import Prediction, write_predictions


def write(path: Path, said: dict[str, str], answer: str = "one two") -> Path:
    metas = {"task": "asr", "answer": answer, "subset": "x", "language": "en"}
    write_predictions(path, [Prediction(key, text, True, 1.0, metas) for key, text in said.items()])
    return path


def keys(num: int, text: str) -> dict[str, str]:
    return {f"k{i:02}": text for i in range(num)}


def test_a_worse_evaluation_is_called_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", keys(30, "one two"))
    worse = {**keys(30, "one two"), **keys(9, "one"), "k03": "nothing at all said", "extra": "one"}
    b = write(tmp_path / "b.jsonl", worse)
    assert compare.main([str(a), str(b), str(a), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 30 and found["num_skipped_samples"] == {"a": 0, "b": 1}
    to_b, to_itself = found["comparisons"]
    wer = next(c for c in to_b["changes"] if (c["subset"], c["metric"]) == ("all", "wer"))
    assert wer["first"] == 0.0 and wer["other"] == pytest.approx((8 + 4) / 60) and wer["verdict"] == "worse"
    assert 0 < wer["difference"]["low"] < wer["difference"]["value"] < wer["difference"]["high"]
    assert [r["key"] for r in to_b["regressions"]][:2] == ["k03", "k00"] and len(to_b["regressions"]) == 9
    assert not to_itself["regressions"] and not any(c["verdict"] for c in to_itself["changes"])


def test_the_text_lists_what_became_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", {"k1": "one two", "k2": "one two"})
    b = write(tmp_path / "b.jsonl", {"k1": "one", "k3": "one two"})
    assert compare.main([str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "b against a" in text and "1 samples are" in text and "asr/wer" in text
    assert "a: 1 samples are ignored, since they are not in all other evaluations" in text and "b: 1 samples" in text


def test_better_depends_on_the_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", keys(30, "one"))
    b = write(tmp_path / "b.jsonl", keys(30, "one two"))
    compare.main([str(a), str(b), "--json"])
    changes = json.loads(capsys.readouterr().out)["comparisons"][0]["changes"]
    assert {c["verdict"] for c in changes if c["metric"] in ("wer", "deletions")} == {"better"}


@pytest.mark.parametrize(("answer", "key", "word"), [("one three", "k", "answer of 'k'"), ("one two", "q", "no key")])
def test_other_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: str, key: str, word: str
) -> None:
    a = write(tmp_path / "a.jsonl", {"k": "one"})
    b = write(tmp_path / "b.jsonl", {key: "one"}, answer)
    assert compare.main([str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and word in error and error.count("\n") == 1
