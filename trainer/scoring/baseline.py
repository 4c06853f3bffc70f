"""The majority baseline, which always gives the most frequent training answer to a question, and its scores."""

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
    """Score the strategy that always gives the most frequent training answer to the same question.

    A question is identified by its subset and instruction. If it does not occur in the training data, the strategy uses
    all answers to the same type of question (`qtype`, `slot`) in the subset. If there are none, it uses all answers in
    the subset and, as a last resort, all answers of the task. Answers are counted after normalization. Among equally
    frequent answers, the first in alphabetical order is given. If the sample has choices, only training answers that
    are among the choices are counted. Otherwise, the answer is given as it was first written. For a transcription task,
    the score is the error rate of the most frequent transcript.

    Args:
        train_metas: The manifest fields of the training samples.
        test_metas: The manifest fields of the samples to score.
        meteor: The METEOR metric; None skips it.

    Returns:
        The scores of all tasks and subsets.
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
    # The written form of a choice may contain the letter that it had in another question.
    return plain if meta.get("choices") else written.get(plain, "")


def _majority(answers: Mapping[tuple[str, ...], Counter[str]], meta: Mapping[str, Any]) -> str:
    language = meta.get("language") or "en"
    legal = {normalise(choice, language) for choice in meta.get("choices") or ()}
    for group in _question_groups(meta):
        counted = {answer: num for answer, num in answers.get(group, {}).items() if not legal or answer in legal}
        if counted:
            return min(counted.items(), key=lambda item: (-item[1], item[0]))[0]
    return ""


def _question_groups(meta: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the keys of the groups of questions that a sample belongs to, from the narrowest to the widest."""
    task, subset = meta["task"], subset_of(meta)
    kind = str(meta.get("qtype") or meta.get("slot") or "")
    return [
        ("instruction", task, subset, meta["instruction"]),
        ("kind", task, subset, kind),
        ("subset", task, subset),
        ("task", task),
    ]
