"""Fetch, step, report, save, evaluate: the training run as one straight line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from model.batch import Batch
from model.errors import UserError
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.data.loader import Loader, SkipLog
from trainer.data.prepare import PreparedData
from trainer.data.state import State, merge_states
from trainer.evaluate import Evaluation, Evaluator
from trainer.hooks import Hook, RunState
from trainer.lifecycle import StopRequest, agree, first_failure
from trainer.parallel.groups import Groups
from trainer.step import Step
from trainer.telemetry.metrics import flatten_eval, is_logged, peak_memory_bytes
from trainer.telemetry.trace import Trace
from trainer.telemetry.tracker import ID_NAME


class DataError(UserError):
    """The data ended the run; its state is saved."""


class Loop:
    """One run from its first step, or from its last checkpoint, to its end.

    Args:
        recipe: the resolved recipe.
        step, groups, prepared, evaluator, checkpoints: the parts; see `trainer.build`.
        hooks: of this rank (only rank 0 has any).
        run_dir: the run's folder.
        described: what a checkpoint says of the model, so that it can be exported by itself.
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
    ) -> None:
        self.recipe, self.step, self.groups, self.prepared = recipe, step, groups, prepared
        self.evaluator, self.checkpoints, self.run_dir = evaluator, checkpoints, run_dir
        self.described = described
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
        id_file = self.run_dir / ID_NAME
        if self.groups.rank == 0 and extra["mlflow_run"] is not None and not id_file.exists():
            id_file.write_text(extra["mlflow_run"] + "\n", encoding="utf-8")
        return extra["step"], extra

    def run(self, hooks: Sequence[Hook], start: int, data_state: dict[str, Any] | None) -> bool:
        """Train from step `start`; returns False when a signal ended the run before its last step."""
        recipe, self.hooks = self.recipe, hooks
        state = RunState(recipe.name, self.run_dir, recipe.train.steps, self.groups.topology.world, start)
        for hook in hooks:
            hook.on_start(state)
        if recipe.eval.before and start == 0:
            self._note_wer("wer_before", self.evaluate(0, recipe.eval.final_split, None))
        failure = None
        try:
            with StopRequest().listening() as stop:
                finished = self._train(stop, start, data_state)
        except DataError as error:
            failure, finished = error, False
        if finished:
            final = self.evaluate(self.last_step, recipe.eval.final_split, None)
            self._note_wer("wer_after", final)
        self._end()
        if failure is not None:
            raise failure
        return finished

    def _train(self, stop: StopRequest, start: int, data_state: dict[str, Any] | None) -> bool:
        recipe, timer = self.recipe, self.step.timer
        if start and self._stops_early(start, just_evaluated=False):
            return True
        trace = Trace(recipe.profile, timer, self.run_dir / "trace", self.groups.rank, self.groups.world)
        loader = Loader(
            self.prepared,
            seed=recipe.seed,
            num_batches=recipe.train.steps,
            rank=self.groups.rank,
            world=self.groups.topology.world,
            state=data_state,
            on_skip=SkipLog(self.run_dir / "skipped.jsonl"),
        )
        with loader:
            batches, state, saved = iter(loader), loader.state, start
            for number in range(start, recipe.train.steps):
                trace.begin(number + 1)
                with timer("load"):
                    loaded, failure = self._next(batches)
                if loaded is None:
                    if saved < number:
                        self._save(number, state)
                    place = self.recipe.run_url
                    where = f"the state after step {number} is in {place}" if number else "no step was done"
                    raise DataError(f"{failure}; {where}; the same command goes on when this is mended")
                batch, state = loaded
                report = self.step(number, batch)
                known = agree(stop, loader.num_skipped, loader.epochs, self.groups)
                done = number + 1
                last = done == recipe.train.steps
                saving = known.stopping or last or _due(done, recipe.checkpoint.every_steps)
                # An interval ends with every checkpoint, so that a run that goes on from there has lost no part of one.
                if saving or is_logged(done, recipe.telemetry.log_every_steps):
                    with timer("report"):
                        report = replace(report, load=self.step.take_load(done))
                trace.end(done, last=known.stopping)
                for hook in self.hooks:
                    hook.on_step(replace(report, num_skipped=known.skipped, epochs=known.epochs))
                if saving:
                    self._save(done, state)
                    saved = done
                if known.stopping and not last:
                    return False
                if not last and _due(done, recipe.eval.every_steps):
                    self.evaluate(done, recipe.eval.split, recipe.eval.max_samples)
                    if self._stops_early(done, just_evaluated=True):
                        if saved < done:
                            self._save(done, state)
                        return True
                self._tell_saved()
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

    def _next(self, batches: Iterator[tuple[Batch, State]]) -> tuple[tuple[Batch, State] | None, str | None]:
        """This rank's part of the next global batch; or, on all ranks, None and why one of them has none."""
        loaded, failure = None, None
        try:
            loaded = next(batches)
        except UserError as error:
            failure = str(error)
        failure = first_failure(failure, self.groups)
        return (loaded, None) if failure is None else (None, failure)

    def evaluate(self, step: int, split: str, max_samples: int | None) -> Evaluation | None:
        """Read `split`; tell the hooks. Rank 0 gets the result."""
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
            "mlflow_run": id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None,
        }
        self.checkpoints.save(done, self.step, {**extra, **self.described})

    def _tell_saved(self) -> None:
        for url in self.checkpoints.finished():
            for hook in self.hooks:
                hook.on_save(url)

    def _end(self) -> None:
        self.checkpoints.close()
        self._tell_saved()
        peaks: list[Any] = [None] * self.groups.topology.world
        dist.all_gather_object(peaks, peak_memory_bytes(), group=self.groups.world)
        for hook in self.hooks:
            hook.on_end({**self.summary, "peak_memory_bytes": peaks})


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
