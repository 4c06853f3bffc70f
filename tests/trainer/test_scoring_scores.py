"""Tests of scores by task and subset, the majority baseline and the table. Expected values were computed by hand."""

from __future__ import annotations

import pytest

from trainer.scoring.baseline import majority_baseline
from trainer.scoring.scores import TaskScore, confusions, score, score_values
from trainer.scoring.table import format_table, score_table


def by_name(scores: list[TaskScore]) -> dict[str, float]:
    return score_values(scores)


def test_asr_by_subset() -> None:
    metas = [
        {"answer": "one two", "subset": "digits"},
        {"answer": "stop", "subset": "commands"},
        {"answer": "seven", "subset": "digits", "language": "en"},
    ]
    scores = score("asr", ["one too", "stop", "seven"], metas)
    values = by_name(scores)
    assert values["asr/wer"] == 0.25
    assert values["asr/digits/wer"] == pytest.approx(1 / 3)
    assert values["asr/commands/wer"] == 0.0
    assert (scores[0].name, scores[0].num_samples) == ("asr/wer", 3)
    assert scores[0].low == 0.0 and 0.25 < scores[0].high <= 0.5
    assert score("asr", [], []) == []


def test_questions_with_and_without_choices_are_separate() -> None:
    metas = [{"answer": a, "choices": ["happy", "sad"]} for a in ("sad", "sad")] + [{"answer": "a red car"}]
    scores = score("sqa", ["sad", "so happy", "red bus"], metas)
    values = by_name(scores)
    assert values["sqa/accuracy"] == pytest.approx(1 / 3)
    assert values["sqa/exact_match"] == 0.0 and values["sqa/token_f1"] == pytest.approx(1 / 2)
    assert {s.metric: s.num_samples for s in scores if s.subset == "all"} == {
        "accuracy": 3,
        "macro_f1": 2,
        "exact_match": 1,
        "token_f1": 1,
    }
    assert "sqa/exact_match" not in by_name(score("sqa", ["sad"], metas[:1]))


def test_confusions_count_every_answer() -> None:
    metas = [{"answer": a, "choices": ["happy", "sad"], "subset": "x"} for a in ("sad", "sad", "happy")]
    metas.append({"answer": "seven"})
    assert confusions(["sad", "dunno", "sad", "seven"], metas) == {"x": {"happy": {"sad": 1}, "sad": {"": 1, "sad": 1}}}


def test_captions_are_scored_without_meteor_if_wordnet_is_missing() -> None:
    metas = [{"answer": "rain", "references": ["rain falls", "rain"]}, {"answer": "a dog barks"}]
    assert set(by_name(score("ac", ["rain", "a dog"], metas))) == {
        f"ac/{part}{metric}" for part in ("", "default/") for metric in ("cider", "accuracy")
    }


def _item(answer: str, instruction: str, **fields: object) -> dict[str, object]:
    return {"task": "aqa", "subset": "s", "answer": answer, "instruction": instruction, **fields}


def test_majority_is_per_question_with_fallbacks() -> None:
    train = [_item("yes", "Q1"), _item("Yes.", "Q1"), _item("no", "Q1")]
    train += [_item("no", "Q2", qtype="k")] * 4 + [_item("yes", "Q3", qtype="k")]
    test = [
        _item("yes", "Q1"),  # the majority of Q1 after normalization is yes
        _item("no", "Q2", qtype="k"),
        _item("no", "never asked", qtype="k"),  # the majority of kind k is no
        _item("no", "never asked", qtype="new kind"),  # the majority of the subset is no
        _item("no", "Q1"),  # wrong
    ]
    assert by_name(majority_baseline(train, test))["aqa/accuracy"] == 4 / 5


def test_majority_stays_within_the_choices() -> None:
    train = [_item("rain", "Q")] * 3 + [_item("wind", "Q")]
    test = [_item("wind", "Q", choices=["wind", "sea"])]
    assert by_name(majority_baseline(train, test))["aqa/accuracy"] == 1.0
    unseen = [_item("sea", "Q", choices=["sea", "fire"])]
    assert by_name(majority_baseline(train, unseen))["aqa/accuracy"] == 0.0


def test_majority_reads_the_training_answers_only() -> None:
    assert by_name(majority_baseline([_item("a", "Q")], [_item("b", "Q")] * 3))["aqa/accuracy"] == 0.0


def test_majority_ignores_letters_of_other_questions() -> None:
    train = [_item("(B) rain", "Q1", choices=["wind", "rain"])]
    test = [_item("(A) rain", "Q2", choices=["rain", "sea"])]
    assert by_name(majority_baseline(train, test))["aqa/accuracy"] == 1.0


def test_table() -> None:
    scores = score("er", ["sad"], [{"answer": "sad", "subset": "x"}])
    text = format_table(score_table(scores, scores))
    lines = text.splitlines()
    assert lines[0].split() == ["task", "subset", "samples", "metric", "value", "low", "high", "majority"]
    assert lines[2].split() == ["er", "all", "1", "accuracy", "1.000", "1.000", "1.000", "1.000"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert format_table([]) == ""
