"""The parts of a checkpoint that a run needs in order to resume, other than the state of the engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from model.config import LoraConfig
from model.errors import UserError
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.origin import stored_adapters
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.data.state import State, merge_states
from trainer.parallel.groups import Groups
from trainer.parallel.values import all_gather_values
from trainer.run.lifecycle import StopRequest, deadline
from trainer.telemetry.hook import Hook
from trainer.telemetry.trackers.table import read_ids, restore_ids
from trainer.training.replicas import check_replicas
from trainer.training.step import Step


class Saver:
    """The part of a run that saves and restores its state, and reports whether each save succeeded.

    The checkpoint manager stores the engines. This class adds everything else that a resumed run needs: the position in
    the data, the state of the spike guard, the summary, and the run ids that the trackers assigned.

    Args:
        recipe: The resolved recipe; it is stored in every checkpoint.
        step: The training step, which holds the engines and the spike guard.
        groups: This rank's process groups.
        checkpoints: The run's checkpoints.
        run_dir: The run's folder.
        described: The description of the model that an export needs; it is stored in every checkpoint.
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
        """Facts about the run that are not in any step or evaluation report.

        Checkpoints contain them, so a resumed run keeps them. They become part of `summary.json`.
        """

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the run's newest undamaged checkpoint.

        Collective: every rank of the world must call it.

        If the run has no checkpoint yet and `checkpoint.start_from` is set, the weights that it names are loaded.

        Returns:
            The number of steps already done, and the contents of the checkpoint other than the state of the engines.
            For a run without a checkpoint, these are 0 and an empty mapping.

        Raises:
            UserError: If all checkpoints are damaged, if the checkpoint belongs to a different model, if its adapters
                were trained with different scaling factors, or if the weights of `checkpoint.start_from` cannot be
                used.
        """
        latest = self._checkpoints.latest()
        if latest is None:
            if self._recipe.checkpoint.start_from is not None:
                self._checkpoints.start(self._recipe.checkpoint.start_from, self._step, self._recipe.lora)
            return 0, {}
        extra = self._checkpoints.load(latest, self._step)
        check_adapters(extra.get("recipe", ""), self._recipe.lora)
        self.summary.update(extra["summary"])
        self._step.guard.restore(extra.get("guard"))
        self._step.stages.updated = extra["step"]
        if self._groups.rank == 0:
            restore_ids(self._run_dir, extra)
        self._saved_step = extra["step"]
        return extra["step"], extra

    def save(self, done: int, data_state: State) -> None:
        """Start to save the state after `done` steps, unless it was already saved.

        Collective: every rank of the world must call it.

        Args:
            done: The number of steps completed.
            data_state: The state of this rank's sample stream after those steps.

        Raises:
            FencedRunError: If a newer attempt of this run has started.
            CorruptionError: If the LLM's replicas hold different weights. Nothing is saved.
        """
        if done <= self._saved_step:
            return
        if self._recipe.train.compare_replicas_every_steps:
            check_replicas(done, self._step.llm, self._groups, self._hooks.on_event)
        states = all_gather_values(data_state, self._groups.world)
        extra = {
            "step": done,
            "stage": self._step.stages.at(done - 1)[1].name,
            "data": merge_states(states),
            "recipe": dump(self._recipe),
            "summary": self.summary,
            "guard": self._step.guard.state,
            "trackers": read_ids(self._run_dir),
        }
        self._checkpoints.save(done, self._step, {**extra, **self._described})
        self._saved_step = done

    def set_deadline(self, stop: StopRequest, done: int) -> None:
        """Emit the event `save_failed` if `close` does not return within `train.stop_grace_sec` seconds of the signal.

        Args:
            stop: This rank's request to stop. If only other ranks received a signal, the time is measured from this
                call.
            done: The number of steps completed.
        """
        grace_sec = self._recipe.train.stop_grace_sec

        def late() -> None:
            newest = max(self._checkpoints.steps(), default=None)
            why = f"not saved within train.stop_grace_sec = {grace_sec:g}"
            self._hooks.on_event("save_failed", done, {"why": why, "newest_checkpoint": newest})

        since_sec = time.monotonic() if stop.signal is None else stop.time_sec
        self._deadline.enter_context(deadline(grace_sec, since_sec, late))

    def report_outcomes(self, step: int) -> None:
        """Report to the hooks which saves have finished or failed since the last call.

        Args:
            step: The most recently started step.
        """
        for url in self._checkpoints.finished():
            self._hooks.on_save(url)
        for outcome in self._checkpoints.failed():
            self._hooks.on_event("save_failed", step, {"why": outcome.failure, "checkpoint": outcome.url})

    def close(self, step: int) -> None:
        """Wait for the last save and report whether it succeeded.

        Collective: every rank of the world must call it.

        Args:
            step: The most recently started step.

        Raises:
            UserError: If the last save failed and its retry failed as well.
        """
        try:
            self._checkpoints.close()
        finally:
            self._deadline.close()
            self.report_outcomes(step)


def check_adapters(stored: str, lora: Sequence[LoraConfig]) -> None:
    """Check that a resumed run scales its low-rank adapters by the same factors as the run in the checkpoint.

    The factors are not stored in tensors, so loading a checkpoint cannot detect a difference.

    Args:
        stored: The recipe in the checkpoint, as YAML; empty if the checkpoint has none.
        lora: The section `lora` of the resumed run.

    Raises:
        UserError: If the patterns or the factors differ.
    """
    if not stored:
        return
    before = stored_adapters(stored)
    if [(part.pattern, part.scale) for part in before] != [(part.pattern, part.scale) for part in lora]:
        raise UserError(
            f"lora = {_entries(lora)}: this run has trained its adapters with {_entries(before)}; use these values, "
            "or export the run and start from the export with new adapters (checkpoint.start_from)"
        )


def _entries(lora: Sequence[LoraConfig]) -> str:
    parts = (f"{{pattern: {part.pattern}, rank: {part.rank}, alpha: {part.alpha:g}}}" for part in lora)
    return f"[{', '.join(parts)}]"
