"""Metrics of answers to questions.

If a question has choices, the choice that the answer names is compared. Otherwise the words of the answer are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.scoring.choices import chosen, class_metric, words_of
from trainer.scoring.metric import Metric, mean
from trainer.scoring.text import answer_words


def answer_metrics(hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics of question answering.

    `accuracy` applies to all samples, `macro_f1` to questions with choices, and `exact_match` and `token_f1` to open
    questions.
    """
    classes = [answer_class(hypothesis, meta) for hypothesis, meta in zip(hypotheses, metas, strict=True)]
    closed = np.array([pair is not None for pair in classes], dtype=bool)
    right = [is_correct(hypothesis, meta) for hypothesis, meta in zip(hypotheses, metas, strict=True)]
    overlap = [best_token_f1(hypothesis, meta) for hypothesis, meta in zip(hypotheses, metas, strict=True)]
    references, answers = zip(*(pair or ("", "") for pair in classes), strict=True) if classes else ((), ())
    return [
        mean("accuracy", right),
        class_metric("macro_f1", references, answers, closed),
        mean("exact_match", right, ~closed),
        mean("token_f1", overlap, ~closed),
    ]


def answer_class(hypothesis: str, meta: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the correct choice and the named choice (or "") as normalized words, or None for an open question.

    Choices that normalization would make equal are returned as they are written. A question is open if it has no
    choices, or if its answer is not one of them.
    """
    choices, language = meta.get("choices") or (), meta.get("language") or "en"
    right = chosen(meta["answer"], choices, language)
    if right is None:
        return None
    named, words = chosen(hypothesis, choices, language), words_of(choices, language)
    return words(right), "" if named is None else words(named)


def is_correct(hypothesis: str, meta: Mapping[str, Any]) -> bool:
    """Return whether `hypothesis` is a correct answer to the sample.

    If the question has choices, the hypothesis must name the same choice as `answer` (see `chosen`). If the question is
    open, the words of the hypothesis must equal those of `answer`, or of one of the `references` of a caption. Words
    are compared after normalization and without articles, as in SQuAD's exact match, but with Whisper's normalizer.
    """
    pair = answer_class(hypothesis, meta)
    if pair is not None:
        return pair[0] == pair[1]
    language = meta.get("language") or "en"
    words = answer_words(hypothesis, language)
    return any(answer_words(reference, language) == words for reference in accepted_answers(meta))


def accepted_answers(meta: Mapping[str, Any]) -> Sequence[str]:
    """Return the accepted answers to the sample, which are its `references` if it has any (captions), else `answer`."""
    return meta.get("references") or [meta["answer"]]


def token_f1(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Return the harmonic mean of the precision and recall of words, without regard to order (SQuAD).

    It is 1 if both are empty (Rajpurkar et al. 2016).
    """
    num_shared = sum((Counter(hypothesis) & Counter(reference)).values())
    total = len(hypothesis) + len(reference)
    return 2 * num_shared / total if total else 1.0


def best_token_f1(hypothesis: str, meta: Mapping[str, Any]) -> float:
    """Return the highest `token_f1` of a hypothesis with any accepted answer."""
    language = meta.get("language") or "en"
    words = answer_words(hypothesis, language)
    return max(token_f1(words, answer_words(reference, language)) for reference in accepted_answers(meta))
