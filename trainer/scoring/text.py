"""Text normalization for metrics: Whisper's normalizers, followed by steps of AudioBench."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

import regex

from trainer.scoring.languages import UNSPACED_LANGUAGES, language_code

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
_APOSTROPHE = re.compile("\u02bc|(?<=\\w)[\u2018\u2019\uff07\u00b4\u2032](?=\\w)")
_DOTS = re.compile("\\.{2,}|\u2026")
_LONE_DOTS = re.compile(r"(?<!\S)\.+(?!\S)")
_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]|\([^)]+?\)")
_OPTIONAL_MARKS = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew points
    "\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed"  # Arabic
    "\u0730-\u074a\ufe00-\ufe0f]"  # Syriac points, variation selectors
)
_EMPTY = "empty"


def normalise(text: str, language: str = "en") -> str:
    """Normalize text with Whisper's normalizer of the language, and spell numbers digit by digit.

    English text becomes lower case. Contractions are expanded, and fillers, punctuation, diacritics and brackets with
    their content are removed. Whisper's normalizer writes number words as digits ("five seven" → "57", "twenty one" →
    "21"). Each digit is then spelled as a word ("five seven", "two one"), so that a string of digits counts as one word
    per digit. The steps are those of AudioBench (arXiv 2406.16020) except for its expansion of numbers; see
    `normalise_audiobench`. British and American spellings ("colour", "color") differ, because transformers does not
    include Whisper's table of spellings.

    Text in other languages is normalized with the steps of Whisper's basic normalizer, with two exceptions. Marks are
    kept in scripts in which they are letters, whereas Whisper's normalizer turns, for example, the vowel signs of Hindi
    into spaces. The points that are optional in Arabic and Hebrew text are removed. Chinese, Cantonese, Japanese, Thai,
    Lao and Burmese text is split into one word per character, as in Whisper's own evaluation.

    In all languages, typographic apostrophes are replaced by plain ones, and invisible characters and runs of dots are
    removed.

    Args:
        text: The text.
        language: The language as a code, a BCP 47 tag or an English name; see `language_code`.

    Returns:
        The normalized text, or "empty" if nothing remains.
    """
    code, clean = language_code(language), _clean(text)
    if code != "en":
        return " ".join(_basic(clean, code in UNSPACED_LANGUAGES).split()) or _EMPTY
    return _spelled(_LONE_DOTS.sub(" ", _english()(_spaced_zeros(clean)))) or _EMPTY


def normalise_former(text: str, language: str = "en") -> str:
    """Normalize text as `normalise` did up to version 0.2; it will be removed in version 0.4.

    Only exact language codes are known, and marks become spaces in all languages except English.
    """
    if language != "en":
        return " ".join(_whisper_basic(language in UNSPACED_LANGUAGES)(text).split()) or _EMPTY
    return _spelled(_english()(_spaced_zeros(text))) or _EMPTY


def normalise_audiobench(text: str) -> str:
    """Normalize English text as AudioBench does (`preprocess_text_asr`, AudioLLMs/AudioBench at commit 9308801).

    The result differs from the result of `normalise` in numbers. Numbers remain as Whisper's normalizer writes them,
    except that 0 to 19 and the tens up to 90 become words, and punctuation within numbers is removed. For example,
    "five seven" becomes the single word "57". AudioBench's further steps for contractions and brackets are omitted,
    since they would have no effect after Whisper's normalizer.
    """
    plain = _SMALL_NUMBER.sub(lambda match: _NUMBER_WORDS[int(match[0])], _english()(text))
    plain = "".join(c for c in plain if not unicodedata.category(c).startswith("P"))
    return " ".join(_FILLERS.sub("", plain).split()) or _EMPTY


def answer_words(text: str, language: str = "en") -> list[str]:
    """Return the normalized words of an answer. In English, articles are removed, as in SQuAD's scorer."""
    plain = normalise(text, language)
    return (_ARTICLES.sub(" ", plain) if language_code(language) == "en" else plain).split()


def tokenise(text: str) -> list[str]:
    """Split text into words and punctuation marks, sentence by sentence, with the tokenizer of `nltk.word_tokenize`."""
    tokenizer = _word_tokenizer()
    return [token for sentence in _SENTENCE_END.split(text.strip()) for token in tokenizer.tokenize(sentence)]


def _clean(text: str) -> str:
    """Return the text with plain apostrophes, and without invisible characters and runs of dots."""
    text = _APOSTROPHE.sub("'", _DOTS.sub(" ", text))
    # The zero-width space separates words. All other format characters do not separate anything.
    return "".join(c for c in text.replace("\u200b", " ") if unicodedata.category(c) != "Cf")


def _basic(text: str, split_letters: bool) -> str:
    """Normalize text as Whisper's basic normalizer does, but keep the marks that are letters."""
    text = _BRACKETS.sub("", text.lower()).replace("i\u0307", "i")
    text = _OPTIONAL_MARKS.sub("", unicodedata.normalize("NFKC", text))
    text = "".join(" " if unicodedata.category(c)[0] in "SP" else c for c in text).lower()
    return " ".join(regex.findall(r"\X", text)) if split_letters else text


def _spaced_zeros(text: str) -> str:
    # Whisper's normalizer reads "00" as the number 0, but "0 0" as two digits.
    return _LEADING_ZEROS.sub(lambda match: " ".join(match[0]), text)


def _spelled(plain: str) -> str:
    """Return normalized English text without fillers, and with numbers spelled digit by digit."""
    return " ".join(_NUMBER.sub(_spell_number, _FILLERS.sub(" ", plain)).split())


def _spell_number(match: re.Match[str]) -> str:
    return " ".join(DIGIT_WORDS[int(c)] if c.isdigit() else _SYMBOL_WORDS[c] for c in match[0])


# transformers and nltk are slow to import, and runs that never evaluate do not need them.
@cache
def _english() -> Any:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


@cache
def _whisper_basic(split_letters: bool) -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer(split_letters=split_letters)


@cache
def _word_tokenizer() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()
