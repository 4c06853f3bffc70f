"""The training loop, which loads batches, runs training steps, reports them, saves checkpoints and evaluates."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from model.batch import Batch
from model.errors import UserError
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.schema import Recipe
from trainer.data.loader import Loader, SkipLog
from trainer.data.prepare import PreparedData
from trainer.data.state import State
from trainer.data.stream import SampleStream
from trainer.parallel.groups import Groups
from trainer.parallel.values import all_gather_values, gather_values
from trainer.run.failure import FaultError, Position
from trainer.run.lifecycle import StopRequest, first_failure, load_next, notes_of, totals_of
from trainer.run.watchdog import Watchdog
from trainer.scoring.tasks import TASKS
from trainer.telemetry.hook import Hook, HookList, RunState
from trainer.telemetry.metrics import StepReport, flatten_eval, is_logged, peak_memory_bytes
from trainer.telemetry.trace import Trace
from trainer.telemetry.waiting import WaitSampler
from trainer.training.early_stop import stops_early
from trainer.training.evaluate import Evaluation, Evaluator
from trainer.training.global_batch import Shared
from trainer.training.plan_check import PlanCheck, plan_check_of
from trainer.training.rank_work import Work
from trainer.training.replicas import check_replicas
from trainer.training.saver import Saver
from trainer.training.spikes import EndError, answer_spike
from trainer.training.step import Step
from trainer.training.utilization import kept_generators, utilization_of


class Loop:
    """One training run, from its first step or its newest checkpoint to its end.

    Collective: every rank of the world must call each of its methods.

    Args:
        recipe: The resolved recipe.
        step: The training step, which holds the engines of the audio modules and of the LLM; a call runs one step.
        groups: This rank's process groups.
        prepared: The datasets and the tokenizer.
        evaluator: The evaluator, which scores the model on a split.
        checkpoints: The run's checkpoints.
        run_dir: The run's folder.
        described: The description of the model that an export needs; it is stored in every checkpoint.
        watchdog: The watchdog, to which a heartbeat is sent whenever the run makes progress.
        position: The step and the samples that this rank is working on. The loop updates it for error reports.
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
        self.watchdog, self.position = watchdog, position
        self.hooks = HookList()
        self.saver = Saver(recipe, step, groups, checkpoints, run_dir, described, self.hooks)
        self.work = Work(recipe.telemetry, WaitSampler(step.timer), groups, self.hooks.on_event)
        self.trace = Trace(
            recipe.profile,
            step.timer,
            run_dir / "trace",
            groups.rank,
            groups.world,
            lambda events: gather_values(events, groups.world),
        )
        self.plan_check: PlanCheck | None = None
        if groups.rank == 0:
            self.plan_check = plan_check_of(recipe, run_dir, step.timer, groups.device, self.hooks.on_event)
        with kept_generators(groups.device):
            self.utilization = None if groups.rank else utilization_of(recipe, groups.topology, groups.device)
        self.last_step = recipe.train.steps
        """The step after which the run is finished. Early stopping sets it to an earlier step."""
        self.stopped = False
        """Whether a signal ended the run before its last step."""
        self.last_evaluation: Evaluation | None = None
        """The most recent evaluation of `eval.final_split`; None on ranks other than 0."""

    def restore(self) -> tuple[int, dict[str, Any]]:
        """Load the run's newest checkpoint; see `Saver.restore`.

        Collective: every rank of the world must call it.
        """
        return self.saver.restore()

    def run(self, hooks: Sequence[Hook], start: int, data_state: State | None) -> bool:
        """Train until the last step, a signal, early stopping or an error ends the run.

        Collective: every rank of the world must call it.

        Args:
            hooks: This rank's hooks; empty on ranks other than 0.
            start: The number of steps already done.
            data_state: The state of the sample stream after those steps; None to start from the beginning.

        Returns:
            False if a signal ended the run before its last step.

        Raises:
            EndError: If a problem with the data, the loss or an evaluation ended the run. The state of the run has been
                saved, unless the run diverged.
            FaultError: If a rank failed for an external reason, such as a killed data worker. The state has been saved.
        """
        recipe, num_steps = self.recipe, self.recipe.train.steps
        self.hooks.extend(hooks)
        ends = tuple(zip((s.name for s in recipe.stages), accumulate(s.steps for s in recipe.stages), strict=True))
        self.hooks.on_start(RunState(recipe.name, self.run_dir, num_steps, self.groups.topology.world, start, ends))
        with StopRequest().listening() as stop, self._ending(stop):
            if start == 0 and recipe.eval.before:
                self._evaluate_final_split(0, "wer_before")
            if start == 0 or not self._stops_early(start, just_evaluated=False):
                with self._loader(data_state) as loader, self.work:
                    batches, state = iter(loader), loader.state
                    for number in range(start + 1, num_steps + 1):
                        self._announce_stage(number, just_started=number == start + 1)
                        batch, shared, next_state = self._fetch(number, loader, batches, state)
                        report = self._train(number, batch, shared, state, stop)
                        state = next_state
                        self._report(report, shared, loader.epochs, stop)
                        if _is_due(number, recipe.train.compare_replicas_every_steps):
                            check_replicas(number, self.step.llm, self.groups, self.hooks.on_event)
                        if self._saves_after(number):
                            self.saver.save(number, state)
                        if self.stopped:
                            return False
                        if self._evaluates_after(number):
                            self.evaluate(number, recipe.eval.split, recipe.eval.max_samples)
                            if self._ends_after_evaluation(number, state):
                                break
                        self.saver.report_outcomes(number)
            self._evaluate_final_split(self.last_step, "wer_after")
        return True

    # The parts of a step, in the order in which `run` calls them

    def _fetch(
        self, number: int, loader: Loader, batches: Iterator[tuple[Batch, State]], state: State
    ) -> tuple[Batch, Shared, State]:
        """Load the batch of step `number`.

        In one exchange, every rank shares the description of its part of the batch, or the error that occurred when it
        loaded this part.

        Returns:
            This rank's part of the batch, the description of the whole batch, and the state of the sample stream after
            the batch.
        """
        self.position.at(number)
        self.watchdog.heartbeat(f"step {number}")
        self.trace.begin(number)
        with self.step.timer("load"):
            loaded, mine = load_next(batches, self.groups.rank)
            batch, next_state = loaded or (Batch(()), state)
            shared = self.step.share(batch, notes_of(mine, loader.num_skipped, loader.epochs))
            failure = first_failure(mine, shared.whole.notes, self.groups)
        if failure is not None:
            self._fail(failure.text, number - 1, state, of_user=failure.of_user)
        self.position.at(number, batch)
        return batch, shared, next_state

    def _announce_stage(self, number: int, just_started: bool) -> None:
        """Emit an event if step `number` is the first of a stage, or the first of this process."""
        index, stage = self.step.stages.at(number - 1)
        if stage.name and (just_started or stage.start == number - 1):
            fields = {"stage": stage.name, "number": f"{index + 1} of {len(self.recipe.stages)}"}
            self.hooks.on_event("stage_started", number, fields)

    def _train(self, number: int, batch: Batch, shared: Shared, state: State, stop: StopRequest) -> StepReport:
        """Run step `number`. If its update is skipped, react as the recipe's `spike.action` says.

        `state` is the state of the sample stream before the step.
        """
        report = self.step(number - 1, batch, shared, stop)
        if report.skip_reason is not None:
            emit, url = self.hooks.on_event, self.recipe.run_url
            failure = answer_spike(report, batch, self.step, self.checkpoints, emit, url)
            if failure is not None:
                self._fail(failure, number - 1, state)
        return report

    def _report(self, report: StepReport, shared: Shared, datasets: Iterable[str], stop: StopRequest) -> None:
        """Complete the report of a step with the totals over all ranks, and pass it to the hooks.

        `datasets` are the names of the datasets whose epochs are counted.
        """
        self.stopped = bool(report.signals) and report.step < self.recipe.train.steps
        self.work.add(report)
        # Every checkpoint ends a logging interval, so that no part of an interval is lost when a run resumes.
        if self._saves_after(report.step) or is_logged(report.step, self.recipe.telemetry.log_every_steps):
            with self.step.timer("report"):
                load, token_load = self.step.take_load(report.step), self.step.take_token_load(report.step)
                report = self.work.take(replace(report, load=load, token_load=token_load))
        known = totals_of(shared.whole.notes, datasets)
        report = replace(report, num_skipped=known.skipped, epochs=known.epochs)
        if self.groups.rank == 0:
            peak = peak_memory_bytes()
            mfu = None if self.utilization is None else self.utilization.mfu(report)
            report = replace(report, mfu=mfu, memory_bytes=peak.get("device", peak["host"]))
        if self.plan_check is not None:
            report = self.plan_check.add(report)
        self.trace.end(report.step, last=bool(report.signals))
        self.hooks.on_step(report)
        if self.stopped:
            names, num_ranks = "+".join(report.signals), sum(report.signals.values())
            self.hooks.on_event("signal", report.step, {"name": names, "ranks": num_ranks})
            self.saver.set_deadline(stop, report.step)

    def _saves_after(self, number: int) -> bool:
        is_last = self.stopped or number == self.recipe.train.steps
        if self.step.guard.in_a_row and not is_last:
            return False  # The last applied update may have ruined the weights. An older checkpoint is safer.
        return is_last or _is_due(number, self.recipe.checkpoint.every_steps)

    def _evaluates_after(self, number: int) -> bool:
        # After the last step, the final split is evaluated instead.
        return number < self.recipe.train.steps and _is_due(number, self.recipe.eval.every_steps)

    def evaluate(self, done: int, split: str, max_samples: int | None) -> Evaluation | None:
        """Evaluate the model on `split` after `done` steps and report the scores.

        Collective: every rank of the world must call it.

        Args:
            done: The number of steps completed.
            split: The name of the split.
            max_samples: The largest number of samples to use; None for all.

        Returns:
            The evaluation on rank 0, None on all others.
        """
        self.watchdog.heartbeat(f"evaluation of {split}")
        found = self.evaluator(done, split, max_samples)
        if found is not None:
            self.hooks.on_eval(found.report)
            self.checkpoints.note_scores(done, flatten_eval(found.report))
        return found

    def _ends_after_evaluation(self, done: int, state: State) -> bool:
        """Return whether the evaluation after `done` steps ends the run. If it does, save the state of the run."""
        try:
            stops = self._stops_early(done, just_evaluated=True)
        except UserError as error:
            self._fail(f"{error}", done, state)
        if stops:
            self.saver.save(done, state)
        return stops

    # The parts of a run around its steps

    def _loader(self, state: State | None) -> Loader:
        return Loader(
            SampleStream(
                self.prepared,
                seed=self.recipe.seed,
                num_batches=self.recipe.train.steps,
                rank=self.groups.rank,
                world=self.groups.topology.world,
                state=state,
                on_skip=SkipLog(self.run_dir / "skipped.jsonl"),
            )
        )

    def _stops_early(self, done: int, just_evaluated: bool) -> bool:
        stops = stops_early(self.recipe.eval, self.checkpoints, done, just_evaluated=just_evaluated)
        if stops:
            self.last_step = self.saver.summary["stopped_early"] = done
        return stops

    def _evaluate_final_split(self, done: int, summary_key: str) -> None:
        """Evaluate all of `eval.final_split`, and record the error rate of its transcripts in the summary."""
        found = self.evaluate(done, self.recipe.eval.final_split, None)
        mains = [f"{task.name}/{task.headlines[0]}" for task in TASKS.values() if task.is_transcription]
        rates = [found.report.values[name] for name in mains if name in found.report.values] if found else []
        if rates:
            self.saver.summary[summary_key] = rates[0]
        self.last_evaluation = found

    def _fail(self, reason: str, done: int, state: State, *, of_user: bool = True) -> NoReturn:
        """Save the state after `done` steps and raise the error that ends the run.

        `of_user` is true if the user must fix something. Otherwise, the run may succeed when it is restarted, and batch
        scripts restart it.
        """
        self.saver.save(done, state)
        where = f"the state after step {done} is saved in {self.recipe.run_url}" if done else "no step was done"
        if not of_user:
            raise FaultError(f"{reason}; {where}")
        raise EndError(f"{reason}; {where}; fix this and rerun the same command to resume")

    @contextmanager
    def _ending(self, stop: StopRequest) -> Iterator[None]:
        """Return a context manager that ends the run cleanly.

        If the block raises an error other than `EndError` and `FaultError`, the context manager does nothing.
        """
        try:
            yield
        except (EndError, FaultError):
            self._end(None, stop)
            raise
        self._end("stopped" if self.stopped else "finished", stop)

    def _end(self, event: str | None, stop: StopRequest) -> None:
        """Wait for the last save, emit `event` and close the hooks."""
        self.watchdog.heartbeat("the last save")
        self.saver.close(self.position.step or 0)
        peaks = all_gather_values(peak_memory_bytes(), self.groups.world)
        if stop.later is not None:
            self.hooks.on_event(
                "signal", self.position.step or 0, {"name": signal.Signals(stop.later).name, "ranks": 1}
            )
        if event is not None:
            self.hooks.on_event(event, self.position.step or self.recipe.train.steps, {})
        self.watchdog.disarm()  # The trackers have their own time limit.
        self.hooks.on_end({**self.saver.summary, "peak_memory_bytes": peaks, "ranks": self.work.summary})


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
