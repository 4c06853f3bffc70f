"""Tests that BLEU and chrF++ equal sacrebleu's values on all samples, on subsets and on bootstrap resamples."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from trainer.scoring.scores import score, task_metrics
from trainer.scoring.translation import tokenizer_of, translation_metrics

WORDS = "the cat, sat on a mat. Then it (rarely) went: home! 3.5 times, didn't it?".split()
CHINESE = "今天天气很好我们去公园吧他不知道3点开会"


def texts(alphabet: list[str], separator: str, num: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Return `num` hypotheses and two references for each. Some share words with them, and some are empty."""
    rng = random.Random(seed)
    hypotheses, references = [], []
    for i in range(num):
        words = [rng.choice(alphabet) for _ in range(rng.randint(1, 12))]
        said = [w for w in words if rng.random() > 0.2] + [rng.choice(alphabet) for _ in range(rng.randint(0, 2))]
        hypotheses.append("" if i % 17 == 3 else separator.join(said))
        references.append([separator.join(words), separator.join(words[::-1])])
    return hypotheses, references


@pytest.mark.parametrize(
    ("alphabet", "separator", "language", "tokenizer"),
    [(WORDS, " ", "de", "13a"), (list(CHINESE), "", "zh-CN", "zh"), (list(CHINESE), "", "Japanese", "char")],
)
def test_scores_equal_those_of_sacrebleu(alphabet: list[str], separator: str, language: str, tokenizer: str) -> None:
    assert tokenizer_of(language) == tokenizer
    for seed, num in enumerate((1, 2, 40, 200)):
        hypotheses, references = texts(alphabet, separator, num, seed)
        chrf, bleu = translation_metrics(references, hypotheses, [language] * num)
        streams = [list(stream) for stream in zip(*references, strict=True)]
        for metric, theirs in (
            (bleu, BLEU(tokenize=tokenizer, force=True).corpus_score(hypotheses, streams)),
            (chrf, CHRF(word_order=2).corpus_score(hypotheses, streams)),
        ):
            assert metric.value(metric.statistics.sum(0)) == pytest.approx(theirs.score, abs=1e-6), (metric.name, num)


def test_resamples_equal_sacrebleu_on_the_drawn_samples() -> None:
    hypotheses, references = texts(WORDS, " ", 12, 5)
    chrf, bleu = translation_metrics(references, hypotheses, ["en"] * 12)
    rng = np.random.default_rng(0)
    draws = [rng.integers(12, size=12) for _ in range(20)] + [np.array([3] * 12), np.array([3, 0])]
    values = {m.name: m.value(np.stack([m.statistics[d].sum(0) for d in draws])) for m in (chrf, bleu)}
    for i, draw in enumerate(draws):
        streams = [[references[j][k] for j in draw] for k in range(2)]
        said = [hypotheses[j] for j in draw]
        assert values["bleu"][i] == pytest.approx(BLEU(force=True).corpus_score(said, streams).score, abs=1e-6)
        assert values["chrf"][i] == pytest.approx(CHRF(word_order=2).corpus_score(said, streams).score, abs=1e-6)


def test_the_language_of_the_answer_chooses_the_tokenizer() -> None:
    metas = [{"answer": "今天天气很好", "language": "en", "target_language": "zh"}, {"answer": "today it is fine"}]
    chrf, bleu = task_metrics("st", ["今天天气很好", "today it is fine"], metas)
    assert bleu.statistics[0, 0] == 6  # characters
    assert bleu.statistics[1, 0] == 4  # words
    found = {s.metric: s for s in score("st", ["今天天气不好", "today it is fine"], metas)}
    assert 0 < found["bleu"].value < 100 and found["bleu"].low <= found["bleu"].value <= found["bleu"].high
