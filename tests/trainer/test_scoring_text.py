"""Tests of text normalizers, compared with values computed by hand and with the libraries on which they are based."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scoring.text import DIGIT_WORDS, answer_words, normalise, normalise_audiobench, tokenise


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
        ("er, ah, seven", "seven"),
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


PLAIN_TEXTS = (
    "Mr. Brown can't see the colour, [noise] of (a) dog's bark!",
    "We'll've gone -- they're Café-goers; that's it.",
    "I'd been there; she ain't gonna go <unk> hmm",
)


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_text_without_numbers_is_normalised_as_by_whisper(text: str) -> None:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    assert normalise(text) == " ".join(EnglishTextNormalizer({})(text).split())
    assert normalise(text, "de") == " ".join(BasicTextNormalizer()(text).split())


def test_languages_without_spaces_have_a_word_per_character() -> None:
    assert normalise("今天天气很好。", "zh") == "今 天 天 气 很 好"


def audiobench(text: str) -> str:
    """Apply all steps that AudioBench publishes, including those without an effect after Whisper's normalizer."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    numbers = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    words = dict(enumerate([*numbers.split(), "seventeen", "eighteen", "nineteen", "twenty"]))
    words |= {30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety"}
    text = EnglishTextNormalizer({})(text.lower())
    for number, word in words.items():
        text = re.sub(rf"\b{number}\b", word, text)
    text = re.sub(r"(\[|\(|\{|\<)[^\(\)\[\]]*(\]|\)|\}|\>)", "", text)
    steps = [jiwer.RemoveMultipleSpaces(), jiwer.ExpandCommonEnglishContractions()]
    text = jiwer.Compose([*steps, jiwer.RemoveKaldiNonWords(), jiwer.RemovePunctuation()])(text)
    return " ".join(re.sub(r"\b(uh|umm|um|er|ah)\b", "", text).split()) or "empty"


@pytest.mark.parametrize(
    "text",
    [
        *PLAIN_TEXTS,
        "Nine, three. ZERO!",
        "call 911 at 3.50 for $20, 15 % or 70 cents",
        "er, twenty one uh 19th of May 2001 ah",
        "[noise]",
        "",
    ],
)
def test_audiobench_text_equals_that_of_its_published_steps(text: str) -> None:
    assert normalise_audiobench(text) == audiobench(text)


def test_audiobench_joins_a_digit_string() -> None:
    assert normalise_audiobench("five seven") == "57"
    assert normalise_audiobench("seven") == "seven"


def test_answer_words_have_no_articles() -> None:
    assert answer_words("The sound of an Engine.") == ["sound", "of", "engine"]
    assert answer_words("die Katze", "de") == ["die", "katze"]


def test_tokens_equal_those_of_nltk_within_a_sentence() -> None:
    from nltk import word_tokenize

    text = "Don't stop: a man's dog (barks), loudly."
    assert tokenise(text) == word_tokenize(text, preserve_line=True)
    assert tokenise("A dog barks. Rain falls.") == ["A", "dog", "barks", ".", "Rain", "falls", "."]
