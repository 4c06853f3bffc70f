"""The ways in which a user can cancel a job.

After each of them, the run must not restart automatically, and a later submission must be able to resume it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.cluster.harness import ROOT, Run
from trainer.telemetry.events import read_events

Cancel = Callable[[Run, int], None]
"""A function that waits until a run has done a step, and then cancels its job."""


def _scancel(*options: str) -> Cancel:
    """Return a function that calls `scancel` during training."""

    def cancel(run: Run, at_step: int) -> None:
        run.wait_step(at_step)
        run.bench.cluster.run("scancel", *options, str(run.job_id))

    return cancel


def twice(run: Run, at_step: int) -> None:
    """Call `scancel` twice, half a second apart."""
    run.wait_step(at_step)
    for _ in range(2):
        run.bench.cluster.run("scancel", str(run.job_id), check=False)
        time.sleep(0.5)


def pending(run: Run, at_step: int) -> None:
    """Cancel the job while it is queued for its restart, after a warning of Slurm (the signal USR1)."""
    run.wait_step(at_step)
    cluster = run.bench.cluster
    cluster.run("scancel", "--batch", "--signal=USR1", str(run.job_id))
    run.wait(lambda: cluster.job(run.job_id).get("Restarts") == "1", "the job is not requeued")
    cluster.run("scancel", str(run.job_id))


def starting(run: Run, at_step: int) -> None:
    """Cancel the job as soon as it runs, while it checks the recipe."""
    run.wait(lambda: run.state() == "RUNNING", "the job does not start")
    run.bench.cluster.run("scancel", str(run.job_id))


def ranks_starting(run: Run, at_step: int) -> None:
    """Cancel the job while its ranks import their modules."""
    run.wait(lambda: "ranks start on" in run.log, "the ranks do not start")
    run.bench.cluster.run("scancel", str(run.job_id))


def saving(run: Run, at_step: int) -> None:
    """Cancel the job while its ranks save after a warning of Slurm (the signal USR1)."""
    run.wait_step(at_step)
    run.bench.cluster.run("scancel", "--batch", "--signal=USR1", str(run.job_id))
    run.wait(lambda: bool(run.events("signal")), "the ranks do not stop")
    run.bench.cluster.run("scancel", str(run.job_id))


TABLE: dict[str, Cancel] = {
    "scancel": _scancel(),
    "scancel --full": _scancel("--full"),
    "scancel --signal=TERM": _scancel("--signal=TERM"),
    "scancel --signal=INT": _scancel("--signal=INT"),
    "scancel --batch --signal=TERM": _scancel("--batch", "--signal=TERM"),
    "scancel twice": twice,
    "scancel while pending": pending,
    "scancel while starting": starting,
    "scancel while ranks start": ranks_starting,
    "scancel while saving": saving,
}
"""The functions by name. Except for those with "start" in their names, they cancel a run that has state to save."""


def cancel(name: str, run: Run, at_step: int = 5) -> list[str]:
    """Cancel a run, and return what was wrong with its end, one line each; an empty list if nothing was wrong."""
    TABLE[name](run, at_step)
    run.wait_cancelled()
    kinds = Counter(str(e["event"]) for e in read_events(run.run_dir) if float(e["time"]) > run.submitted_at)
    wrong = []
    if kinds["submitted"] > 1:
        wrong.append("the job ran again")
    if kinds["requeued"] > (name in ("scancel while pending", "scancel while saving")):  # one after their warning
        wrong.append("a restart was used up")
    if "start" in name:
        return wrong
    command = [sys.executable, "-m", "tools.status", str(run.run_dir), "--json"]
    state = json.loads(run.bench.cluster.run(*command, env={"PYTHONPATH": str(ROOT)}).stdout)["state"]
    if state != "cancelled":
        wrong.append(f"the status is {state}")
    if run.last_step() != max((int(str(e["step"])) for e in run.events("saved")), default=0):
        wrong.append("the last step was not saved")
    return wrong
