"""The command that runs a recipe as a Slurm job.

    earshot job RECIPE [key=value ...]

It prints the plan, checks the nodes, starts the ranks and requeues the job if needed. Outside a Slurm job, it checks
only what needs no nodes: the recipe, its plan and its data. This module does not import torch, so that it handles
signals soon after its start.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from model.errors import UserError
from trainer.job import slurm
from trainer.job.cancel import CancelledError, cancelled_by
from trainer.job.check import Facts
from trainer.job.preflight import BadNodesError, preflight
from trainer.job.submission import STORE_SEC, RefusedError, check, keep_plan
from trainer.job.sweep import choose
from trainer.run.exit_codes import ExitCode
from trainer.run.hardware import events_of_job, suspect_nodes
from trainer.telemetry.alerts import Alerts
from trainer.telemetry.announce import print_timed
from trainer.telemetry.events import Event, EventLog, read_events

_STORE_AGAIN_SEC = 120.0
"""The time in seconds for which an unreachable bucket is retried in later attempts, which run unattended."""


class Signals:
    """The signals that Slurm has sent to the batch script.

    Before a time limit or a preemption, Slurm sends SIGUSR1 to the batch script, which then asks the ranks to stop. If
    Slurm ends the job, it sends SIGTERM to the batch script and the ranks.
    """

    def __init__(self) -> None:
        self.received = "STOPPED_EARLY" in os.environ  # The shell received a signal before this process started.
        """Whether any signal was received."""
        self.numbers: list[int] = []
        """The signals that were received, in order."""
        self.step: subprocess.Popen[bytes] | None = None
        """The `srun` process of the ranks; None before they start."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._note)

    @property
    def ending(self) -> bool:
        """Whether the job is being ended. If so, errors that its processes report are only a consequence."""
        return signal.SIGTERM in self.numbers

    def _note(self, number: int, _frame: FrameType | None) -> None:
        print_timed(f"job: received {signal.Signals(number).name}")
        self.received = True
        self.numbers.append(number)
        if self.step is not None and self.step.poll() is None:
            # The ranks are asked to stop with SIGUSR1 in any case, because srun would kill them after a SIGTERM.
            self.step.send_signal(signal.SIGUSR1)


@dataclass(frozen=True)
class Job:
    """One attempt of a batch job."""

    allocation: slurm.Allocation
    facts: Facts
    signals: Signals
    log: EventLog
    arguments: tuple[str, ...]
    """The recipe and its overrides."""

    def run(self) -> int:
        """Check the nodes, run the ranks, and requeue the job if it should run again.

        Returns:
            The exit code of the job.

        Raises:
            UserError: If the job cannot run.
        """
        self._note_start()
        return self._fit()._attempt()

    def _attempt(self) -> int:
        try:
            layout = slurm.lay_out(self.allocation, self.facts.num_ranks, self.facts.tensor)
            suspects = suspect_nodes(events_of_job(read_events(self.log.run_dir)))
            found = preflight(self.allocation, layout, self.facts, os.environ, suspects)
        except CancelledError:
            return self._after(128 + signal.SIGTERM)
        except BadNodesError as error:
            return self._after(ExitCode.STOPPED) if self.signals.ending else self._without_nodes(error)
        except UserError as error:
            if self.signals.ending:
                return self._after(ExitCode.STOPPED)
            self._emit("refused", why=str(error))
            raise
        code: int = ExitCode.STOPPED
        if not self.signals.received:
            print_timed(f"job: {self.facts.num_ranks} ranks start on {', '.join(found.nodes)}")
            code = self._step(
                slurm.srun(self.allocation, found.nodes, layout.ranks_per_node, ["trainer", *self.arguments])
            )
        return self._after(code)

    def _fit(self) -> Job:
        """Return this job, or one with fewer ranks if there are too few nodes and `restart.min_nodes` allows it.

        The job then uses the largest number of nodes for which the recipe is valid and its plan fits into memory. A job
        that starts for the first time needs all nodes, because the user is probably present to read the error.
        """
        nodes, facts = self.allocation.nodes, self.facts
        per_node = min(self.allocation.tasks_per_node, facts.num_ranks)
        if not self.allocation.restarts or facts.min_nodes is None or len(nodes) * per_node >= facts.num_ranks:
            return self
        for num_nodes in range(len(nodes), facts.min_nodes - 1, -1):
            num_ranks = num_nodes * per_node
            print_timed(f"job: {facts.num_ranks} ranks do not fit on {', '.join(nodes)}; planning {num_ranks} ranks")
            arguments = (*self.arguments, f"parallel.num_ranks={num_ranks}")
            try:
                fewer = check(arguments[0], arguments[1:], _STORE_AGAIN_SEC, per_node=self.allocation.tasks_per_node)
            except RefusedError as error:
                print_timed(f"job: {num_ranks} ranks are not possible: {error}")
                continue
            why = f"{facts.num_ranks} ranks do not fit on {', '.join(nodes)}"
            keep_plan(fewer, is_whole=False)
            self._emit("fewer_nodes", why=why, nodes=num_nodes, num_ranks=num_ranks)
            return replace(self, facts=fewer, arguments=arguments)
        return self

    def _emit(self, event: str, **fields: Any) -> None:
        """Append an event. A failure to do so is only logged, because a full disk must not prevent a requeue."""
        try:
            self.log.add(event, **fields)
        except OSError as error:
            print_timed(f"job: the event '{event}' could not be written: {error}")

    def _note_start(self) -> None:
        """Append the event `submitted`. If the previous attempt gave no reason for the restart, append it first."""
        job = self.allocation
        if job.restarts:
            fields = [e for e in read_events(self.log.run_dir) if e["event"] in ("submitted", "requeued", "refused")]
            if fields and fields[-1]["event"] == "submitted" and fields[-1].get("job") == job.job_id:
                lost = slurm.unavailable(str(fields[-1]["nodes"]).split(","))
                if lost:
                    self._emit("node_lost", nodes=",".join(lost))
                self._emit("requeued", why=f"Slurm lost {', '.join(lost) or 'the batch script'}")
        self._emit("submitted", job=job.job_id, nodes=",".join(job.nodes), restarts=job.restarts)

    def _step(self, command: Sequence[str]) -> int:
        # The secret keeps other processes from joining the ranks of this start (trainer/parallel/meeting.py).
        environment = {**os.environ, "EARSHOT_JOB_SECRET": secrets.token_hex(32)}
        self.signals.step = step = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
        if self.signals.received:  # The signal arrived while srun was being started.
            step.send_signal(signal.SIGUSR1)
        was_asked = False
        while (code := _wait(step)) is None:
            if self.signals.ending and not was_asked:  # Slurm may kill this process before the ranks have saved.
                was_asked = True
                self._note_cancelled(slurm.job_state_now(self.allocation.job_id), ExitCode.STOPPED)
        return code if code >= 0 else 128 - code

    def _after(self, code: int) -> int:
        """Decide whether the job should run again, requeue it if so, and return `code`."""
        if code == ExitCode.FINISHED:
            return 0
        state = slurm.job_state(self.allocation.job_id)
        if state.restarts > self.allocation.restarts:
            if self._is_newest():
                self._emit("requeued", why="Slurm requeued the job on its own", exit_code=code)
            return code
        if self._note_cancelled(state, code):
            if not state.is_ending:
                slurm.cancel(self.allocation.job_id)  # The job's state in Slurm then becomes CANCELLED as well.
            return code
        decide = [sys.executable, "-m", "trainer.restart", str(self.log.run_dir), f"--exit-code={code}"]
        again = subprocess.run(decide).returncode == 0
        # The job may have been cancelled meanwhile, and Slurm would requeue even a cancelled job.
        if again and not self._note_cancelled(slurm.job_state(self.allocation.job_id), code):
            slurm.requeue(self.allocation.job_id)
        return code

    def _note_cancelled(self, state: slurm.JobState | None, code: int) -> bool:
        """Return whether a person has cancelled the job. If so, append the event once.

        Args:
            state: The state of the job; None if it is not known.
            code: The exit code of the ranks.
        """
        events = read_events(self.log.run_dir)
        if self._is_cancelled(events):
            return True
        if state is None or state.restarts > self.allocation.restarts:
            return False
        how = cancelled_by(state, self.signals.numbers, events, code)
        if how is not None:
            print_timed(f"job: cancelled by {how}; the job will not run again")
            self._emit("cancelled", job=self.allocation.job_id, why=how)
        return how is not None

    def _is_cancelled(self, events: Sequence[Event]) -> bool:
        last = next((e for e in reversed(events) if e["event"] in ("submitted", "cancelled")), None)
        return last is not None and last["event"] == "cancelled" and last.get("job") == self.allocation.job_id

    def _is_newest(self) -> bool:
        """Return whether this is the job's newest start.

        It is not the newest if Slurm lost the connection to this node and started the job again elsewhere.
        """
        fields = [e for e in read_events(self.log.run_dir) if e["event"] == "submitted"]
        mine = (self.allocation.job_id, self.allocation.restarts)
        return bool(fields) and (fields[-1].get("job"), fields[-1].get("restarts")) == mine

    def _without_nodes(self, error: BadNodesError) -> int:
        """Raise the error in the first attempt. In later attempts, let Slurm requeue the job on other nodes."""
        if not self.allocation.restarts or not error.bad:
            self._emit("refused", why=str(error))
            raise error
        print_timed(f"job: {error}")
        if set(error.bad) == set(self.allocation.nodes):
            return self._after(ExitCode.FAILED)  # All nodes failed, so other nodes would probably fail as well.
        self._emit("requeued", why=f"without {', '.join(error.bad)}")
        slurm.requeue(self.allocation.job_id)
        slurm.exclude(self.allocation.job_id, error.bad)
        return ExitCode.FAILED


def _wait(step: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code of a process; None if it has not ended within a second."""
    try:
        return step.wait(1.0)
    except subprocess.TimeoutExpired:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `earshot job`.

    Returns:
        The exit code: 0, the exit code of the ranks, or 2 after printing an error.
    """
    parser = argparse.ArgumentParser(
        prog="earshot job", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="the name or the file of a recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that override those of the recipe")
    options = parser.parse_args(arguments)
    try:
        if "SLURM_JOB_ID" not in os.environ:
            return _outside(options.recipe, options.overrides)
        return _in_job(options.recipe, choose(options.recipe, options.overrides, os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.USER_ERROR


def _outside(recipe: str, overrides: Sequence[str]) -> int:
    """Check what needs no nodes, and whether the ranks fit on the nodes that `slurm/submit.sh` will request."""
    asked = slurm.Allocation.asked(os.environ)
    facts = check(recipe, overrides, per_node=None if asked is None else asked.tasks_per_node, smaller=True)
    if asked is not None:
        slurm.lay_out(asked, facts.num_ranks, facts.tensor)
    return 0


def _in_job(recipe: str, overrides: Sequence[str]) -> int:
    signals = Signals()
    attempt = f", restart {os.environ['SLURM_RESTART_COUNT']}" if "SLURM_RESTART_COUNT" in os.environ else ""
    print_timed(f"job {os.environ['SLURM_JOB_ID']}{attempt} on {os.environ.get('SLURM_JOB_NODELIST')}: {recipe}")
    allocation = slurm.Allocation.read(os.environ)
    again = allocation.restarts > 0
    print_timed("job: checking the recipe and its data" + ("" if again else ", and planning"))
    try:
        retry_sec = _STORE_AGAIN_SEC if again else STORE_SEC
        facts = check(
            recipe, overrides, retry_sec, plan=not again, per_node=allocation.tasks_per_node, smaller=not again
        )
    except RefusedError as error:
        if signals.ending:
            return ExitCode.STOPPED
        if error.facts is not None:
            run_dir = Path(error.facts.run_dir)
            EventLog(run_dir, notify=Alerts(run_dir)).add("refused", why=str(error), job=allocation.job_id)
        raise
    keep_plan(facts)
    log = EventLog(Path(facts.run_dir), notify=Alerts(Path(facts.run_dir)))
    return Job(allocation, facts, signals, log, (recipe, *overrides)).run()


if __name__ == "__main__":
    sys.exit(main())
