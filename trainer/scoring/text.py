"""Text normalization for metrics: Whisper's normalizers, followed by steps of AudioBench."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {
    **dict(enumerate([*DIGIT_WORDS, *_TEENS.split()])),
    **{10 * i: word for i, word in enumerate(_TENS.split(), 2)},
}
_SYMBOL_WORDS = {"-": "minus", ".": "point", "%": "percent", "$": "dollars", "£": "pounds", "€": "euros", "¢": "cents"}
_NUMBER = re.compile(r"(?<!\S)[-$£€¢]*\d+(?:\.\d+)*%?(?!\S)")
_LEADING_ZEROS = re.compile(r"(?<![\w.,:$£€¢-])0\d+(?![\w%]|[.,:]\d)")
_SMALL_NUMBER = re.compile(r"\b(?:1?\d|[2-9]0)\b", re.ASCII)
_FILLERS = re.compile(r"\b(?:uh|umm?|er|ah)\b")
_ARTICLES = re.compile(r"\b(?:an?|the)\b")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_UNSPACED_LANGUAGES = {"zh", "yue", "ja", "th", "lo", "my"}
_EMPTY = "empty"


def normalise(text: str, language: str = "en") -> str:
    """Normalize text with Whisper's normalizer of the language, and spell numbers digit by digit.

    English text becomes lower case. Contractions are expanded, and fillers, punctuation, diacritics and brackets with
    their content are removed. Whisper's normalizer writes number words as digits ("five seven" → "57", "twenty one" →
    "21"). Each digit is then spelled as a word ("five seven", "two one"), so that a string of digits counts as one word
    per digit. The steps are those of AudioBench (arXiv 2406.16020) except for its expansion of numbers, see
    `normalise_audiobench`. British and American spellings ("colour", "color") differ, because transformers does not
    include Whisper's table of spellings.

    Text in other languages goes through Whisper's basic normalizer, which keeps diacritics. Chinese, Cantonese,
    Japanese, Thai, Lao and Burmese text is split into one word per character, as in Whisper's own evaluation.

    Returns:
        The normalized text, or "empty" if nothing remains.
    """
    if language != "en":
        return " ".join(_basic(language in _UNSPACED_LANGUAGES)(text).split()) or _EMPTY
    # Whisper's normalizer reads "00" as the number 0, but "0 0" as two digits.
    spaced = _LEADING_ZEROS.sub(lambda match: " ".join(match[0]), text)
    plain = _NUMBER.sub(_spell_number, _FILLERS.sub(" ", _english()(spaced)))
    return " ".join(plain.split()) or _EMPTY


def normalise_audiobench(text: str) -> str:
    """Normalize English text as AudioBench does (`preprocess_text_asr`, AudioLLMs/AudioBench at commit 9308801).

    The result differs from that of `normalise` in numbers: they stay as Whisper's normalizer writes them, except that 0
    to 19 and the tens up to 90 become words, and punctuation within numbers is removed. For example, "five seven"
    becomes the single word "57". AudioBench's further steps for contractions and brackets are omitted, since Whisper's
    normalizer leaves nothing for them to do.
    """
    plain = _SMALL_NUMBER.sub(lambda match: _NUMBER_WORDS[int(match[0])], _english()(text))
    plain = "".join(c for c in plain if not unicodedata.category(c).startswith("P"))
    return " ".join(_FILLERS.sub("", plain).split()) or _EMPTY


def answer_words(text: str, language: str = "en") -> list[str]:
    """Return the normalized words of an answer; in English, articles are removed as in SQuAD's scorer."""
    plain = normalise(text, language)
    return (_ARTICLES.sub(" ", plain) if language == "en" else plain).split()


def tokenise(text: str) -> list[str]:
    """Split text into words and punctuation marks, sentence by sentence, with the tokenizer of `nltk.word_tokenize`."""
    tokenizer = _word_tokenizer()
    return [token for sentence in _SENTENCE_END.split(text.strip()) for token in tokenizer.tokenize(sentence)]


def _spell_number(match: re.Match[str]) -> str:
    return " ".join(DIGIT_WORDS[int(c)] if c.isdigit() else _SYMBOL_WORDS[c] for c in match[0])


# transformers and nltk are slow to import, and runs that never evaluate do not need them.
@cache
def _english() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


@cache
def _basic(split_letters: bool) -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=split_letters)


@cache
def _word_tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()
