"""Functions that cause a fault in a run. Each function causes one fault and returns the time at which it occurred."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.harness import Bench, Run
from tests.services.slurm import NODE_DOWN_SEC

Fault = Callable[[Run], float]


def time_limit(run: Run) -> float:
    """Shorten the time limit, so that Slurm sends USR1 to the batch script as `--signal` requests.

    Slurm checks limits every half minute. Until then, the ranks are frozen so that the run does not finish.
    """
    cluster = run.bench.cluster
    ranks = [run.rank_pid(node) for node in run.nodes()]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    minutes = int((time.time() - run.submitted_at) // 60) + 2
    cluster.run("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={minutes}")
    run.wait(lambda: "received SIGUSR1" in run.log, "no warning comes")
    start = time.time()
    cluster.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=300")
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    return start


def warning(run: Run) -> float:
    """Send USR1 to the batch script."""
    run.bench.cluster.run("scancel", "--batch", "--signal=USR1", str(run.job_id))
    return time.time()


def preemption(run: Run) -> float:
    """Submit a job that needs all nodes to a partition of higher priority."""
    cluster = run.bench.cluster
    start = time.time()
    options = ["--partition=urgent", f"--nodes={cluster.num_nodes}", "--exclusive", "--output=/dev/null"]
    other = cluster.submit(*options, "--wrap=sleep 3", cwd=run.folder)
    run.wait(lambda: cluster.job(other).get("JobState") == "COMPLETED", "the other job does not get its nodes")
    return start


def requeue(run: Run) -> float:
    """Call `scontrol requeue`."""
    run.bench.cluster.run("scontrol", "requeue", str(run.job_id))
    return time.time()


def power_cut_of_batch_host(run: Run) -> float:
    """Switch off the node of the batch script, and switch it on again once the job has restarted."""
    return _power_cut(run, int(_nodes_of_job(run)[0]))


def power_cut(run: Run) -> float:
    """Switch off a node other than that of the batch script, and switch it on again once the job has restarted."""
    first, *others = _nodes_of_job(run)
    return _power_cut(run, next(n for n in run.nodes() if n in others))


def network_cut(run: Run) -> float:
    """Disconnect a node other than that of the batch script for a while. Its processes continue."""
    cluster = run.bench.cluster
    first, *others = _nodes_of_job(run)
    node, before = next(n for n in run.nodes() if n in others), len(run.events("submitted"))
    cluster.cut(node)
    start = time.time()
    run.wait(lambda: len(run.events("submitted")) > before, "the job does not start again")
    cluster.heal(node)
    return start


def rank_killed(run: Run) -> float:
    """Send SIGKILL to one rank."""
    return _signal_rank(run, signal.SIGKILL)


def gpu_failed(run: Run) -> float:
    """Make a GPU report memory errors and kill its rank. The next attempt must not use the node."""
    cluster, node, before = run.bench.cluster, run.nodes()[-1], run.log.count("ranks start on")
    cluster.gpus(node, num_errors=7)
    os.kill(run.rank_pid(node), signal.SIGKILL)
    start = time.time()
    run.wait(lambda: run.log.count("ranks start on") > before, "the job does not start again")
    assert node not in run.nodes(), run.log[-3000:]
    cluster.gpus(node)
    return start


def gpus_failed_on_all_nodes_but_one(run: Run) -> float:
    """Kill a rank, and let GPUs of all nodes except that of rank 0 report memory errors until the job continues."""
    cluster, (first, *_, last) = run.bench.cluster, run.nodes()
    bad = [node for node in range(1, cluster.num_nodes + 1) if node != first]
    for node in bad:
        cluster.gpus(node, num_errors=7)
    os.kill(run.rank_pid(last), signal.SIGKILL)
    start = time.time()
    run.wait(lambda: bool(run.events("fewer_nodes")), "the job does not continue on fewer nodes")
    run.wait(lambda: run.nodes() == [first], "the ranks do not start on the node that is left")
    for node in bad:
        cluster.gpus(node)
    return start


def rank_stopped(run: Run) -> float:
    """Send SIGSTOP to one rank, which then exists but does nothing."""
    return _signal_rank(run, signal.SIGSTOP)


def controller_killed(run: Run) -> float:
    """Stop slurmctld for a while, and kill a rank in this time, so that the job cannot be requeued immediately."""
    cluster = run.bench.cluster
    cluster.kill_controller()
    time.sleep(1.0)
    start = _signal_rank(run, signal.SIGKILL)
    time.sleep(8.0)
    cluster.start_controller()
    return start


def disk_full(run: Run) -> float:
    """Fill the disk of the checkpoints during one save, and free it before the next one."""
    ballast = run.run_dir / "checkpoints" / "ballast"
    start = time.time()
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            pass
    try:
        run.wait(lambda: "NOT SAVED" in run.log, "the save does not fail")
    finally:
        ballast.unlink()
    return start


@contextmanager
def mlflow_server(folder: Path, address: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start an MLflow tracking server at `address`, and stop it at the end of the context."""
    folder.mkdir(parents=True)
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", address, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1", "--allowed-hosts", "*"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not _healthy(f"http://{address}:{port}/health"):
            assert time.monotonic() < deadline and server.poll() is None, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.5)
        yield server
    finally:
        end_group(server)


def end_group(server: subprocess.Popen[bytes]) -> None:
    """Kill a server and its child processes with SIGKILL."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _nodes_of_job(run: Run) -> list[int]:
    """Return the numbers of all nodes of the job. The first node runs the batch script."""
    last = run.events("submitted")[-1]
    return [int(name.removeprefix("n")) for name in str(last["nodes"]).split(",")]


def _power_cut(run: Run, node: int) -> float:
    cluster = run.bench.cluster
    before = len(run.events("submitted"))
    cluster.kill_node(node)
    start = time.time()
    run.wait(lambda: len(run.events("submitted")) > before, "the job does not start again")
    cluster.start_node(node)
    return start


def _signal_rank(run: Run, number: signal.Signals) -> float:
    os.kill(run.rank_pid(run.nodes()[-1]), number)
    return time.time()


TABLE: dict[str, Fault] = {
    "USR1 before the time limit": time_limit,
    "preemption by a higher partition": preemption,
    "scontrol requeue": requeue,
    "power cut of the batch host": power_cut_of_batch_host,
    "power cut of another node": power_cut,
    "network cut": network_cut,
    "one rank SIGKILLed": rank_killed,
    "one rank SIGSTOPped": rank_stopped,
    "one GPU fails": gpu_failed,
    "slurmctld killed, then a rank": controller_killed,
}
"""The faults that end an attempt, by name. `fault_table` has more faults, which need special runs."""

__all__ = ["NODE_DOWN_SEC", "TABLE", "Bench", "Fault", "disk_full", "end_group", "mlflow_server", "warning"]
