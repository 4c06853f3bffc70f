"""The CIDEr-D metric: agreement with human captions, weighted towards rare n-grams."""

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
    """Return the CIDEr-D of each hypothesis, from 0 to 10 (Vedantam et al. 2015).

    The mean over all hypotheses is the score that coco-caption reports, except that the tokenizer differs. Here, words
    are the lower-case tokens of `tokenise` without punctuation marks, whereas coco-caption uses the Stanford tokenizer.
    The value is ten times the mean, over n from 1 to 4 and over references, of the cosine between the tf-idf vectors of
    the n-grams in the hypothesis and the reference. Counts are clipped, and a Gaussian factor penalizes a difference in
    length. The document frequency of an n-gram is the number of samples with the n-gram in any reference. A value
    therefore depends on all samples, and a single sample scores 0.

    Args:
        hypotheses: The model's caption of each sample.
        references: The human captions of each sample.
    """
    counts = [[ngrams(reference) for reference in group] for group in references]
    frequency = Counter(ngram for group in counts for ngram in set().union(*group))
    log_num = math.log(max(1, len(references)))
    idf = {ngram: log_num - math.log(count) for ngram, count in frequency.items()}
    scores = []
    for hypothesis, group in zip(hypotheses, counts, strict=True):
        ours = ngrams(hypothesis)
        total = sum(_similarity(ours, reference, idf, log_num) for reference in group)
        scores.append(10 * total / len(group))
    return scores


def ngrams(text: str) -> Ngrams:
    """Count the 1- to 4-grams of a caption."""
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
    # coco-caption uses the number of bigrams as the length.
    num_bigrams = [sum(count for ngram, count in counts.items() if len(ngram) == 2) for counts in (ours, theirs)]
    difference = num_bigrams[0] - num_bigrams[1]
    return math.exp(-(difference**2) / (2 * _SIGMA**2)) * sum(cosines) / _MAX_N
