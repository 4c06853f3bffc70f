"""Tests of error rates, compared with jiwer and with values computed by hand."""

from __future__ import annotations

import random

import jiwer
import pytest

from trainer.scoring.asr import asr_metrics
from trainer.scoring.metric import Metric
from trainer.scoring.text import normalise

WORDS = "one two seven don't the colour of music barks loudly 57 naïve".split()


def values(references: list[str], hypotheses: list[str], language: str = "en") -> dict[str, float]:
    metrics = asr_metrics(references, hypotheses, [language] * len(references))
    return {m.name: float(m.value(m.statistics.sum(0))) for m in metrics}


def random_texts(seed: int, num: int) -> tuple[list[str], list[str]]:
    """Return references, and hypotheses in which some words are dropped, duplicated or replaced."""
    source = random.Random(seed)
    references = [" ".join(source.choices(WORDS, k=source.randint(1, 12))) for _ in range(num)]
    hypotheses = []
    for text in references:
        words = [w for word in text.split() for w in source.choice([[word], [word], [word, word], [], ["noise"]])]
        hypotheses.append(" ".join(words))
    return references, hypotheses


def test_rates_equal_those_of_jiwer() -> None:
    references, hypotheses = random_texts(0, 200)
    found = values(references, hypotheses)
    plain, said = [normalise(t) for t in references], [normalise(t) for t in hypotheses]
    words = jiwer.process_words(plain, said)
    num_words = words.hits + words.substitutions + words.deletions
    assert found["wer"] == pytest.approx(words.wer, abs=1e-6)
    assert found["cer"] == pytest.approx(jiwer.cer(plain, said), abs=1e-6)
    for name in ("substitutions", "deletions", "insertions"):
        assert found[name] == pytest.approx(getattr(words, name) / num_words, abs=1e-6)
    assert found["substitutions"] + found["deletions"] + found["insertions"] == pytest.approx(found["wer"])


def test_errors_are_summed_before_dividing() -> None:
    # One error in one word and no error in four words give 1 / 5, not the mean of 1 and 0.
    assert values(["one", "turn the lights on"], ["two", "Turn the lights on!"])["wer"] == pytest.approx(1 / 5)
    assert values(["one two"], [""])["wer"] == 1.0
    assert values(["stop"], ["stop stop stop"])["wer"] == 2.0


def test_hallucinations_are_outputs_over_twice_the_reference() -> None:
    assert values(["stop", "go on", "go"], ["stop stop", "go on and on and", "no"])["hallucination_rate"] == 1 / 3


def test_audiobench_counts_english_samples_only() -> None:
    metrics = asr_metrics(["five seven", "pięć"], ["five eight", "sześć"], ["en", "pl"])
    audiobench = next(m for m in metrics if m.name == "wer_audiobench")
    rows = audiobench.rows([0, 1])
    assert rows.tolist() == [0] and audiobench.value(audiobench.statistics[rows].sum(0)) == 1.0
    assert _value(metrics[0]) == pytest.approx(2 / 3)


def test_no_samples() -> None:
    assert all(m.statistics.shape == (0, 2) for m in asr_metrics([], [], []))


def _value(metric: Metric) -> float:
    return float(metric.value(metric.statistics.sum(0)))
