"""What guessing scores: always the most frequent training answer to the same question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.scoring.meteor import Meteor
from trainer.scoring.scores import TaskScore, score, subset_of
from trainer.scoring.text import normalise


def majority_baseline(
    train_metas: Sequence[Mapping[str, Any]], test_metas: Sequence[Mapping[str, Any]], meteor: Meteor | None = None
) -> list[TaskScore]:
    """What always giving the most frequent training answer to the same question scores on `test_metas`, by task.

    The question of a sample is its subset and instruction text. Where the training set never asks it: its subset and
    question type (`qtype`, `slot`); else its subset; else its task. Answers are counted after normalisation and, where
    there are no choices, given as they were first written; of equally frequent ones the alphabetically first is given.
    Where the sample has choices, only training answers that are among them count (so the last resort never guesses
    outside). What is given is scored like any hypothesis. For asr: the error rate of the most frequent text.
    """
    answers: dict[tuple[str, ...], Counter[str]] = {}
    written: dict[str, str] = {}
    for meta in train_metas:
        plain = normalise(meta["answer"], meta.get("language") or "en")
        written.setdefault(plain, meta["answer"])
        for group in _question_groups(meta):
            answers.setdefault(group, Counter())[plain] += 1
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for meta in test_metas:
        by_task.setdefault(meta["task"], []).append(meta)
    return [
        found
        for task, metas in by_task.items()
        for found in score(task, [_guess(answers, written, meta) for meta in metas], metas, meteor)
    ]


def _guess(answers: Mapping[tuple[str, ...], Counter[str]], written: Mapping[str, str], meta: Mapping[str, Any]) -> str:
    plain = _majority(answers, meta)
    # As written, the choice may carry the letter that it had in another question.
    return plain if meta.get("choices") else written.get(plain, "")


def _majority(answers: Mapping[tuple[str, ...], Counter[str]], meta: Mapping[str, Any]) -> str:
    legal = {normalise(choice) for choice in meta.get("choices") or ()}
    for group in _question_groups(meta):
        counted = {answer: num for answer, num in answers.get(group, {}).items() if not legal or answer in legal}
        if counted:
            return min(counted.items(), key=lambda item: (-item[1], item[0]))[0]
    return ""


def _question_groups(meta: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Keys of the groups a sample belongs to, narrowest first."""
    task, subset = meta["task"], subset_of(meta)
    kind = str(meta.get("qtype") or meta.get("slot") or "")
    return [
        ("instruction", task, subset, meta["instruction"]),
        ("kind", task, subset, kind),
        ("subset", task, subset),
        ("task", task),
    ]
