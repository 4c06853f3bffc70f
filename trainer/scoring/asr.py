"""Word and character error rates, computed by jiwer on normalized text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.scoring.languages import language_code
from trainer.scoring.metric import Metric
from trainer.scoring.text import normalise, normalise_audiobench, normalise_former

_MAX_LENGTH_RATIO = 2
"""A hypothesis is a hallucination if the ratio of its number of words to that of its reference exceeds this value."""


def asr_metrics(references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]) -> list[Metric]:
    """Return the metrics of speech recognition; lower is better for all of them.

    `wer` is (S + D + I) / (S + D + H), where S, D, I and H are the number of substitutions, deletions, insertions and
    hits in all samples. It may exceed 1. `substitutions`, `deletions` and `insertions` are rates per reference word,
    whose sum is `wer`. `cer` is the same ratio as `wer`, computed for the characters of the normalized text, including
    spaces. `hallucination_rate` is the share of hypotheses that are far longer than their reference. `wer_audiobench`
    is the WER of the English samples with AudioBench's normalization, which expands numbers differently. `wer_former`
    is the WER with the normalization of versions before 0.2, for comparisons with older runs.

    Args:
        references: The correct transcript of each sample.
        hypotheses: The model's transcript of each sample.
        languages: The language of each sample, in any form that `language_code` knows.
    """
    expected = [normalise(text, language) for text, language in zip(references, languages, strict=True)]
    said = [normalise(text, language) for text, language in zip(hypotheses, languages, strict=True)]
    words, characters = edits(expected, said), edits(expected, said, characters=True)
    num_words, num_said = words[:, :3].sum(1), words[:, [0, 1, 3]].sum(1)
    english = np.array([language_code(language) == "en" for language in languages], dtype=bool)
    audiobench = edits(
        [normalise_audiobench(text) if here else "" for text, here in zip(references, english, strict=True)],
        [normalise_audiobench(text) if here else "" for text, here in zip(hypotheses, english, strict=True)],
    )
    former = edits(
        [normalise_former(text, language) for text, language in zip(references, languages, strict=True)],
        [normalise_former(text, language) for text, language in zip(hypotheses, languages, strict=True)],
    )
    return [
        _rate("wer", words[:, 1:].sum(1), num_words),
        _rate("cer", characters[:, 1:].sum(1), characters[:, :3].sum(1)),
        _rate("substitutions", words[:, 1], num_words),
        _rate("deletions", words[:, 2], num_words),
        _rate("insertions", words[:, 3], num_words),
        _rate("hallucination_rate", num_said > _MAX_LENGTH_RATIO * num_words, np.ones_like(num_words)),
        _rate("wer_audiobench", audiobench[:, 1:].sum(1), audiobench[:, :3].sum(1), english),
        _rate("wer_former", former[:, 1:].sum(1), former[:, :3].sum(1)),
    ]


def alignment(reference: str, hypothesis: str, language: str = "en") -> list[tuple[str, str, str]]:
    """Align the normalized words of a reference and a hypothesis.

    Returns:
        The parts of the alignment in order, each as (`equal`, `substitute`, `delete` or `insert`, words of the
        reference, words of the hypothesis).
    """
    import jiwer

    expected, said = normalise(reference, language), normalise(hypothesis, language)
    ours, theirs = expected.split(), said.split()
    (chunks,) = jiwer.process_words([expected], [said]).alignments
    return [
        (c.type, " ".join(ours[c.ref_start_idx : c.ref_end_idx]), " ".join(theirs[c.hyp_start_idx : c.hyp_end_idx]))
        for c in chunks
    ]


def edits(references: Sequence[str], hypotheses: Sequence[str], characters: bool = False) -> NDArray[np.float64]:
    """Count the edits in the best alignment of each hypothesis with its reference.

    Returns:
        The numbers [N, 4] of hits, substitutions, deletions and insertions. Words are counted, or characters if
        `characters` is set.
    """
    import jiwer

    counts = np.zeros((len(references), 4))
    if not references:
        return counts
    columns = {"equal": 0, "substitute": 1, "delete": 2, "insert": 3}
    align = jiwer.process_characters if characters else jiwer.process_words
    for row, alignment in enumerate(align(list(references), list(hypotheses)).alignments):
        for chunk in alignment:
            length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            counts[row, columns[chunk.type]] += length
    return counts


def _rate(
    name: str, parts: NDArray[Any], wholes: NDArray[np.float64], counted: NDArray[np.bool_] | None = None
) -> Metric:
    statistics = np.stack([parts.astype(np.float64), wholes], axis=1)
    return Metric(name, statistics, lower_is_better=True, counted=counted)
