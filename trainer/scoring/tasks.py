"""The tasks that samples belong to, and the metrics that score each of them.

A task is a value in the table `TASKS`. All other code asks a task for its properties and never compares its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from trainer.scoring.asr import asr_metrics
from trainer.scoring.cider import cider_d
from trainer.scoring.meteor import Meteor
from trainer.scoring.metric import Metric, mean
from trainer.scoring.questions import accepted_answers, answer_metrics, is_correct


@dataclass(frozen=True)
class Answers:
    """The answers of a model to samples of one task, which are the input of a metric function."""

    hypotheses: Sequence[str]
    """The model's answer to each sample."""
    metas: Sequence[Mapping[str, Any]]
    """The manifest fields of each sample, for example `answer`, `references`, `choices` and `language`."""
    meteor: Meteor | None = None
    """The METEOR metric; None if there is no WordNet."""

    def __post_init__(self) -> None:
        assert len(self.hypotheses) == len(self.metas), (len(self.hypotheses), len(self.metas))


MetricFunction = Callable[[Answers], list[Metric]]
"""A function that computes one metric, or several that share work. A metric that cannot be computed is omitted."""


@dataclass(frozen=True)
class Task:
    """The definition of a task."""

    name: str
    """The task's name in the field `task` of a manifest and in the names of scores."""
    title: str
    """The task in words, for people."""
    metrics: tuple[MetricFunction, ...]
    """The functions that compute the task's metrics. The first metric is the one that ranks single samples."""
    headlines: tuple[str, ...]
    """The names of the metrics that are shown where there is room for only a few, the main one first."""
    higher_is_better: bool = True
    """Whether a higher value of the main metric is better."""
    needs_audio: bool = True
    """Whether a sample must have audio. A sample that needs audio and has none is skipped."""
    is_transcription: bool = False
    """Whether an answer is the transcript of the audio.

    Such an answer can be a CTC target, clips can be joined, and long recordings can be transcribed in windows.
    """
    needs_wordnet: bool = False
    """Whether a metric needs WordNet; see `Answers.meteor`."""
    is_judged: bool = False
    """Whether `earshot judge` rates the answers unless its `--tasks` says otherwise."""


def transcription_metrics(answers: Answers) -> list[Metric]:
    """Return the metrics of `asr_metrics`."""
    languages = [meta.get("language") or "en" for meta in answers.metas]
    return asr_metrics([meta["answer"] for meta in answers.metas], answers.hypotheses, languages)


def question_metrics(answers: Answers) -> list[Metric]:
    """Return the metrics of `answer_metrics`."""
    return answer_metrics(answers.hypotheses, answers.metas)


def meteor_metric(answers: Answers) -> list[Metric]:
    """Return `meteor`, or nothing if there is no WordNet."""
    if answers.meteor is None:
        return []
    pairs = zip(answers.hypotheses, answers.metas, strict=True)
    return [mean("meteor", [answers.meteor(said, accepted_answers(meta)) for said, meta in pairs])]


def cider_metric(answers: Answers) -> list[Metric]:
    """Return `cider`, which is CIDEr-D."""
    return [mean("cider", cider_d(answers.hypotheses, [accepted_answers(meta) for meta in answers.metas]))]


def accuracy_metric(answers: Answers) -> list[Metric]:
    """Return `accuracy`, the share of answers that are correct; see `is_correct`."""
    return [mean("accuracy", [is_correct(h, meta) for h, meta in zip(answers.hypotheses, answers.metas, strict=True)])]


_CAPTION_METRICS = (meteor_metric, cider_metric, accuracy_metric)
_TASKS = (
    Task("asr", "transcripts", (transcription_metrics,), ("wer",), higher_is_better=False, is_transcription=True),
    Task("er", "emotion", (question_metrics,), ("accuracy",)),
    Task("aqa", "questions about sounds", (question_metrics,), ("accuracy",), is_judged=True),
    Task("sqa", "questions about speech", (question_metrics,), ("accuracy",), is_judged=True),
    Task("ac", "captions", _CAPTION_METRICS, ("meteor", "accuracy"), needs_wordnet=True, is_judged=True),
    Task("text", "text without audio", (question_metrics,), ("accuracy",), needs_audio=False),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
"""The known tasks by name. Plug-ins of the group `earshot.tasks` add theirs."""


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        UserError: If it is not known.
    """
    if name not in TASKS:
        raise UserError(f"task {name}: not one of {known_tasks()}; name the plug-in that adds it under `plugins`")
    return TASKS[name]


def known_tasks() -> str:
    """Return the names of the known tasks as text for a message."""
    return ", ".join(TASKS)


def task_names() -> tuple[str, ...]:
    """Return the names of the known tasks in alphabetical order, in which all ranks agree.

    Ranks exchange indices into it.
    """
    return tuple(sorted(TASKS))


def is_headline(task: str, metric: str) -> bool:
    """Return whether the metric of the task is shown where there is room for only a few."""
    return metric in find_task(task).headlines
