"""What is compared instead of raw text: Whisper's normalisers, and AudioBench's steps after them."""

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
    """Whisper's normaliser of the language, then one word per digit; nothing left becomes "empty".

    English: lower case, contractions expanded, brackets and what they hold dropped, fillers dropped, punctuation and
    diacritics dropped. The normaliser first writes number words as figures ("five seven" → "57", "twenty one" → "21");
    each figure is then spelt out ("five seven", "two one"), the same way on both sides, so that a digit string counts
    one word per digit. transformers ships no table of British spellings (it lies in Whisper's tokenizer on the hub),
    so "colour" and "color" differ here. The steps are those of AudioBench (arXiv 2406.16020), its number expansion
    apart: see `normalise_audiobench`.

    Other languages: Whisper's basic normaliser, which keeps diacritics; Chinese, Cantonese, Japanese, Thai, Lao and
    Burmese get one word per character, as in Whisper's own evaluation.
    """
    if language != "en":
        return " ".join(_basic(language in _UNSPACED_LANGUAGES)(text).split()) or _EMPTY
    # Whisper's normaliser reads "00" as the number 0, but "0 0" as two digits.
    spaced = _LEADING_ZEROS.sub(lambda match: " ".join(match[0]), text)
    plain = _NUMBER.sub(_spell_number, _FILLERS.sub(" ", _english()(spaced)))
    return " ".join(plain.split()) or _EMPTY


def normalise_audiobench(text: str) -> str:
    """English text as AudioBench compares it (`preprocess_text_asr`, AudioLLMs/AudioBench at 9308801).

    As `normalise`, but numbers stay as Whisper's normaliser writes them, only 0 to 19 and whole tens become words, and
    punctuation within numbers is deleted: "five seven" → "57", one word. AudioBench's tables of contractions and
    brackets find nothing that the normaliser left, and are not repeated here. British spellings: see `normalise`.
    """
    plain = _SMALL_NUMBER.sub(lambda match: _NUMBER_WORDS[int(match[0])], _english()(text))
    plain = "".join(c for c in plain if not unicodedata.category(c).startswith("P"))
    return " ".join(_FILLERS.sub("", plain).split()) or _EMPTY


def answer_words(text: str, language: str = "en") -> list[str]:
    """Words of an answer: normalised and, in English, without articles (as SQuAD's scorer does)."""
    plain = normalise(text, language)
    return (_ARTICLES.sub(" ", plain) if language == "en" else plain).split()


def tokenise(text: str) -> list[str]:
    """Words and punctuation marks, by NLTK's tokenizer (that of `nltk.word_tokenize`), sentence by sentence."""
    tokenizer = _word_tokenizer()
    return [token for sentence in _SENTENCE_END.split(text.strip()) for token in tokenizer.tokenize(sentence)]


def _spell_number(match: re.Match[str]) -> str:
    return " ".join(DIGIT_WORDS[int(c)] if c.isdigit() else _SYMBOL_WORDS[c] for c in match[0])


# transformers and nltk are slow to import; runs that never evaluate do not pay for it.
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
