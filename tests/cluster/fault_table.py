"""A test of all faults, each in a separate run on a real Slurm. It needs root and takes half an hour.

    python -m tests.cluster.fault_table                 all faults
    python -m tests.cluster.fault_table kill requeue    only faults whose names contain one of the words

`make fault-test` starts it. Each run must end with the results of an undisturbed run: the losses and gradient norms of
every step, the data-loading state, and the tensors in the last checkpoint must be equal. Otherwise, the exit code is 1.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.cluster import cancels, faults
from tests.cluster.harness import Bench, Run, scratch
from tests.services import swift
from tests.services.slurm import Cluster, running, why_not

AT_STEP = 6


@dataclass
class Row:
    """A row of the printed table, with the result of one fault."""

    fault: str
    attempts: int
    back_sec: float | None
    """The seconds from the fault to the end of the next attempt's first step; None if the attempt continued."""
    note: str
    differences: list[str]

    def __str__(self) -> str:
        back = "-" if self.back_sec is None else f"{self.back_sec:.1f}"
        return f"{self.fault:34} {self.attempts:8} {back:>8}  {'; '.join(self.differences) or 'equal':8} {self.note}"


HEADER = f"{'fault':34} {'attempts':>8} {'back, s':>8}  {'result':8}"


def disturb(bench: Bench, name: str, fault: faults.Fault, run: Run, tolerance: float = 0.0) -> Row:
    """Cause a fault at step `AT_STEP` of a run, and compare the finished run with an undisturbed one."""
    run.wait_step(AT_STEP)
    moment = fault(run)
    run.wait_end()
    starts = [float(str(e["time"])) for e in run.events("submitted")]
    later = [s for s in starts if s > moment]
    back = None
    if later:
        back = min(r["time"] for r in run.records() if r["time"] > later[-1]) - moment
    note = ", ".join(str(e["why"]) for e in run.events("requeued"))
    return Row(name, len(starts), back, note, bench.differences(run, tolerance))


def start_times(run: Run) -> str:
    """Return a line with the duration of the start, from `sbatch` to the first step, and of its parts."""
    launched = next(line for line in run.log.splitlines() if "ranks start on" in line).split()[0]
    hours, minutes, seconds = launched.split(":")
    day = time.localtime(run.submitted_at)
    at = time.mktime((*day[:3], int(hours), int(minutes), 0, *day[6:])) + float(seconds)
    first = min(r["time"] for r in run.records())
    return (
        f"sbatch to first step: {first - run.submitted_at:.1f} s, of which the trainer's ranks took {first - at:.1f} s "
        f"and Slurm, plan and preflight {at - run.submitted_at:.1f} s"
    )


def run_one(bench: Bench, name: str) -> Row:
    """Run a training with one fault, and return its row of the table."""
    if name in cancels.TABLE:
        return _cancelled(bench, name)
    if name == STORE:
        return _store_unreachable(bench)
    if name == DISK:
        run_dir = bench.folder / "disk" / "debug"
        run_dir.mkdir(parents=True)
        (run_dir / "checkpoints").symlink_to(bench.cluster.root / "small")
        run = bench.submit("disk")
        return disturb(bench, name, faults.disk_full, run)
    if name == FEWER:
        run = bench.submit("fewer", "restart.min_nodes=1", options=("--nodes=1-3",))
        row = disturb(bench, name, faults.gpus_failed_on_all_nodes_but_one, run, FEWER_TOLERANCE)
        if "NOT COMPARED WITH ITS PLAN" in run.log or not (run.run_dir / "plan-1-ranks.json").exists():
            row.differences.append("the run was not compared with the plan of one rank")
        return row
    if name == TRACKER:
        return _tracker_unreachable(bench)
    options: tuple[str, ...] = ("--time=300", "--signal=B:USR1@150")
    extra = ["telemetry.trackers=[mlflow]"] if name.startswith("USR1") else []
    hang = ["train.hang_timeout_sec=30"] if "SIGSTOP" in name else []
    run = bench.submit(name.replace(" ", "-"), *extra, *hang, options=options)
    row = disturb(bench, name, faults.TABLE[name], run)
    if extra:
        row.note += f"; MLflow runs: {_num_mlflow_runs(run)}"
    return row


STORE, DISK, TRACKER = "store unreachable for 20 s, a rank killed", "disk full in a save", "tracker unreachable"
FEWER = "GPUs fail on all nodes but one"
FEWER_TOLERANCE = 1e-4
"""The largest relative difference in losses and gradient norms after the number of ranks has changed."""


def _cancelled(bench: Bench, name: str) -> Row:
    """Cancel a job, submit it again, and return the row of the table."""
    run = bench.submit(name.replace(" ", "-"))
    wrong = cancels.cancel(name, run)
    again = bench.submit(name, folder=run.folder)
    again.wait_end()
    return Row(name, 2, None, "resumed by the same sbatch", [*wrong, *bench.differences(again)])


def _store_unreachable(bench: Bench) -> Row:
    with swift.running(bench.folder / "swift", host=bench.cluster.address) as server:
        server.make_bucket("bucket")
        server.upload(bench.shards, "bucket", "shards")
        run = bench.submit("store", shards="s3://bucket/shards", env=server.environ)

        def stop(run: Run) -> float:
            # The small corpus may already be in memory. A rank is killed as well, so that the data must be read again.
            server.kill_proxy()
            start = faults.rank_killed(run)
            time.sleep(20)
            server.start_proxy()
            return start

        return disturb(bench, STORE, stop, run)


def _tracker_unreachable(bench: Bench) -> Row:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    address = bench.cluster.address
    with faults.mlflow_server(bench.folder / "mlflow", address, port) as server:
        env = {"MLFLOW_TRACKING_URI": f"http://{address}:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        run = bench.submit("tracker", "telemetry.trackers=[mlflow]", env=env)

        def stop(run: Run) -> float:
            faults.end_group(server)
            return time.time()

        row = disturb(bench, TRACKER, stop, run)
        row.note += "the log says that records are lost" * ("RECORDS ARE BEING LOST" in run.log)
        return row


def _num_mlflow_runs(run: Run) -> int:
    import sqlite3

    with sqlite3.connect(run.folder / "mlflow.db") as database:
        return int(database.execute("select count(*) from runs").fetchone()[0])


def main(words: Sequence[str]) -> int:
    """Run the test as a command."""
    reason = why_not()
    if reason:
        print(f"error: Slurm cannot run on this machine: {reason}", file=sys.stderr)
        return 2
    names = [
        n
        for n in [*faults.TABLE, *cancels.TABLE, STORE, DISK, TRACKER, FEWER]
        if not words or any(w in n for w in words)
    ]
    folder, failed = scratch(), False
    cluster = Cluster(folder / "slurm", num_nodes=3)
    cluster.small_disk(num_mib=16)
    with running(cluster):
        bench = Bench(cluster, folder)
        print(start_times(bench.run_whole()), flush=True)
        print(HEADER, flush=True)
        for name in names:
            cluster.wait_idle()
            try:
                row = run_one(bench, name)
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                row = Row(name, 0, None, "", [str(error)])
                cluster.run("scancel", "--user=root")
            failed |= bool(row.differences)
            print(row, flush=True)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
