"""Every metric of every task, by subset, with its 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.scoring.asr import asr_metrics
from trainer.scoring.choices import confusion
from trainer.scoring.cider import cider_d
from trainer.scoring.meteor import Meteor
from trainer.scoring.metric import Metric, interval, mean, resampled_sums
from trainer.scoring.questions import accepted_answers, answer_class, answer_metrics, is_correct

ALL = "all"
"""Key of the score over all subsets of a task."""

HEADLINES = ("wer", "accuracy", "meteor")
"""The metrics that are shown where there is room for few."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task on one subset (`ALL`: on all of them)."""

    task: str
    subset: str
    metric: str
    value: float
    low: float
    high: float
    """Bounds of the 95 % bootstrap interval over samples."""
    num_samples: int
    """Those that the metric is about: `exact_match` leaves out questions with choices."""

    @property
    def name(self) -> str:
        """`asr/wer` over all subsets, `asr/digits/wer` of one."""
        return f"{self.task}/{self.metric}" if self.subset == ALL else f"{self.task}/{self.subset}/{self.metric}"


def task_metrics(
    task: str, hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]], meteor: Meteor | None = None
) -> list[Metric]:
    """The metrics of samples of one task, the one that says most of a single sample first.

    `metas` are their manifest fields (answer, subset, language, choices, references). asr: see `asr_metrics`. er, aqa,
    sqa: see `answer_metrics`. ac: `meteor` (if given), `cider` (CIDEr-D), `accuracy` (equal to a reference).
    """
    assert len(hypotheses) == len(metas), (len(hypotheses), len(metas))
    if task == "asr":
        languages = [meta.get("language") or "en" for meta in metas]
        return asr_metrics([meta["answer"] for meta in metas], hypotheses, languages)
    if task != "ac":
        return answer_metrics(hypotheses, metas)
    references = [accepted_answers(meta) for meta in metas]
    metrics = [
        mean("cider", cider_d(hypotheses, references)),
        mean("accuracy", [is_correct(h, meta) for h, meta in zip(hypotheses, metas, strict=True)]),
    ]
    if meteor is not None:
        values = [meteor(h, group) for h, group in zip(hypotheses, references, strict=True)]
        metrics.insert(0, mean("meteor", values))
    return metrics


def score(
    task: str, hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]], meteor: Meteor | None = None
) -> list[TaskScore]:
    """Scores of one task: every metric over all of its samples, then by subset. No samples, no scores.

    A metric is left out of a subset without samples that it is about. CIDEr's document frequencies are those of all
    samples, also in a subset's score.
    """
    return score_metrics(task, task_metrics(task, hypotheses, metas, meteor), metas)


def score_metrics(task: str, metrics: Sequence[Metric], metas: Sequence[Mapping[str, Any]]) -> list[TaskScore]:
    """Scores of `metrics` of the samples `metas`, over all and by subset."""
    return [
        _score(task, subset, metric, rows)
        for subset, members in by_subset(metas).items()
        for metric in metrics
        if len(rows := metric.rows(members))
    ]


def by_subset(metas: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Places of the samples of each subset; of all of them under `ALL`, which comes first."""
    rows: dict[str, list[int]] = {ALL: list(range(len(metas)))} if metas else {}
    for i, meta in enumerate(metas):
        rows.setdefault(subset_of(meta), []).append(i)
    return rows


def subset_of(meta: Mapping[str, Any]) -> str:
    """The sample's subset; where it has none, its source."""
    return meta.get("subset") or meta.get("source") or "default"


def confusions(hypotheses: Sequence[str], metas: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Confusion matrix of each subset that has questions with choices: see `confusion`."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for hypothesis, meta in zip(hypotheses, metas, strict=True):
        if (pair := answer_class(hypothesis, meta)) is not None:
            references, answers = found.setdefault(subset_of(meta), ([], []))
            references.append(pair[0])
            answers.append(pair[1])
    return {subset: confusion(*columns) for subset, columns in found.items()}


def score_values(scores: Iterable[TaskScore]) -> dict[str, float]:
    """Values by name: `asr/wer` over all subsets, `asr/digits/wer` of one."""
    return {s.name: s.value for s in scores}


def measure(metric: Metric, rows: NDArray[np.int64]) -> tuple[float, float, float]:
    """(value, bounds of its 95 % interval) over the samples `rows`, of which there is at least one."""
    statistics = metric.statistics[rows]
    return float(metric.value(statistics.sum(0))), *interval(metric.value(resampled_sums(statistics)))


def _score(task: str, subset: str, metric: Metric, rows: NDArray[np.int64]) -> TaskScore:
    return TaskScore(task, subset, metric.name, *measure(metric, rows), len(rows))
