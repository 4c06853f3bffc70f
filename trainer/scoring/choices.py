"""Multiple-choice answers: recognition of the choice that an answer names, and the macro-F1 over classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.scoring.metric import Metric
from trainer.scoring.text import answer_words

# "(B)", "B.", "b) rain", "B: rain", "Answer: B", "the answer is (B)", "option b"
_LETTER = re.compile(
    r"^\W*(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\b(?:\s+is\b)?[\s:]*(?:option\s+|choice\s+)?)?"
    r"(?:\(([a-z])\)|([a-z])(?=\s*[).:](?!\w)|\W*$))",
    re.IGNORECASE,
)

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""The characters of scripts without spaces: Thai, Lao, Burmese, Khmer, kana and Chinese characters."""


def chosen(text: str, choices: Sequence[str], language: str = "en") -> str | None:
    """Return the choice that `text` names, or None if it names no choice or several.

    The answer and the choices are compared after normalization in their language and without articles. If choices are
    then equal or empty, such as "C" and "C++" or "5" and "-5", words are compared as they are written. An answer can
    name a choice in three ways:

    - It begins with the choice's letter, as in "(B)", "B. rain" or "The answer is B"; A is the first choice.
    - It equals the choice.
    - It contains the choice, and no other one, as whole words ("female" does not contain "male"), or anywhere in a
      script without spaces. A choice does not count if it directly follows "not", or is part of a longer choice that
      the text contains.

    An answer whose letter and words name different choices names no choice.

    Args:
        text: The answer.
        choices: The choices.
        language: The language of the answer and the choices; see `language_code`.
    """
    if not text.strip():
        return None
    words = words_of(choices, language)
    plain, normal = words(text), {choice: words(choice) for choice in choices}
    letter = _by_letter(text, choices)
    named = next((choice for choice, theirs in normal.items() if theirs and theirs == plain), None)
    if named is None:
        named = _only_contained(plain, normal)
    if letter is not None and named is not None and letter != named:
        return None
    return letter if named is None else named


def words_of(choices: Sequence[str], language: str) -> Callable[[str], str]:
    """Return a function that maps a text to its words, separated by spaces, for the comparison with choices.

    The words are normalized, unless normalization would make choices equal or empty.
    """

    def normalised(text: str) -> str:
        return " ".join(_UNSPACED.sub(r" \g<0> ", " ".join(answer_words(text, language))).split())

    distinct = {choice.strip() for choice in choices}
    normal = [normalised(choice) for choice in distinct]
    empty = normalised("")
    if len(set(normal)) == len(normal) and not {"", empty} & set(normal):
        return normalised
    return _as_written


def _as_written(text: str) -> str:
    """Return the words of `text` in lower case, without punctuation at their ends."""
    plain = _UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-"))
    words = (word.strip(".,;:!?\"'()[]") for word in plain.split())
    return " ".join(word for word in words if word)


def class_metric(name: str, references: Sequence[str], answers: Sequence[str], counted: NDArray[np.bool_]) -> Metric:
    """Return the macro-F1 metric; see `macro_f1`.

    Args:
        name: The name of the metric.
        references: The correct class of each sample.
        answers: The class that was named for each sample, or "" if none was.
        counted: [N] mask of the samples that the metric includes.
    """
    labels = sorted({label for label, here in zip(references, counted, strict=True) if here})
    index = {label: i for i, label in enumerate(labels)}
    hits, given, wanted = (np.zeros((len(references), len(labels))) for _ in range(3))
    for row, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        if counted[row]:
            wanted[row, index[reference]] = 1
            if answer in index:
                given[row, index[answer]] = 1
            hits[row, index[reference]] = reference == answer
    return Metric(name, np.concatenate([hits, given, wanted], axis=1), macro_f1, counted=counted)


def macro_f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over classes of 2·hits / (answers + references).

    The mean excludes classes that a resample or subset contains neither as a reference nor as an answer. An answer that
    is not a class lowers only the recall. The result equals that of scikit-learn's
    `f1_score(average="macro", labels=<the references' classes>)`.

    Args:
        sums: [..., 3·C] the number of hits, answers and references of each of C classes.

    Returns:
        [...] macro-F1.
    """
    hits, given, wanted = np.split(sums, 3, axis=-1)
    total = given + wanted
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return f1.sum(-1) / np.maximum((total > 0).sum(-1), 1)


def confusion(references: Sequence[str], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return how often each reference class was answered with each class. Counts of zero are omitted.

    The answer "" stands for answers that name no choice.
    """
    rows: dict[str, Counter[str]] = {}
    for reference, answer in zip(references, answers, strict=True):
        rows.setdefault(reference, Counter())[answer] += 1
    return {reference: dict(sorted(rows[reference].items())) for reference in sorted(rows)}


def _by_letter(text: str, choices: Sequence[str]) -> str | None:
    match = _LETTER.match(text.strip())
    if match is None:
        return None
    index = ord((match[1] or match[2]).lower()) - ord("a")
    return choices[index] if index < len(choices) else None


def _only_contained(plain: str, normal: dict[str, str]) -> str | None:
    found = []
    for choice, words in normal.items():
        if words and f" {words} " in f" {plain} ".replace(f" not {words} ", " "):
            found.append(choice)
    longest = [c for c in found if not any(_is_part(normal[c], normal[other]) for other in found if other != c)]
    return longest[0] if len(longest) == 1 else None


def _is_part(words: str, longer: str) -> bool:
    return words != longer and f" {words} " in f" {longer} "
