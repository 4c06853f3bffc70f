"""Metrics of the transcripts of meetings, in which several people speak.

A transcript has one turn per line, which begins with the speaker's name, as in `Ann: good morning`. A line without a
name continues the turn before it. Names are only labels, so a model may use any names for the speakers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from trainer.scoring.asr import edits
from trainer.scoring.metric import Metric
from trainer.scoring.text import normalise

_TURN = re.compile(r"^\s*([^\s:][^:\n]{0,39}):(?!\d)\s*(.*)$")
"""The pattern of a line with a speaker's name of at most 40 characters and the spoken text. `10:30` is not a name."""


def meeting_metrics(references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str]) -> list[Metric]:
    """Return the metrics of transcripts of meetings; lower is better.

    `cpwer` is the concatenated minimum-permutation word error rate (Watanabe et al. 2020, "CHiME-6 challenge",
    section 6.2). The turns of each speaker are concatenated, and the speakers in the reference and the hypothesis are
    paired so that the number of word errors is lowest. The words of a speaker without a partner count as deletions or
    insertions. The result equals meeteval's `cpwer` on normalized text. `speaker_count_error` is the mean absolute
    difference between the numbers of speakers in the reference and the hypothesis.

    Args:
        references: The correct transcript of each sample.
        hypotheses: The model's transcript of each sample.
        languages: The language of each sample, in any form that `language_code` knows.
    """
    errors = np.zeros((len(references), 2))
    speakers = np.ones((len(references), 2))
    for i, (reference, hypothesis, language) in enumerate(zip(references, hypotheses, languages, strict=True)):
        wanted, said = speaker_words(reference, language), speaker_words(hypothesis, language)
        errors[i] = cp_errors(wanted, said), sum(map(len, wanted))
        speakers[i, 0] = abs(len(wanted) - len(said))
    return [
        Metric("cpwer", errors, lower_is_better=True),
        Metric("speaker_count_error", speakers, lower_is_better=True),
    ]


def speaker_words(transcript: str, language: str = "en") -> list[list[str]]:
    """Return the normalized words of each speaker, in the order of their first turns, without silent speakers.

    Text before the first name is assigned to a separate speaker.
    """
    turns: dict[str, list[str]] = {}
    name = ""
    for line in transcript.splitlines():
        match = _TURN.match(line)
        if match:
            name = match[1].strip().casefold()
        turns.setdefault(name, []).append(match[2] if match else line)
    texts = (" ".join(lines) for lines in turns.values())
    return [normalise(text, language).split() for text in texts if re.search(r"\w", text)]


def cp_errors(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> int:
    """Return the lowest number of word errors over all pairings of reference and hypothesis speakers.

    The best pairing is found by the Hungarian method, since the errors of a pairing are a sum over pairs.
    """
    from scipy.optimize import linear_sum_assignment

    size = max(len(references), len(hypotheses))
    ours = [" ".join(words) for words in references] + [""] * (size - len(references))
    theirs = [" ".join(words) for words in hypotheses] + [""] * (size - len(hypotheses))
    pairs = list(itertools.product(ours, theirs))
    costs = edits([a for a, _ in pairs], [b for _, b in pairs])[:, 1:].sum(1).reshape(size, size)
    rows, columns = linear_sum_assignment(costs)
    return int(costs[rows, columns].sum())
