"""The interface of hooks, which watch a training run.

Only rank 0 has hooks. Hooks receive values but not the engines, so that a hook cannot call a collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.telemetry.metrics import EvalReport, StepReport


@dataclass(frozen=True)
class RunState:
    """The properties of a run that are known before its first step."""

    name: str
    run_dir: Path
    """The run's folder, `<train.run_dir>/<name>`."""
    num_steps: int
    """The number of steps of the whole run."""
    num_ranks: int
    start_step: int = 0
    """The number of completed steps. It is 0, or the step of the checkpoint that the run resumes from."""
    stage_ends: tuple[tuple[str, int], ...] = ()
    """The name and the last step of every stage (section `stages`); empty if the run has no stages."""


class Hook:
    """An observer of a training run.

    The methods of this class do nothing. A subclass overrides the methods that it needs. An exception in a method ends
    the run.
    """

    def on_start(self, state: RunState) -> None:
        """Prepare for the first step."""

    def on_step(self, report: StepReport) -> None:
        """Handle the report of a step."""

    def on_eval(self, report: EvalReport) -> None:
        """Handle the report of an evaluation of one split."""

    def on_save(self, url: str) -> None:
        """Handle a checkpoint that has just become complete."""

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        """Handle an event.

        Args:
            event: One of `trainer.telemetry.events.EVENTS`.
            step: The most recently started step.
            fields: The additional fields of the event.
        """

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Handle the end of the run, after its last step, a signal or an `EndError`.

        Args:
            summary: Facts about the run that are not in any step or evaluation report, for example `wer_before` and
                `peak_memory_bytes` (one mapping per rank).
        """


class HookList(Hook):
    """Several hooks that are called in the order in which they were added."""

    def __init__(self) -> None:
        self._hooks: list[Hook] = []

    def extend(self, hooks: Sequence[Hook]) -> None:
        """Add `hooks`."""
        self._hooks.extend(hooks)

    def on_start(self, state: RunState) -> None:
        for hook in self._hooks:
            hook.on_start(state)

    def on_step(self, report: StepReport) -> None:
        for hook in self._hooks:
            hook.on_step(report)

    def on_eval(self, report: EvalReport) -> None:
        for hook in self._hooks:
            hook.on_eval(report)

    def on_save(self, url: str) -> None:
        for hook in self._hooks:
            hook.on_save(url)

    def on_event(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        for hook in self._hooks:
            hook.on_event(event, step, fields)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for hook in self._hooks:
            hook.on_end(summary)


HOOKS: dict[str, type[Hook]] = {}
"""The hook classes that plug-ins in the group `earshot.hooks` add. A run creates one instance of each class, without
arguments."""
