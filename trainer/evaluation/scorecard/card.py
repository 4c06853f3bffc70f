"""The scorecard of an evaluation, which is a tree of plain values for tables, the page and plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from model.lengths import SAMPLE_RATE
from trainer.evaluation.predictions import Prediction, by_task, columns
from trainer.evaluation.scorecard.clips import to_flac
from trainer.scoring.asr import alignment
from trainer.scoring.fields import ALL
from trainer.scoring.meteor import Meteor
from trainer.scoring.metric import Metric
from trainer.scoring.scores import confusions, measure, subset_of, task_metrics
from trainer.scoring.tasks import find_task
from trainer.telemetry.expert_load import BANDS, BANDS_SEC, UNNAMED

MAX_LISTED = 3000
"""The largest number of samples that the page lists. It is divided equally among tasks, each with its worst samples."""
DIMENSIONS: Mapping[str, Callable[[Prediction], str]] = {
    "subset": lambda p: subset_of(p.meta),
    "language": lambda p: str(p.meta.get("language") or UNNAMED),
    "source": lambda p: str(p.meta.get("source") or UNNAMED),
    "duration": lambda p: BANDS[sum(p.audio_sec >= end for end in BANDS_SEC)],
}
"""The properties by which the samples of a task are grouped, and the function that returns a sample's group."""

ReadClips = Callable[[Sequence[str]], Iterable[tuple[str, Sequence[Any]]]]
"""A function that takes the keys of samples, and yields the key and the clips (`[T]` at 16 kHz) of each readable
sample."""


@dataclass(frozen=True)
class GroupScore:
    """The value of one metric on one group of a task's samples."""

    task: str
    dimension: str
    """The key in `DIMENSIONS` of the property by which the samples are grouped; empty if the group is `ALL`."""
    group: str
    """The group's name; `ALL` for all samples of the task."""
    metric: str
    value: float
    low: float
    """The lower bound of the 95 % bootstrap interval over samples."""
    high: float
    """The upper bound of the interval."""
    num_samples: int
    lower_is_better: bool


def make_card(
    title: str,
    about: Mapping[str, str],
    predictions: Sequence[Prediction],
    skipped: Sequence[str],
    meteor: Meteor | None,
    read_clips: ReadClips,
    audio_bytes: int,
) -> dict[str, Any]:
    """Return the scorecard as a tree of plain values.

    Args:
        title: The title of the page.
        about: Facts about the evaluation that the page shows, by name.
        predictions: The predictions of all tasks.
        skipped: The reason for each sample without a prediction.
        meteor: The METEOR scorer; None to score captions without METEOR.
        read_clips: A function that reads the audio of samples, for the page.
        audio_bytes: The largest amount of encoded audio that the page may contain.
    """
    scores: list[GroupScore] = []
    samples: list[dict[str, Any]] = []
    headlines: dict[str, str] = {}
    tables: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    tasks = dict(sorted(by_task(predictions).items()))
    for task, found in tasks.items():
        metrics = task_metrics(task, *columns(found), meteor)
        headlines[task] = metrics[0].name
        scores += group_scores(task, metrics, found)
        if matrices := confusions(*columns(found)):
            tables[task] = matrices
        samples += _listed(task, metrics[0], found, max(1, MAX_LISTED // len(tasks)))
    return {
        "title": title,
        "about": dict(about),
        "num_samples": len(predictions),
        "num_skipped": dict(sorted(Counter(skipped).items())),
        "num_unfinished": sum(not p.finished for p in predictions),
        "num_windowed": sum(p.num_windows > 1 for p in predictions),
        "audio_sec": round(sum(p.audio_sec for p in predictions), 3),
        "headlines": headlines,
        "titles": {task: find_task(task).title for task in headlines},
        "scores": [asdict(s) for s in scores],
        "confusions": tables,
        "samples": samples,
        "audio": _audio(samples, read_clips, audio_bytes),
    }


def group_scores(task: str, metrics: Sequence[Metric], predictions: Sequence[Prediction]) -> list[GroupScore]:
    """Score every metric on all samples of a task, then on every group of every dimension.

    Groups to which a metric does not apply are omitted.

    Args:
        task: The task.
        metrics: The task's metrics.
        predictions: The predictions that the metrics were computed from.
    """
    groups: dict[tuple[str, str], list[int]] = {("", ALL): list(range(len(predictions)))}
    for dimension, name_of in DIMENSIONS.items():
        for i, prediction in enumerate(predictions):
            groups.setdefault((dimension, name_of(prediction)), []).append(i)
    order = list(DIMENSIONS)

    def sort_key(group: tuple[str, str]) -> tuple[int, int, str]:
        dimension, name = group
        band = BANDS.index(name) if dimension == "duration" else 0
        return (order.index(dimension) if dimension else -1, band, name)

    return [
        GroupScore(task, *group, metric.name, *measure(metric, rows), len(rows), metric.lower_is_better)
        for group in sorted(groups, key=sort_key)
        for metric in metrics
        if len(rows := metric.rows(groups[group]))
    ]


def _listed(task: str, metric: Metric, predictions: Sequence[Prediction], num: int) -> list[dict[str, Any]]:
    """Return the `num` worst samples by `metric`, worst first.

    Among samples with equal values, those with more errors come first, and then those with longer audio.
    """
    values = metric.value(metric.statistics)
    badness = values if metric.lower_is_better else -values
    amount = metric.statistics[:, 0] if metric.lower_is_better else np.zeros(len(values))
    order = sorted(
        range(len(predictions)), key=lambda i: (-badness[i], -amount[i], -predictions[i].audio_sec, predictions[i].key)
    )
    return [_sample(task, predictions[i], float(values[i]), metric.lower_is_better) for i in order[:num]]


def _sample(task: str, p: Prediction, value: float, lower_is_better: bool) -> dict[str, Any]:
    language = p.meta.get("language") or "en"
    references = p.meta.get("references") or [p.meta["answer"]]
    return {
        "key": p.key,
        "task": task,
        **{dimension: name_of(p) for dimension, name_of in DIMENSIONS.items()},
        "seconds": round(p.audio_sec, 3),
        "value": round(value, 6),
        "perfect": value == 0 if lower_is_better else value == 1,
        "instruction": p.meta.get("instruction") or "",
        "choices": p.meta.get("choices") or [],
        "reference": p.meta["answer"],
        "others": [text for text in references if text != p.meta["answer"]],
        "hypothesis": p.hypothesis,
        "difference": alignment(p.meta["answer"], p.hypothesis, language),
        "finished": p.finished,
        "windows": p.num_windows,
    }


def _audio(samples: Sequence[dict[str, Any]], read_clips: ReadClips, num_bytes: int) -> dict[str, list[str]]:
    """Return the clips of the worst samples as base64-encoded FLAC, up to `num_bytes`, taking tasks in turn."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if sample["seconds"] > 0:
            by_name.setdefault(sample["task"], []).append(sample)
    most = max(map(len, by_name.values()), default=0)
    turns = [own[i] for i in range(most) for own in by_name.values() if i < len(own)]
    # FLAC needs at least about an eighth of the raw 16-bit samples, which limits the number of clips worth reading.
    wanted, expected = [], 0.0
    for sample in turns:
        expected += sample["seconds"] * SAMPLE_RATE * 2 / 8
        if expected > num_bytes:
            break
        wanted.append(sample["key"])
    found: dict[str, list[str]] = {}
    used = 0
    for key, clips in read_clips(wanted):
        encoded = [to_flac(clip) for clip in clips]
        used += sum(map(len, encoded))
        if used > num_bytes:
            break
        found[key] = encoded
    return found
