"""The parts of a checkpoint that a run needs to resume, besides the engines."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.manager import CheckpointManager
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.data.state import State, merge_states
from trainer.parallel.groups import Groups
from trainer.run.lifecycle import StopRequest, deadline
from trainer.telemetry.hook import Hook
from trainer.telemetry.trackers.table import read_ids, restore_ids
from trainer.training.step import Step


class Saver:
    """The writer and reader of a run's state, which also reports how each save ended.

    The checkpoint manager stores the engines. This class adds everything else a resumed run needs: the position in the
    data, the spike guard's state, the summary and the ids under which trackers know the run.

    Args:
        recipe: The resolved recipe, which every checkpoint contains.
        step: The engines and the spike guard.
        groups: This rank's process groups.
        checkpoints: The run's checkpoints.
        run_dir: The run's folder.
        described: What an export must know about the model; every checkpoint contains it.
        hooks: The hooks to which finished and failed saves are reported.
    """

    def __init__(
        self,
        recipe: Recipe,
        step: Step,
        groups: Groups,
        checkpoints: CheckpointManager,
        run_dir: Path,
        described: dict[str, Any],
        hooks: Hook,
    ) -> None:
        self._recipe, self._step, self._groups, self._checkpoints = recipe, step, groups, checkpoints
        self._described, self._hooks = described, hooks
        self._run_dir = run_dir
        self._saved_step = 0
        self._deadline = ExitStack()
        self.summary: dict[str, Any] = {}
        """Facts about the run that no report contains. They survive a resume and become part of `summary.json`."""

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the run's newest checkpoint.

        Collective: every rank of the world must call it.

        Returns:
            The number of steps already done, and what the checkpoint contains besides the engines: 0 and an empty
            mapping for a new run.

        Raises:
            UserError: If the checkpoint is damaged or belongs to another model.
        """
        latest = self._checkpoints.latest()
        if latest is None:
            if self._recipe.checkpoint.start_from is not None:
                self._checkpoints.start(self._recipe.checkpoint.start_from, self._step)
            return 0, {}
        extra = self._checkpoints.load(latest, self._step)
        self.summary.update(extra["summary"])
        self._step.guard.restore(extra.get("guard"))
        if self._groups.rank == 0:
            restore_ids(self._run_dir, extra)
        self._saved_step = extra["step"]
        return extra["step"], extra

    def save(self, done: int, data_state: State) -> None:
        """Begin to save the state after `done` steps, unless that state is already saved.

        Collective: every rank of the world must call it.

        Args:
            done: The number of steps done.
            data_state: The state of this rank's data after them.

        Raises:
            UserError: If a newer attempt of this run has begun.
        """
        if done <= self._saved_step:
            return
        states: list[Any] = [None] * self._groups.topology.world
        dist.all_gather_object(states, data_state, group=self._groups.world)
        extra = {
            "step": done,
            "data": merge_states(states),
            "recipe": dump(self._recipe),
            "summary": self.summary,
            "guard": self._step.guard.state,
            "trackers": read_ids(self._run_dir),
        }
        self._checkpoints.save(done, self._step, {**extra, **self._described})
        self._saved_step = done

    def set_deadline(self, stop: StopRequest, done: int) -> None:
        """Emit `save_failed` if `close` has not returned within `train.stop_grace_sec` of the signal.

        Args:
            stop: The request to stop. If another rank received the signal, the time counts from now.
            done: The number of steps done.
        """
        grace_sec = self._recipe.train.stop_grace_sec

        def late() -> None:
            newest = max(self._checkpoints.steps(), default=None)
            why = f"not saved within train.stop_grace_sec = {grace_sec:g}"
            self._hooks.on_event("save_failed", done, {"why": why, "newest_checkpoint": newest})

        since_sec = time.monotonic() if stop.signal is None else stop.time_sec
        self._deadline.enter_context(deadline(grace_sec, since_sec, late))

    def report_outcomes(self, step: int) -> None:
        """Report to the hooks which saves finished or failed since the last call.

        Args:
            step: The step that was begun last.
        """
        for url in self._checkpoints.finished():
            self._hooks.on_save(url)
        for outcome in self._checkpoints.failed():
            self._hooks.on_event("save_failed", step, {"why": outcome.failure, "checkpoint": outcome.url})

    def close(self, step: int) -> None:
        """Wait for the last save and report how it ended.

        Collective: every rank of the world must call it.

        Args:
            step: The step that was begun last.

        Raises:
            UserError: If the last save failed twice.
        """
        try:
            self._checkpoints.close()
        finally:
            self._deadline.close()
            self.report_outcomes(step)
