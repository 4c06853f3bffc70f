"""Fetch, step, report, save, evaluate: the training run as one straight line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from model.errors import UserError
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.data.loader import Loader, SkipLog
from trainer.data.prepare import PreparedData
from trainer.data.state import State, merge_states
from trainer.parallel.groups import Groups
from trainer.run.failure import Position
from trainer.run.lifecycle import Agreement, StopRequest, agree, deadline, next_together
from trainer.run.watchdog import Watchdog
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.metrics import StepReport, flatten_eval, is_logged, peak_memory_bytes
from trainer.telemetry.trace import Trace
from trainer.telemetry.tracker import ID_NAME
from trainer.telemetry.waiting import WaitSampler
from trainer.training.evaluate import Evaluation, Evaluator
from trainer.training.hooks import Hook, RunState
from trainer.training.rank_work import Work
from trainer.training.spikes import answer_spike
from trainer.training.step import Step


class EndError(UserError):
    """The data or the loss ended the run; its state is saved."""


class Loop:
    """One run from its first step, or from its last checkpoint, to its end.

    Args:
        recipe: the resolved recipe.
        step, groups, prepared, evaluator, checkpoints: the parts; see `trainer.build`.
        hooks: of this rank (only rank 0 has any).
        run_dir: the run's folder.
        described: what a checkpoint says of the model, so that it can be exported by itself.
        watchdog: is told of every progress.
        position: is kept up to date with where this rank is.
    """

    def __init__(
        self,
        recipe: Recipe,
        step: Step,
        groups: Groups,
        prepared: PreparedData,
        evaluator: Evaluator,
        checkpoints: CheckpointManager,
        run_dir: Path,
        described: dict[str, Any],
        watchdog: Watchdog,
        position: Position,
    ) -> None:
        self.recipe, self.step, self.groups, self.prepared = recipe, step, groups, prepared
        self.evaluator, self.checkpoints, self.run_dir = evaluator, checkpoints, run_dir
        self.described, self.watchdog, self.position = described, watchdog, position
        self.work = Work(recipe.telemetry, WaitSampler(step.timer), groups, self.emit)
        self._alarm = ExitStack()
        self.hooks: Sequence[Hook] = ()
        self.last_evaluation: Evaluation | None = None
        """Of `eval.final_split`; rank 0 only."""
        self.last_step = recipe.train.steps
        """Earlier where `eval.stop_after` ends the run."""
        self.summary: dict[str, Any] = {}
        """What only this run knows; the end of the run hands it to the hooks."""

    def restore(self) -> tuple[int, dict[str, Any]]:
        """(steps already done, what the checkpoint holds besides the engines): (0, {}) for a new run."""
        latest = self.checkpoints.latest()
        if latest is None:
            if self.recipe.checkpoint.start_from is not None:
                self.checkpoints.start(self.recipe.checkpoint.start_from, self.step)
            return 0, {}
        extra = self.checkpoints.load(latest, self.step)
        self.summary.update(extra["summary"])
        self.step.guard.restore(extra.get("guard"))
        id_file = self.run_dir / ID_NAME
        if self.groups.rank == 0 and extra["mlflow_run"] is not None and not id_file.exists():
            write_atomically(id_file, extra["mlflow_run"] + "\n")
        return extra["step"], extra

    def run(self, hooks: Sequence[Hook], start: int, data_state: dict[str, Any] | None) -> bool:
        """Train from step `start`; returns False when a signal ended the run before its last step."""
        recipe, self.hooks = self.recipe, hooks
        state = RunState(recipe.name, self.run_dir, recipe.train.steps, self.groups.topology.world, start)
        for hook in hooks:
            hook.on_start(state)
        with StopRequest().listening() as stop:
            if recipe.eval.before and start == 0:
                self._note_wer("wer_before", self.evaluate(0, recipe.eval.final_split, None))
            failure = None
            try:
                finished = self._train(stop, start, data_state)
            except EndError as error:
                failure, finished = error, False
            if finished:
                final = self.evaluate(self.last_step, recipe.eval.final_split, None)
                self._note_wer("wer_after", final)
            self._end("finished" if finished else "stopped" if failure is None else None)
        if failure is not None:
            raise failure
        return finished

    def _train(self, stop: StopRequest, start: int, data_state: State | None) -> bool:
        recipe, timer = self.recipe, self.step.timer
        if start and self._stops_early(start, just_evaluated=False):
            return True
        trace = Trace(recipe.profile, timer, self.run_dir / "trace", self.groups.rank, self.groups.world)
        loader = self._loader(data_state)
        with loader, self.work:
            batches, state, saved = iter(loader), loader.state, start
            for number in range(start, recipe.train.steps):
                self.position.at(number + 1)
                self.watchdog.heartbeat(f"step {number + 1}")
                trace.begin(number + 1)
                with timer("load"):
                    loaded, failure = next_together(batches, self.groups)
                if loaded is None:
                    self._end_with(f"{failure}", number, state, saved)
                before, (batch, state) = state, loaded
                self.position.at(number + 1, batch)
                report = self.step(number, batch)
                if report.skip_reason is not None:
                    reason = answer_spike(report, batch, self.step, self.checkpoints, self.emit)
                    if reason is not None:
                        self._end_with(reason, number, before, saved)
                known = agree(stop, loader.num_skipped, loader.epochs, self.groups)
                done = number + 1
                last = done == recipe.train.steps
                saving = known.stopping or last or _due(done, recipe.checkpoint.every_steps)
                report = self._complete(report, known, saving)
                trace.end(done, last=known.stopping)
                for hook in self.hooks:
                    hook.on_step(report)
                if known.stopping and not last:
                    self._set_alarm(stop, known, done)
                if saving:
                    self._save(done, state)
                    saved = done
                if known.stopping and not last:
                    return False
                if not last and _due(done, recipe.eval.every_steps):
                    self.evaluate(done, recipe.eval.split, recipe.eval.max_samples)
                    try:
                        stops = self._stops_early(done, just_evaluated=True)
                    except UserError as error:
                        self._end_with(f"{error}", done, state, saved)
                    if stops:
                        if saved < done:
                            self._save(done, state)
                        return True
                self._emit_saved()
        return True

    def _stops_early(self, done: int, just_evaluated: bool) -> bool:
        """Whether `eval.stop_after` ends the run after `done` steps: the same on all ranks.

        Raises:
            UserError: evaluations do not have the metric that is watched.
        """
        evaluation, metric = self.recipe.eval, self.recipe.checkpoint.best_metric
        if not evaluation.stop_after:
            return False
        stale = self.checkpoints.since_best(done)
        if stale is None and not just_evaluated:
            return False
        if stale is None:
            raise UserError(
                f"checkpoint.best_metric = {metric}: no evaluation has it; metrics.jsonl shows the names there are"
            )
        if stale < evaluation.stop_after:
            return False
        self.last_step = self.summary["stopped_early"] = done
        if self.groups.rank == 0:
            print(f"stopped at step {done}: {metric} has not become better in {stale} evaluations", flush=True)
        return True

    def _loader(self, state: State | None) -> Loader:
        return Loader(
            self.prepared,
            seed=self.recipe.seed,
            num_batches=self.recipe.train.steps,
            rank=self.groups.rank,
            world=self.groups.topology.world,
            state=state,
            on_skip=SkipLog(self.run_dir / "skipped.jsonl"),
        )

    def _complete(self, report: StepReport, known: Agreement, saving: bool) -> StepReport:
        """Add what all ranks know; where an interval ends, what they did in it."""
        self.work.add(report)
        # An interval ends with every checkpoint, so that a run that goes on from there has lost no part of one.
        if saving or is_logged(report.step, self.recipe.telemetry.log_every_steps):
            with self.step.timer("report"):
                report = self.work.take(replace(report, load=self.step.take_load(report.step)))
        return replace(report, num_skipped=known.skipped, epochs=known.epochs)

    def _end_with(self, reason: str, done: int, state: State, saved: int) -> NoReturn:
        """End the run because of what follows step `done`; `state` is the data's after it."""
        if saved < done:
            self._save(done, state)
        where = f"the state after step {done} is in {self.recipe.run_url}" if done else "no step was done"
        raise EndError(f"{reason}; {where}; the same command goes on when this is mended")

    def _set_alarm(self, stop: StopRequest, known: Agreement, done: int) -> None:
        """A signal stops the run; tell if its last save takes longer than the scheduler waits."""
        self.emit("signal", done, {"name": "+".join(known.signals), "ranks": sum(known.signals.values())})
        grace_sec = self.recipe.train.stop_grace_sec

        def late() -> None:
            newest = max(self.checkpoints.steps(), default=None)
            why = f"not saved within train.stop_grace_sec = {grace_sec:g}"
            self.emit("save_failed", done, {"why": why, "newest_checkpoint": newest})

        since_sec = time.monotonic() if stop.signal is None else stop.time_sec
        self._alarm.enter_context(deadline(grace_sec, since_sec, late))

    def emit(self, event: str, step: int, fields: Mapping[str, Any]) -> None:
        """Tell the hooks, which only rank 0 has."""
        for hook in self.hooks:
            hook.on_event(event, step, fields)

    def evaluate(self, step: int, split: str, max_samples: int | None) -> Evaluation | None:
        """Read `split`; tell the hooks. Rank 0 gets the result."""
        self.watchdog.heartbeat(f"evaluation of {split}")
        found = self.evaluator(step, split, max_samples)
        if found is not None:
            for hook in self.hooks:
                hook.on_eval(found.report)
            self.checkpoints.note_scores(step, flatten_eval(found.report))
        return found

    def _note_wer(self, key: str, found: Evaluation | None) -> None:
        if found is not None and "asr/wer" in found.report.values:
            self.summary[key] = found.report.values["asr/wer"]
        self.last_evaluation = found

    def _save(self, done: int, data_state: dict[str, Any]) -> None:
        states: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(states, data_state, group=self.groups.world)
        id_file = self.run_dir / ID_NAME
        extra = {
            "step": done,
            "data": merge_states(states),
            "recipe": dump(self.recipe),
            "summary": self.summary,
            "guard": self.step.guard.state,
            "mlflow_run": id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None,
        }
        self.checkpoints.save(done, self.step, {**extra, **self.described})

    def _emit_saved(self) -> None:
        for url in self.checkpoints.finished():
            for hook in self.hooks:
                hook.on_save(url)
        for outcome in self.checkpoints.failed():
            self.emit("save_failed", self.position.step or 0, {"why": outcome.failure, "checkpoint": outcome.url})

    def _end(self, event: str | None) -> None:
        self.watchdog.heartbeat("the last save")
        try:
            self.checkpoints.close()
        finally:
            self._alarm.close()
            self._emit_saved()
        peaks: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(peaks, peak_memory_bytes(), group=self.groups.world)
        if event is not None:
            self.emit(event, self.position.step or self.recipe.train.steps, {})
        self.watchdog.disarm()  # trackers have a time limit of their own
        for hook in self.hooks:
            hook.on_end({**self.summary, "peak_memory_bytes": peaks, "ranks": self.work.summary})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
