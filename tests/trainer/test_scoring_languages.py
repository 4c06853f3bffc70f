"""Tests of error rates and choices in many scripts and languages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.scoring.asr import asr_metrics
from trainer.scoring.choices import chosen
from trainer.scoring.languages import language_code
from trainer.scoring.questions import answer_class, is_correct
from trainer.scoring.text import normalise, normalise_former


def errors(reference: str, hypothesis: str, language: str) -> tuple[float, float]:
    """Return the number of word errors and the number of words in the reference."""
    wer = asr_metrics([reference], [hypothesis], [language])[0]
    assert wer.name == "wer"
    return float(wer.statistics[0, 0]), float(wer.statistics[0, 1])


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis", "expected"),
    [
        ("hi", "दिन", "दीन", (1, 1)),
        ("hi", "मैं दिन में घर गया था", "मैं दीन में घर गयी था", (2, 6)),
        ("ta", "மொழி", "மொழ", (1, 1)),
        ("th", "น้ำ", "นำ", (1, 2)),
        ("ar", "مُحَمَّدٌ", "محمد", (0, 1)),
        ("ar", "كتـــاب", "كتاب", (0, 1)),
        ("he", "שָׁלוֹם", "שלום", (0, 1)),
        ("fa", "می\u200cخواهم", "میخواهم", (0, 1)),
        ("tr", "İstanbul", "istanbul", (0, 1)),
        ("vi", "tiê\u0301ng", "tiếng", (0, 1)),
        ("zh", "今天很好", "今天不好", (1, 4)),
        ("zh-CN", "今天很好", "今天不好", (1, 4)),
        ("cmn_hans_cn", "今天很好", "今天不好", (1, 4)),
        ("Chinese (Mandarin)", "今天很好", "今天不好", (1, 4)),
        ("en-US", "I'm 57", "I am fifty seven", (0, 4)),
        ("English", "I'm 57", "I am fifty seven", (0, 4)),
        ("en", "I\u2019m here", "I'm here", (0, 3)),
        ("en", "I\u02bcm here", "I'm here", (0, 3)),
        ("fr", "l\u2019homme", "l'homme", (0, 2)),
        ("en", "...", "!!!", (0, 1)),
        ("en", "hm\u2026 ok.. so", "hm ok so", (0, 3)),
        ("en", "yes", "\u200byes\ufeff", (0, 1)),
    ],
)
def test_words_are_those_of_the_language(
    language: str, reference: str, hypothesis: str, expected: tuple[float, float]
) -> None:
    assert errors(reference, hypothesis, language) == expected
    assert errors(hypothesis, reference, language)[0] == expected[0]


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("en", "EN", "en-US", "en_gb", "eng", "English", "english (US)"), "en"),
        (("zh", "zh-Hant-TW", "cmn", "zho", "chi", "Mandarin", "Mandarin Chinese"), "zh"),
        (("yue", "Cantonese", "yue_hant_hk"), "yue"),
        (("de", "deu", "ger", "German"), "de"),
        (("ro", "ron", "rum", "mo", "Moldovan"), "ro"),
        (("el", "ell", "gre", "Greek"), "el"),
        (("xx-Latn",), "xx"),
    ],
)
def test_languages_have_one_code(names: tuple[str, ...], code: str) -> None:
    assert {language_code(name) for name in names} == {code}


@given(st.text(), st.sampled_from(["en", "hi", "zh", "ar", "de"]))
def test_normalised_text_is_stable(text: str, language: str) -> None:
    plain = normalise(text, language)
    assert plain and plain == " ".join(plain.split())
    if language != "en" and plain != "empty":
        assert normalise(plain, language) == plain


@given(
    st.text(st.characters(min_codepoint=97, max_codepoint=122) | st.just(" "), min_size=1),
    st.sampled_from(["en", "de"]),
)
def test_plain_text_is_normalised_as_by_the_former_version(text: str, language: str) -> None:
    assert normalise(text, language) == normalise_former(text, language)


def test_the_former_error_rate_stays_next_to_the_new_one() -> None:
    metrics = {m.name: m for m in asr_metrics(["दिन"], ["दीन"], ["hi"])}
    assert metrics["wer"].statistics[0].tolist() == [1, 1]
    assert metrics["wer_former"].statistics[0].tolist() == [0, 2]  # the vowel sign counted as a space


@pytest.mark.parametrize(
    ("text", "choices", "language", "named"),
    [
        ("C++", ["C", "C++"], "en", "C++"),
        ("It is C++.", ["C", "C++", "C#"], "en", "C++"),
        ("It is C.", ["C", "C++", "C#"], "en", "C"),
        ("-5", ["5", "-5"], "en", "-5"),
        ("\u22125", ["5", "-5"], "en", "-5"),
        ("5", ["5", "-5"], "en", "5"),
        ("+", ["+", "-"], "en", "+"),
        ("दीन", ["दिन", "दीन"], "en", "दीन"),
        ("दीन", ["दिन", "दीन"], "hi", "दीन"),
        ("这是猫", ["猫", "狗"], "en", "猫"),
        ("这是猫", ["猫", "狗"], "zh", "猫"),
        ("这是猫和狗", ["猫", "狗"], "zh", None),
        ("เป็นแมว", ["แมว", "หมา"], "th", "แมว"),
        ("Die Antwort ist Hund.", ["Hund", "Hunde"], "de", "Hund"),
    ],
)
def test_choices_are_told_apart(text: str, choices: list[str], language: str, named: str | None) -> None:
    assert chosen(text, choices, language) == named


def test_choices_that_differ_in_signs_are_different_classes() -> None:
    meta = {"answer": "C++", "choices": ["C", "C++"]}
    assert is_correct("c++", meta) and not is_correct("C", meta)
    assert answer_class("C", meta) == ("c++", "c")
