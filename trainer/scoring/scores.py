"""Scores of all metrics of all tasks, by subset, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.scoring.choices import confusion
from trainer.scoring.fields import ALL
from trainer.scoring.meteor import Meteor
from trainer.scoring.metric import Metric, interval, resampled_sums
from trainer.scoring.questions import answer_class
from trainer.scoring.tasks import Answers, find_task

NO_SUBSET = "default"
"""The subset of samples that name neither a subset nor a source."""


@dataclass(frozen=True)
class TaskScore:
    """The value of one metric of one task, on one subset or on all of them (`ALL`)."""

    task: str
    subset: str
    metric: str
    value: float
    low: float
    high: float
    """The bounds of the 95 % bootstrap interval over samples."""
    num_samples: int
    """The number of samples that the metric applies to; for example, `exact_match` applies only to open questions."""

    @property
    def name(self) -> str:
        """The name of the score, such as `asr/wer` over all subsets or `asr/digits/wer` for one."""
        return f"{self.task}/{self.metric}" if self.subset == ALL else f"{self.task}/{self.subset}/{self.metric}"


def task_metrics(
    task: str, hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]], meteor: Meteor | None = None
) -> list[Metric]:
    """Return the metrics of one task, beginning with the metric that is most informative for a single sample.

    Args:
        task: The name of the task.
        hypotheses: The model's answer to each sample.
        metas: The manifest fields of each sample; answer, subset, language, choices and references are used.
        meteor: The METEOR metric; None skips it.

    Raises:
        UserError: If the task is unknown.
    """
    answers = Answers(hypotheses, metas, meteor)
    return [metric for function in find_task(task).metrics for metric in function(answers)]


def score(
    task: str, hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]], meteor: Meteor | None = None
) -> list[TaskScore]:
    """Score one task: every metric over all samples, then over each subset.

    A metric that applies to no sample of a subset has no score for the subset. An empty list of samples has no scores.
    CIDEr's document frequencies always come from all samples. For the arguments, see `task_metrics`.
    """
    return score_metrics(task, task_metrics(task, hypotheses, metas, meteor), metas)


def score_metrics(task: str, metrics: Sequence[Metric], metas: Sequence[Mapping[str, Any]]) -> list[TaskScore]:
    """Return the scores of `metrics` over all samples and by subset; `metas` are the samples' manifest fields."""
    return [
        _score(task, subset, metric, rows)
        for subset, members in by_subset(metas).items()
        for metric in metrics
        if len(rows := metric.rows(members))
    ]


def by_subset(metas: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the indices of the samples by subset, beginning with `ALL`, the indices of all samples."""
    rows: dict[str, list[int]] = {ALL: list(range(len(metas)))} if metas else {}
    for i, meta in enumerate(metas):
        rows.setdefault(subset_of(meta), []).append(i)
    return rows


def subset_of(meta: Mapping[str, Any]) -> str:
    """Return the sample's subset, or its source if it has no subset."""
    return meta.get("subset") or meta.get("source") or NO_SUBSET


def confusions(hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Return the confusion matrix (see `confusion`) of each subset that has questions with choices."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for hypothesis, meta in zip(hypotheses, metas, strict=True):
        if (pair := answer_class(hypothesis, meta)) is not None:
            references, answers = found.setdefault(subset_of(meta), ([], []))
            references.append(pair[0])
            answers.append(pair[1])
    return {subset: confusion(*columns) for subset, columns in found.items()}


def score_values(scores: Iterable[TaskScore]) -> dict[str, float]:
    """Return the values of scores by their names, such as `asr/wer` or `asr/digits/wer`."""
    return {s.name: s.value for s in scores}


def measure(metric: Metric, rows: NDArray[np.int64]) -> tuple[float, float, float]:
    """Return a metric's value and the bounds of its 95 % interval over the samples `rows`, which must not be empty."""
    statistics = metric.statistics[rows]
    return float(metric.value(statistics.sum(0))), *interval(metric.value(resampled_sums(statistics)))


def _score(task: str, subset: str, metric: Metric, rows: NDArray[np.int64]) -> TaskScore:
    return TaskScore(task, subset, metric.name, *measure(metric, rows), len(rows))
