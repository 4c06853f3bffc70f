"""Tests that cpWER equals meeteval's value, and that speakers may have any names."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from trainer.scoring.meetings import cp_errors, meeting_metrics, speaker_words

EXPECTED = Path(__file__).with_name("cpwer_meeteval.json")
"""The file with the word errors that meeteval 0.4.3 counts for `meetings()`. To write it again, install meeteval and
run `python -m tests.trainer.test_meetings`."""


def meetings() -> list[tuple[list[str], list[str]]]:
    """Return 60 random meetings, each as the words of its speakers and those of the speakers in its transcript."""
    rng, found = random.Random(0), []
    for _ in range(60):
        spoken = [[rng.choice("abcdefg") for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 5))]
        said = [[w for w in own if rng.random() > 0.3] + [rng.choice("abcdefg")] for own in spoken]
        if rng.random() < 0.3:
            said.pop()
        if rng.random() < 0.3:
            said.append(["x", "y"])
        rng.shuffle(said)
        found.append(([" ".join(own) for own in spoken], [" ".join(own) for own in said]))
    return found


def errors_of_meeteval() -> list[int]:
    from meeteval.wer.wer.cp import cp_word_error_rate

    return [int(cp_word_error_rate(spoken, said).errors) for spoken, said in meetings()]


def test_errors_equal_those_of_meeteval() -> None:
    wanted = json.loads(EXPECTED.read_text())
    found = [cp_errors([t.split() for t in spoken], [t.split() for t in said]) for spoken, said in meetings()]
    assert found == wanted and len(set(wanted)) > 5


def test_the_recorded_errors_are_those_of_the_installed_meeteval() -> None:
    pytest.importorskip("meeteval", reason="meeteval, which takes a minute to compile, is not installed")
    assert json.loads(EXPECTED.read_text()) == errors_of_meeteval()


def test_the_best_pairing_is_found() -> None:
    for spoken, said in meetings()[:20]:
        ours, theirs = [t.split() for t in spoken], [t.split() for t in said]
        size = max(len(ours), len(theirs))
        padded = theirs + [[]] * (size - len(theirs))
        full = ours + [[]] * (size - len(ours))
        best = min(
            sum(cp_errors([a], [b]) for a, b in zip(full, order, strict=True))
            for order in itertools.permutations(padded)
        )
        assert cp_errors(ours, theirs) == best


def test_names_are_labels_and_lines_without_one_continue_a_turn() -> None:
    reference = "Ann: Good morning, everyone.\nBob: Hello!\nAnn: We meet\nat 10:30 today.\n"
    renamed = "S2: hello\nS1: good morning everyone\nS1: we meet at 10:30 today"
    assert [len(words) for words in speaker_words(reference)] == [11, 1]
    cpwer, count = meeting_metrics([reference, reference], [renamed, "S1: good morning everyone"], ["en"] * 2)
    assert cpwer.statistics.tolist() == [[0, 12], [9, 12]]
    assert count.statistics[:, 0].tolist() == [0, 1]
    assert cpwer.lower_is_better


def test_texts_without_words() -> None:
    cpwer, _ = meeting_metrics(["Ann: hi", "Ann: hi"], ["", "Ann: …\nBob: hi"], ["en"] * 2)
    assert cpwer.statistics.tolist() == [[1, 1], [0, 1]]
    assert np.isfinite(cpwer.value(cpwer.statistics.sum(0)))


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(errors_of_meeteval()) + "\n")
