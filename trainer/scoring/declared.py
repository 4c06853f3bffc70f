"""Tasks that a recipe declares, with metrics that the recipe chooses by name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from model.errors import UserError
from trainer.scoring.tasks import METRICS, TASKS, Task

VARIABLE = "EARSHOT_TASKS"
"""The environment variable that passes the declared tasks to child processes, as JSON."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task that a recipe declares for its own data, in the section `tasks`."""

    name: str
    """The name of the task in the field `task` of a manifest, and in the names of scores."""
    title: str = ""
    """A readable name of the task for reports; empty for `name`."""
    metrics: tuple[str, ...] = ("answers",)
    """The metrics that score the answers: transcription, answers, accuracy, token_f1, meteor, cider, translation,
    commands, meeting. See docs/evaluation.md."""
    headline: str | None = None
    """The main metric, which summaries show and `checkpoint.best_is` is checked against; null for the main metric of
    the first entry of `metrics`."""
    needs_audio: bool = True
    """Whether samples of this task without audio are skipped."""
    is_transcription: bool = False
    """Whether the answers are transcripts of the audio. See docs/extending.md."""
    is_judged: bool = False
    """Whether `earshot judge` rates the answers if its option `--tasks` is not given."""

    def __post_init__(self) -> None:
        where = f"tasks.{self.name}"
        if not self.name.isidentifier() or not self.name.isascii():
            raise UserError(f"tasks: name = {self.name!r}: use letters, digits and '_', and begin with a letter")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise UserError(f"{where}.metrics = {list(self.metrics)}: choose at least one of {', '.join(METRICS)}")
        found = [METRICS[name] for name in self.metrics]
        names = [name for one in found for name in (one.main, *one.others)]
        if self.headline is not None and self.headline not in names:
            raise UserError(f"{where}.headline = {self.headline}: its metrics compute {', '.join(names)}")
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise UserError(f"{where}.metrics = {list(self.metrics)}: several of them compute {', '.join(doubled)}")

    @property
    def task(self) -> Task:
        """The task that is declared."""
        found = [METRICS[name] for name in self.metrics]
        headline = self.headline or found[0].main
        chosen = next(one for one in found if headline in (one.main, *one.others))
        return Task(
            self.name,
            self.title or self.name,
            tuple(one.function for one in found),
            (headline,),
            higher_is_better=chosen.higher_is_better,
            needs_audio=self.needs_audio,
            is_transcription=self.is_transcription,
            needs_wordnet=any(one.needs_wordnet for one in found),
            is_judged=self.is_judged,
            is_declared=True,
        )


def declare_tasks(configs: Sequence[TaskConfig]) -> None:
    """Add tasks to the table of tasks. A task replaces an earlier declared task of the same name.

    Args:
        configs: The section `tasks` of a recipe.

    Raises:
        UserError: If a name is given twice, or belongs to a task of this project or of a plug-in.
    """
    names = [config.name for config in configs]
    for config in configs:
        if names.count(config.name) > 1 or (config.name in TASKS and not TASKS[config.name].is_declared):
            raise UserError(f"tasks: there is another task called {config.name}; choose another name")
    for config in configs:
        TASKS[config.name] = config.task
    if configs:
        others = [tree for tree in json.loads(os.environ.get(VARIABLE, "[]")) if tree["name"] not in names]
        os.environ[VARIABLE] = json.dumps([*others, *map(asdict, configs)])


def inherit_tasks() -> None:
    """Declare the tasks that the parent process has declared."""
    trees = json.loads(os.environ.get(VARIABLE, "[]"))
    declare_tasks([TaskConfig(**{**tree, "metrics": tuple(tree["metrics"])}) for tree in trees])
