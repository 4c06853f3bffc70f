"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scoring import (
    DIGIT_WORDS,
    chosen,
    format_table,
    is_correct,
    majority_baseline,
    normalise,
    score,
    score_table,
    score_values,
    wer,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nine, three. ZERO!", "nine three zero"),
        ("five seven", "five seven"),
        ("57", "five seven"),
        ("twenty one", "two one"),
        ("zero five", "zero five"),
        ("double five", "five five"),
        ("00.", "zero zero"),
        ("agent 007, at 3.05", "agent zero zero seven at three point zero five"),
        ("it costs $3.50", "it costs dollars three point five zero"),
        ("minus five", "minus five"),
        ("Um, I'm [noise] (laughs) fine", "i am fine"),
        ("won't", "will not"),
        ("the first digit", "the 1st digit"),
        ("", "empty"),
        ("[noise]", "empty"),
        ("  ", "empty"),
    ],
)
def test_normalise_english(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_other_languages_keep_their_letters() -> None:
    assert normalise("Zażółć gęślą jaźń!", "pl") == "zażółć gęślą jaźń"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_digit_strings_keep_one_word_per_digit(digits: list[int]) -> None:
    words = " ".join(DIGIT_WORDS[d] for d in digits)
    assert normalise(words) == words
    assert normalise("".join(map(str, digits))) == words


def test_normalise_is_stable() -> None:
    for text in ("a dog, barking at 7", "five hundred", "Yes."):
        assert normalise(normalise(text)) == normalise(text)


def test_wer_sums_errors_before_dividing() -> None:
    # One substitution in one word, none in four: 1 / 5, not the mean of 1 and 0.
    assert wer(["one", "turn the lights on"], ["two", "Turn the lights on!"]) == pytest.approx(1 / 5)
    assert wer(["five seven"], ["five eight"]) == pytest.approx(1 / 2)
    assert wer(["one two"], [""]) == 1.0
    assert wer(["stop"], ["stop stop stop"]) == 2.0


def test_choice_is_equal_or_the_only_one_contained() -> None:
    choices = ["male", "female"]
    assert chosen("Female.", choices) == "female"
    assert chosen("the speaker is female", choices) == "female"
    assert chosen("male or female", choices) is None
    assert chosen("nobody", choices) is None
    assert chosen("(B) street music", ["a siren", "street music"]) == "street music"
    assert chosen("a dog barking loudly", ["a dog", "a dog barking"]) is None
    assert chosen("a dog", ["a dog", "a dog barking"]) == "a dog"


def test_is_correct() -> None:
    mcq = {"answer": "(B) street music", "choices": ["a siren", "street music"]}
    assert is_correct("street music", mcq)
    assert not is_correct("a siren", mcq)
    assert is_correct("7", {"answer": "seven"})
    assert not is_correct("seven one", {"answer": "seven"})
    caption = {"answer": "A dog barks.", "references": ["A dog barks.", "One can hear a dog."]}
    assert is_correct("one can hear a dog", caption)
    assert not is_correct("a dog", caption)


def test_score_by_subset() -> None:
    metas = [
        {"answer": "one two", "subset": "digits"},
        {"answer": "stop", "subset": "commands"},
        {"answer": "seven", "subset": "digits", "language": "en"},
    ]
    scores = score("asr", ["one too", "stop", "seven"], metas)
    assert set(scores) == {"all", "digits", "commands"}
    assert (scores["all"].num_hits, scores["all"].num_units, scores["all"].num_samples) == (1, 4, 3)
    assert scores["digits"].value == pytest.approx(1 / 3)
    assert score_values(scores.values()) == {
        "asr/wer": 0.25,
        "asr/digits/wer": pytest.approx(1 / 3),
        "asr/commands/wer": 0.0,
    }
    accuracy = score("er", ["sad", "so happy"], [{"answer": a, "choices": ["happy", "sad"]} for a in ("sad", "sad")])
    assert accuracy["all"].value == 0.5 and accuracy["all"].metric == "accuracy"
    assert score("asr", [], []) == {}


def _item(answer: str, instruction: str, **fields: object) -> dict[str, object]:
    return {"task": "aqa", "subset": "s", "answer": answer, "instruction": instruction, **fields}


def test_majority_is_per_question_with_fallbacks() -> None:
    train = [_item("yes", "Q1"), _item("Yes.", "Q1"), _item("no", "Q1")]
    train += [_item("no", "Q2", qtype="k")] * 4 + [_item("yes", "Q3", qtype="k")]
    test = [
        _item("yes", "Q1"),  # majority of Q1, after normalisation: yes
        _item("no", "Q2", qtype="k"),
        _item("no", "never asked", qtype="k"),  # majority of kind k: no
        _item("no", "never asked", qtype="new kind"),  # majority of the subset: no
        _item("no", "Q1"),  # wrong
    ]
    baseline = majority_baseline(train, test)["aqa"]
    assert (baseline["all"].num_hits, baseline["all"].num_units) == (4, 5)


def test_majority_stays_within_the_choices() -> None:
    train = [_item("rain", "Q")] * 3 + [_item("wind", "Q")]
    test = [_item("wind", "Q", choices=["wind", "sea"])]
    assert majority_baseline(train, test)["aqa"]["all"].value == 1.0
    unseen = [_item("sea", "Q", choices=["sea", "fire"])]
    assert majority_baseline(train, unseen)["aqa"]["all"].value == 0.0


def test_majority_reads_the_training_answers_only() -> None:
    baseline = majority_baseline([_item("a", "Q")], [_item("b", "Q")] * 3)
    assert baseline["aqa"]["all"].value == 0.0


def test_table() -> None:
    scores = score("er", ["sad"], [{"answer": "sad", "subset": "x"}])
    text = format_table(score_table(scores.values(), {"er": scores}))
    lines = text.splitlines()
    assert lines[0].split() == ["task", "subset", "samples", "metric", "value", "majority"]
    assert lines[2].split() == ["er", "all", "1", "accuracy", "1.000", "1.000"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert format_table([]) == ""
