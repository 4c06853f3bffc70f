"""The comparison of two evaluations by a judge model, for `earshot judge --against`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.conversation import Message, plain_messages
from model.errors import UserError
from tools.compare import common_keys
from trainer.data.metadata import conversation_of
from trainer.evaluation.predictions import Prediction
from trainer.scoring.judge import Pair, Verdict
from trainer.scoring.metric import mean
from trainer.scoring.scores import TaskScore, score_metrics
from trainer.scoring.table import format_table, score_table

_SAME_FIELDS = ("instruction", "messages", "target_language")


@dataclass(frozen=True)
class Comparison:
    """The answers of two evaluations to one sample, and the judge's verdicts on them."""

    prediction: Prediction
    """The answer that is judged."""
    other: Prediction
    """The answer with which the judged answer is compared."""
    forward: Verdict | None
    """The verdict with the judged answer first; None if the answers are equal, so that the judge was not asked."""
    backward: Verdict | None
    """The verdict with the judged answer second; None if the answers are equal."""

    @property
    def preference(self) -> float | None:
        """The mean verdict over both orders, from 0 (the other answer is better) to 1 (the judged answer is better).

        It is 0.5 if the answers are equal, and None after a failure.
        """
        if self.forward is None or self.backward is None:
            return 0.5
        if self.forward.rating is None or self.backward.rating is None:
            return None
        return (self.forward.rating + 1 - self.backward.rating) / 2

    @property
    def depends_on_order(self) -> bool:
        """True if the two verdicts differ, so that the order of the answers affects the judge's choice."""
        if self.forward is None or self.backward is None or self.preference is None:
            return False
        return self.forward.rating != 1 - (self.backward.rating or 0.0)

    @property
    def failure(self) -> str:
        """The kind of failure; empty if there was no failure."""
        return next((v.failure for v in (self.forward, self.backward) if v is not None and v.failure), "")


def history(meta: dict[str, Any]) -> tuple[Message, ...]:
    """Return the messages before the last question of a prediction; empty if its sample is not a conversation."""
    return tuple(plain_messages(conversation_of(meta)[:-2]))


def align(
    path: Path, predictions: Sequence[Prediction], other_path: Path, others: Sequence[Prediction]
) -> list[tuple[Prediction, Prediction]]:
    """Return the predictions of both evaluations for the samples that they have in common.

    Raises:
        UserError: If there are no such samples, or a key belongs to different samples.
    """
    keys = common_keys((path, other_path), (predictions, others))
    ours, theirs = ({p.key: p for p in found} for found in (predictions, others))
    for key in keys:
        for field in _SAME_FIELDS:
            if ours[key].meta.get(field) != theirs[key].meta.get(field):
                raise UserError(
                    f"{other_path}: {field} of '{key}' is not that of {path}; judge evaluations of one dataset"
                )
    return [(ours[key], theirs[key]) for key in keys]


def questions(pairs: Sequence[tuple[Prediction, Prediction]]) -> list[Pair]:
    """Return the questions for the judge, which are both orders of each pair of different answers, in sequence."""
    found = []
    for ours, other in pairs:
        if not _are_equal(ours, other):
            pair = Pair(
                ours.meta["instruction"],
                ours.meta["answer"],
                ours.hypothesis,
                other.hypothesis,
                history(ours.meta),
            )
            found += [pair, pair.swapped]
    return found


def comparisons(pairs: Sequence[tuple[Prediction, Prediction]], verdicts: Sequence[Verdict]) -> list[Comparison]:
    """Return the comparisons of `pairs`, given the verdicts on `questions(pairs)`."""
    left = iter(verdicts)
    return [
        Comparison(ours, other, None, None)
        if _are_equal(ours, other)
        else Comparison(ours, other, next(left), next(left))
        for ours, other in pairs
    ]


def preferences(found: Sequence[Comparison]) -> list[TaskScore]:
    """Return the mean preference for the judged answers by task and subset, over the comparisons without a failure."""
    return mean_scores("preference", [c.prediction for c in found], [c.preference for c in found])


def mean_scores(metric: str, predictions: Sequence[Prediction], values: Sequence[float | None]) -> list[TaskScore]:
    """Return the mean of the judge's values by task and subset. Values that are None are ignored."""
    rated: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for p, value in zip(predictions, values, strict=True):
        if value is not None:
            rated.setdefault(p.meta["task"], []).append((p.meta, value))
    return [
        s
        for task, rows in rated.items()
        for s in score_metrics(task, [mean(metric, [value for _, value in rows])], [meta for meta, _ in rows])
    ]


def write(path: Path, model: str, files: tuple[Path, Path], found: Sequence[Comparison]) -> None:
    """Write one JSON line per comparison."""
    with path.open("w", encoding="utf-8") as file:
        for c in found:
            line = {
                "key": c.prediction.key,
                "judge": model,
                "task": c.prediction.meta["task"],
                "instruction": c.prediction.meta["instruction"],
                "reference": c.prediction.meta["answer"],
                "files": list(map(str, files)),
                "answers": [c.prediction.hypothesis, c.other.hypothesis],
                "preference": c.preference,
                "failure": c.failure,
                "explanations": [v.explanation for v in (c.forward, c.backward) if v is not None],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def outcomes(found: Sequence[Comparison]) -> dict[str, int]:
    """Return how many comparisons were won, tied or lost, had equal answers, or depended on the order."""
    values = [c.preference for c in found if c.preference is not None]
    return {
        "num_won": sum(v > 0.5 for v in values),
        "num_tied": sum(v == 0.5 for v in values),
        "num_lost": sum(v < 0.5 for v in values),
        "num_equal": sum(c.forward is None for c in found),
        "num_order_dependent": sum(c.depends_on_order for c in found),
    }


def asked(found: Sequence[Comparison]) -> list[Verdict]:
    """Return all verdicts of the judge."""
    return [v for c in found for v in (c.forward, c.backward) if v is not None]


def as_text(scores: Sequence[TaskScore], found: Sequence[Comparison]) -> str:
    """Return the scores and outcomes as lines for the terminal."""
    n = outcomes(found)
    lines = [format_table(score_table(scores))] if scores else ["no pair of answers could be compared"]
    lines.append(
        f"{n['num_won']} better, {n['num_tied']} tied, {n['num_lost']} worse; {n['num_equal']} pairs of answers are "
        f"equal; in {n['num_order_dependent']} pairs, the judge's choice depends on the order of the answers"
    )
    return "\n".join(lines)


def _are_equal(ours: Prediction, other: Prediction) -> bool:
    return ours.hypothesis.strip() == other.hypothesis.strip()
