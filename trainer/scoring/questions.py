"""Answers to questions: with choices, by the choice that they name; open ones by their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.scoring.choices import chosen, class_metric
from trainer.scoring.metric import Metric, mean
from trainer.scoring.text import answer_words


def answer_metrics(hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """`accuracy` of all samples; `macro_f1` of those with choices; `exact_match` and `token_f1` of the others."""
    classes = [answer_class(hypothesis, meta) for hypothesis, meta in zip(hypotheses, metas, strict=True)]
    closed = np.array([pair is not None for pair in classes], dtype=bool)
    right = [is_correct(hypothesis, meta) for hypothesis, meta in zip(hypotheses, metas, strict=True)]
    overlap = [_best_token_f1(hypothesis, meta) for hypothesis, meta in zip(hypotheses, metas, strict=True)]
    references, answers = zip(*(pair or ("", "") for pair in classes), strict=True) if classes else ((), ())
    return [
        mean("accuracy", right),
        class_metric("macro_f1", references, answers, closed),
        mean("exact_match", right, ~closed),
        mean("token_f1", overlap, ~closed),
    ]


def answer_class(hypothesis: str, meta: Mapping[str, Any]) -> tuple[str, str] | None:
    """(right choice, named choice or ""), as normalised words; None for an open question.

    A question is open when it has no choices, or its answer is none of them.
    """
    choices = meta.get("choices") or ()
    right = chosen(meta["answer"], choices)
    if right is None:
        return None
    named = chosen(hypothesis, choices)
    return " ".join(answer_words(right)), "" if named is None else " ".join(answer_words(named))


def is_correct(hypothesis: str, meta: Mapping[str, Any]) -> bool:
    """Whether `hypothesis` answers the sample.

    With `choices`: it names the same choice as `answer` (see `chosen`). Otherwise, and where `answer` is none of them:
    its words equal those of `answer`, or of any of the `references` (captions), after normalisation and without
    articles: SQuAD's exact match with Whisper's normaliser.
    """
    pair = answer_class(hypothesis, meta)
    if pair is not None:
        return pair[0] == pair[1]
    language = meta.get("language") or "en"
    words = answer_words(hypothesis, language)
    return any(answer_words(reference, language) == words for reference in accepted_answers(meta))


def accepted_answers(meta: Mapping[str, Any]) -> Sequence[str]:
    """What the sample may be answered: its `references` (captions), else its `answer`."""
    return meta.get("references") or [meta["answer"]]


def token_f1(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words as bags (Rajpurkar et al. 2016, SQuAD); both empty: 1."""
    num_shared = sum((Counter(hypothesis) & Counter(reference)).values())
    total = len(hypothesis) + len(reference)
    return 2 * num_shared / total if total else 1.0


def _best_token_f1(hypothesis: str, meta: Mapping[str, Any]) -> float:
    language = meta.get("language") or "en"
    words = answer_words(hypothesis, language)
    return max(token_f1(words, answer_words(reference, language)) for reference in accepted_answers(meta))
