"""CIDEr-D: agreement with human captions on n-grams that not every caption has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from trainer.scoring.text import tokenise

_PUNCTUATION = frozenset("'' ' `` ` ( ) { } [ ] . ? ! , : - -- ... ;".split())
_MAX_N = 4
_SIGMA = 6.0

Ngrams = Counter[tuple[str, ...]]


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each hypothesis (Vedantam et al. 2015), 0 to 10; as coco-caption computes it, its mean is the score.

    Cosine of tf-idf vectors of n-grams, n = 1 to 4, against each reference, with clipped counts and a Gaussian penalty
    on the difference in length. An n-gram's document frequency is the number of samples with it in a reference, so
    the value depends on the whole set (a set of one sample scores 0). Words are lower-case tokens of `tokenise`
    without punctuation marks, where coco-caption runs the Stanford tokenizer.
    """
    cooked = [[ngrams(reference) for reference in group] for group in references]
    frequency = Counter(ngram for group in cooked for ngram in set().union(*group))
    log_num = math.log(max(1, len(references)))
    idf = {ngram: log_num - math.log(count) for ngram, count in frequency.items()}
    scores = []
    for hypothesis, group in zip(hypotheses, cooked, strict=True):
        ours = ngrams(hypothesis)
        total = sum(_similarity(ours, reference, idf, log_num) for reference in group)
        scores.append(10 * total / len(group))
    return scores


def ngrams(text: str) -> Ngrams:
    """Counts of the 1- to 4-grams of a caption."""
    words = [token for token in tokenise(text.lower()) if token not in _PUNCTUATION]
    return Counter(tuple(words[i : i + n]) for n in range(1, _MAX_N + 1) for i in range(len(words) - n + 1))


def _similarity(ours: Ngrams, theirs: Ngrams, idf: dict[tuple[str, ...], float], unseen_idf: float) -> float:
    cosines = []
    for n in range(1, _MAX_N + 1):
        mine, other = (
            {ngram: count * idf.get(ngram, unseen_idf) for ngram, count in counts.items() if len(ngram) == n}
            for counts in (ours, theirs)
        )
        norms = math.hypot(*mine.values()) * math.hypot(*other.values())
        shared = sum(min(weight, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, weight in mine.items())
        cosines.append(shared / norms if norms else 0.0)
    # coco-caption takes the number of bigrams for the length.
    num_bigrams = [sum(count for ngram, count in counts.items() if len(ngram) == 2) for counts in (ours, theirs)]
    difference = num_bigrams[0] - num_bigrams[1]
    return math.exp(-(difference**2) / (2 * _SIGMA**2)) * sum(cosines) / _MAX_N
