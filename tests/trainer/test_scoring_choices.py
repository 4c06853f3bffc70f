"""Tests of finding the chosen option in an answer, and of class scores, which are compared with scikit-learn."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainer.scoring.choices import chosen, class_metric
from trainer.scoring.metric import resampled_sums
from trainer.scoring.questions import answer_class, is_correct, token_f1

KIT = Path(os.environ.get("KIT_DIR", Path(__file__).parents[2] / ".." / "shared" / "kit"))
SOUNDS = ["an engine idling", "street music", "a dog barking", "a dog"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("street music", "street music"),
        ("Street Music.", "street music"),
        ("engine idling", "an engine idling"),
        ("B", "street music"),
        ("(b)", "street music"),
        ("B.", "street music"),
        ("B) street music", "street music"),
        ("B: the second one", "street music"),
        ("The answer is (B)", "street music"),
        ("The correct answer is B.", "street music"),
        ("Answer: B", "street music"),
        ("Option B", "street music"),
        ("I can hear some street music here", "street music"),
        ("It is not street music but an engine idling", "an engine idling"),
        ("a dog barking loudly", "a dog barking"),
        ("A dog", "a dog"),
        ("A man is talking", None),
        ("(A) street music", None),  # the letter and the words disagree
        ("street music or an engine idling", None),
        ("E", None),
        ("nobody", None),
        ("", None),
        ("[noise]", None),
    ],
)
def test_an_answer_names_a_choice(text: str, named: str | None) -> None:
    assert chosen(text, SOUNDS) == named


def test_choices_are_found_as_whole_words() -> None:
    assert chosen("the speaker is female", ["male", "female"]) == "female"
    assert chosen("male or female", ["male", "female"]) is None
    assert chosen("No, it does not.", ["yes", "no"]) == "no"


def test_is_correct() -> None:
    mcq = {"answer": "(B) street music", "choices": ["a siren", "street music"]}
    assert is_correct("street music", mcq) and is_correct("b", mcq)
    assert not is_correct("a siren", mcq)
    assert is_correct("7", {"answer": "seven"})
    assert not is_correct("seven one", {"answer": "seven"})
    caption = {"answer": "A dog barks.", "references": ["A dog barks.", "One can hear a dog."]}
    assert is_correct("one can hear a dog", caption)
    assert not is_correct("a dog", caption)


def test_token_f1() -> None:
    assert token_f1(["red", "bus"], ["red", "car"]) == pytest.approx(0.5)
    assert token_f1(["a", "a"], ["a"]) == pytest.approx(2 / 3)
    assert token_f1([], ["a"]) == 0.0 and token_f1([], []) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_that_of_scikit_learn(seed: int) -> None:
    source = random.Random(seed)
    labels = ["angry", "calm", "happy", "sad"][: 2 + seed % 3]
    references = [source.choice(labels) for _ in range(60)]
    answers = [source.choice([r, r, *labels, "", "surprised"]) for r in references]
    metric = class_metric("macro_f1", references, answers, np.ones(60, dtype=bool))
    ours = float(metric.value(metric.statistics.sum(0)))
    theirs = f1_score(references, answers, labels=sorted(set(references)), average="macro", zero_division=0)
    assert ours == pytest.approx(theirs, abs=1e-6)
    resampled = metric.value(resampled_sums(metric.statistics, 50))
    assert resampled.shape == (50,) and np.isfinite(resampled).all() and (resampled <= 1).all()


def test_every_answer_of_the_kit_is_among_its_choices() -> None:
    if not KIT.is_dir():
        pytest.skip(f"there are no real questions in {KIT}; set KIT_DIR")
    for name in ("aqa", "er"):
        rows = [json.loads(line) for line in (KIT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        closed = [row for row in rows if row.get("choices")]
        assert len(closed) > 500
        for row in closed[::7]:
            pair = answer_class(row["answer"], row)
            assert pair is not None and pair[0] == pair[1] != "", row["answer"]
