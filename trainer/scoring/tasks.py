"""The tasks of samples, and the metrics that score each task.

A task is a value in the table `TASKS`. All other code uses the properties of a task and never compares its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from trainer.scoring.asr import asr_metrics
from trainer.scoring.cider import cider_d
from trainer.scoring.intents import intent_metrics
from trainer.scoring.meetings import meeting_metrics
from trainer.scoring.meteor import Meteor
from trainer.scoring.metric import Metric, mean
from trainer.scoring.questions import accepted_answers, answer_metrics, best_token_f1, is_correct
from trainer.scoring.translation import translation_metrics


@dataclass(frozen=True)
class Answers:
    """A model's answers to samples of one task, which are the input of a metric function."""

    hypotheses: Sequence[str]
    """The model's answer to each sample."""
    metas: Sequence[Mapping[str, Any]]
    """The manifest fields of each sample, for example `answer`, `references`, `choices` and `language`."""
    meteor: Meteor | None = None
    """The METEOR metric; None if there is no WordNet."""

    def __post_init__(self) -> None:
        assert len(self.hypotheses) == len(self.metas), (len(self.hypotheses), len(self.metas))


MetricFunction = Callable[[Answers], list[Metric]]
"""A function that computes one metric, or several metrics that share work. A metric that cannot be computed is omitted.
"""


@dataclass(frozen=True)
class Task:
    """The definition of a task."""

    name: str
    """The task's name in the field `task` of a manifest and in the names of scores."""
    title: str
    """A readable description of the task."""
    metrics: tuple[MetricFunction, ...]
    """The functions that compute the task's metrics. The first metric is used to rank single samples."""
    headlines: tuple[str, ...]
    """The names of the metrics that are shown where there is room for only a few. The main metric comes first."""
    higher_is_better: bool = True
    """Whether a higher value of the main metric is better."""
    needs_audio: bool = True
    """Whether a sample must have audio. A sample that needs audio and has none is skipped."""
    is_transcription: bool = False
    """Whether an answer is the transcript of the audio.

    If so, answers can be CTC targets, clips can be joined, and long recordings can be transcribed in windows.
    """
    needs_wordnet: bool = False
    """Whether a metric needs WordNet; see `Answers.meteor`."""
    is_judged: bool = False
    """Whether `earshot judge` rates the answers if its option `--tasks` is not given."""
    is_declared: bool = False
    """Whether a recipe declares the task; see `trainer.scoring.declared`."""


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


def translations(answers: Answers) -> list[Metric]:
    """Return the metrics of `translation_metrics`. Answers are in `target_language` if set, else in `language`."""
    languages = [meta.get("target_language") or meta.get("language") or "en" for meta in answers.metas]
    return translation_metrics([accepted_answers(meta) for meta in answers.metas], answers.hypotheses, languages)


def commands(answers: Answers) -> list[Metric]:
    """Return the metrics of `intent_metrics`."""
    return intent_metrics(answers.hypotheses, answers.metas)


def meetings(answers: Answers) -> list[Metric]:
    """Return the metrics of `meeting_metrics`."""
    languages = [meta.get("language") or "en" for meta in answers.metas]
    return meeting_metrics([meta["answer"] for meta in answers.metas], answers.hypotheses, languages)


def token_f1_metric(answers: Answers) -> list[Metric]:
    """Return `token_f1`, the mean overlap of the words of an answer with those of the best reference."""
    pairs = zip(answers.hypotheses, answers.metas, strict=True)
    return [mean("token_f1", [best_token_f1(hypothesis, meta) for hypothesis, meta in pairs])]


@dataclass(frozen=True)
class NamedMetrics:
    """Metrics that a recipe can choose by name for a task that it declares."""

    function: MetricFunction
    main: str
    """The main metric, which is the headline unless the recipe names another metric."""
    others: tuple[str, ...] = ()
    """The names of the other metrics that the function computes."""
    higher_is_better: bool = True
    """Whether higher values of these metrics are better."""
    needs_wordnet: bool = False


METRICS: dict[str, NamedMetrics] = {
    "transcription": NamedMetrics(transcription_metrics, "wer", ("cer", "hallucination_rate"), False),
    "answers": NamedMetrics(question_metrics, "accuracy", ("macro_f1", "exact_match", "token_f1")),
    "accuracy": NamedMetrics(accuracy_metric, "accuracy"),
    "token_f1": NamedMetrics(token_f1_metric, "token_f1"),
    "meteor": NamedMetrics(meteor_metric, "meteor", needs_wordnet=True),
    "cider": NamedMetrics(cider_metric, "cider"),
    "translation": NamedMetrics(translations, "bleu", ("chrf",)),
    "commands": NamedMetrics(commands, "accuracy", ("slot_f1", "exact_match")),
    "meeting": NamedMetrics(meetings, "cpwer", ("speaker_count_error",), False),
}
"""The metrics that the section `tasks` of a recipe can choose, by name."""

_CAPTION_METRICS = (meteor_metric, cider_metric, accuracy_metric)
_TASKS = (
    Task("asr", "transcripts", (transcription_metrics,), ("wer",), higher_is_better=False, is_transcription=True),
    Task("er", "emotion", (question_metrics,), ("accuracy",)),
    Task("aqa", "questions about sounds", (question_metrics,), ("accuracy",), is_judged=True),
    Task("sqa", "questions about speech", (question_metrics,), ("accuracy",), is_judged=True),
    Task("ac", "captions", _CAPTION_METRICS, ("meteor", "accuracy"), needs_wordnet=True, is_judged=True),
    Task("text", "text without audio", (question_metrics,), ("accuracy",), needs_audio=False),
    Task("st", "speech translation", (translations,), ("bleu", "chrf")),
    Task("lid", "language identification", (question_metrics,), ("accuracy",)),
    Task("kws", "keywords", (question_metrics,), ("accuracy",)),
    Task("intent", "spoken commands", (commands,), ("accuracy", "slot_f1")),
    Task("gr", "gender", (question_metrics,), ("accuracy",)),
    Task("ar", "accent", (question_metrics,), ("accuracy",)),
    Task("mcq", "multiple choice", (question_metrics,), ("accuracy",)),
    Task("chat", "conversations", (token_f1_metric,), ("token_f1",), is_judged=True),
    Task("meeting", "meetings", (meetings,), ("cpwer",), higher_is_better=False),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
"""The known tasks by name. Plug-ins of the group `earshot.tasks` and recipes (`declare_tasks`) add tasks to it."""


def find_task(name: str) -> Task:
    """Return the task with the given name.

    Raises:
        UserError: If there is no such task.
    """
    if name not in TASKS:
        raise UserError(
            f"task {name}: not one of {known_tasks()}; declare it in the recipe's section `tasks`, or name the plug-in "
            "that adds it under `plugins`"
        )
    return TASKS[name]


def known_tasks() -> str:
    """Return the names of the known tasks as text for a message."""
    return ", ".join(TASKS)


def task_names() -> tuple[str, ...]:
    """Return the names of the known tasks in alphabetical order, which is the same on all ranks.

    Ranks exchange indices into this tuple.
    """
    return tuple(sorted(TASKS))


def is_headline(task: str, metric: str) -> bool:
    """Return whether the metric of the task is shown where there is room for only a few metrics."""
    return metric in find_task(task).headlines
