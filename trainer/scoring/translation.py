"""Metrics of translations: BLEU and chrF++, as sacrebleu computes them.

sacrebleu extracts the n-gram statistics of each sentence. The scores are functions of the sums of these statistics,
and are computed here for many resamples at once. In shapes, N is the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.scoring.languages import language_code
from trainer.scoring.metric import Metric

_BLEU_ORDER = 4
_CHRF_ORDER = 8
"""The number of n-gram orders: character n-grams up to order 6, and word n-grams up to order 2."""
_BY_CHARACTER = {"ja", "ko", "th", "lo", "my", "km", "bo"}
"""Languages whose translations are compared by characters. sacrebleu has tokenizers for two of them, but these
tokenizers need dictionaries that are not installed."""


def translation_metrics(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], languages: Sequence[str]
) -> list[Metric]:
    """Return `chrf` (chrF++) and `bleu` of translations, from 0 to 100; higher is better.

    chrF++ comes first, because BLEU says little about a single sentence. Both equal the corpus scores of sacrebleu
    (Post 2018): `BLEU(tokenize=…)` and `CHRF(word_order=2)`. The tokenizer of BLEU is `zh` for Chinese, `char` for
    other languages that are compared by characters (see `tokenizer_of`), and `13a` otherwise.

    Args:
        references: The correct translations of each sample, at least one.
        hypotheses: The model's translation of each sample.
        languages: The language that each sample is translated into, in any form that `language_code` knows.
    """
    from sacrebleu.metrics import BLEU, CHRF

    tokenizers = [tokenizer_of(language) for language in languages]
    makers = {name: BLEU(tokenize=name, force=True) for name in set(tokenizers)}
    chrf = CHRF(word_order=2)
    bleu_rows = np.zeros((len(hypotheses), 2 + 2 * _BLEU_ORDER))
    chrf_rows = np.zeros((len(hypotheses), 3 * _CHRF_ORDER))
    for i, (accepted, said) in enumerate(zip(references, hypotheses, strict=True)):
        streams = [[text] for text in accepted]
        (bleu_rows[i],) = makers[tokenizers[i]]._extract_corpus_statistics([said], streams)
        (chrf_rows[i],) = chrf._extract_corpus_statistics([said], streams)
    return [Metric("chrf", chrf_rows, chrf_score), Metric("bleu", bleu_rows, bleu_score)]


def tokenizer_of(language: str) -> str:
    """Return the name of sacrebleu's tokenizer for a language."""
    code = language_code(language)
    if code in ("zh", "yue"):
        return "zh"
    return "char" if code in _BY_CHARACTER else "13a"


def bleu_score(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return BLEU from 0 to 100 (Papineni et al. 2002), with the exponential smoothing of mteval-v13a.

    It matches `sacrebleu.metrics.BLEU.compute_bleu` with its default arguments.

    Args:
        sums: [..., 10] lengths of the hypotheses and of the closest references in tokens, followed by the number of
            correct n-grams and of all n-grams in the hypotheses, each for orders 1 to 4.

    Returns:
        [...] scores.
    """
    length, wanted = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2 : 2 + _BLEU_ORDER], sums[..., 2 + _BLEU_ORDER :]
    # The k-th order without a correct n-gram counts as 2^-k correct n-grams.
    missing = np.cumsum((correct == 0) & (total > 0), axis=-1)
    counted = np.where(correct > 0, correct, 0.5**missing)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(counted / total).mean(-1))
        brevity = np.exp(np.minimum(0.0, 1.0 - wanted / length))
        score = 100.0 * brevity * precision
    return np.where((correct > 0).any(-1) & (total > 0).all(-1), score, 0.0)


def chrf_score(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return chrF++ from 0 to 100 (Popović 2017).

    It matches `sacrebleu.metrics.CHRF(word_order=2)`. Precision and recall are averaged over the orders for which both
    hypotheses and references have n-grams, and recall counts twice as much as precision.

    Args:
        sums: [..., 24] for each order, the number of n-grams in the hypotheses, in the references, and in both.

    Returns:
        [...] scores.
    """
    counts = sums.reshape(*sums.shape[:-1], _CHRF_ORDER, 3)
    said, wanted, shared = np.moveaxis(counts, -1, 0)
    used = (said > 0) & (wanted > 0)
    orders = np.maximum(used.sum(-1), 1)
    precision = np.divide(shared, said, out=np.zeros_like(shared), where=used).sum(-1) / orders
    recall = np.divide(shared, wanted, out=np.zeros_like(shared), where=used).sum(-1) / orders
    weighted = 4.0 * precision + recall
    return np.divide(500.0 * precision * recall, weighted, out=np.zeros_like(weighted), where=weighted > 0)
