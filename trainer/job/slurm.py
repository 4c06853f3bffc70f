"""The resources of a Slurm job, and the commands that query and change it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.errors import UserError
from trainer.parallel.environment import whole_number

_CONTROLLER_SEC = 600.0
"""The time in seconds for which a command is repeated if the Slurm controller does not answer. It may be restarting."""
_ASK_SEC = 60.0


@dataclass(frozen=True)
class Allocation:
    """The resources of a running job."""

    job_id: int
    restarts: int
    """The number of times Slurm has restarted this job."""
    nodes: tuple[str, ...]
    tasks_per_node: int
    """The value of --ntasks-per-node if it was given, otherwise the number of GPUs per node."""
    cpus_per_task: int
    gpus_per_node: int
    """The number of GPUs requested per node; if it is 0, ranks compute on CPUs."""

    @staticmethod
    def read(environ: Mapping[str, str]) -> Allocation:
        """Read the allocation from the environment variables of a batch script.

        Raises:
            UserError: If the job has neither GPUs nor --ntasks-per-node, or a variable is missing or malformed.
        """
        job_id = whole_number(environ, "SLURM_JOB_ID")
        listed = environ.get("SLURM_JOB_NODELIST", "")
        nodes = _ask(["scontrol", "show", "hostnames", listed]).split()
        # In an exclusive job, SLURM_GPUS_ON_NODE counts all GPUs of the node, not only those requested.
        asked = environ.get("SLURM_GPUS_PER_NODE") or environ.get("SLURM_GPUS_ON_NODE") or "0"
        gpus = _num_gpus(asked)
        tasks = whole_number(environ, "SLURM_NTASKS_PER_NODE", gpus)
        if not nodes or not tasks:
            raise UserError(
                "the job has no GPUs: submit it with sbatch --gpus-per-node=N, or with --ntasks-per-node=N to use CPUs"
            )
        return Allocation(
            job_id,
            whole_number(environ, "SLURM_RESTART_COUNT", 0),
            tuple(nodes),
            tasks,
            whole_number(environ, "SLURM_CPUS_PER_TASK", 1),
            gpus,
        )

    @staticmethod
    def asked(environ: Mapping[str, str]) -> Allocation | None:
        """Return the resources that `slurm/submit.sh` will request, according to the variables that it sets.

        Args:
            environ: SUBMIT_NODES, SUBMIT_NTASKS_PER_NODE and SUBMIT_GPUS_PER_NODE have the values of sbatch's options
                `--nodes`, `--ntasks-per-node` and `--gpus-per-node`. They are empty or missing if an option is not
                given.

        Returns:
            The resources, whose nodes have no names yet; None if the number of nodes or of tasks per node is unknown.
        """
        most = environ.get("SUBMIT_NODES", "").rpartition("-")[2]  # In a range such as 2-4, this is the second number.
        gpus = _num_gpus(environ.get("SUBMIT_GPUS_PER_NODE", ""))
        tasks = environ.get("SUBMIT_NTASKS_PER_NODE") or str(gpus)
        if not all(number.isascii() and number.isdigit() and int(number) for number in (most, tasks)):
            return None
        return Allocation(0, 0, ("",) * int(most), int(tasks), 1, gpus)


@dataclass(frozen=True)
class Layout:
    """The distribution of ranks over nodes: consecutive ranks, such as a tensor-parallel group, share a node."""

    num_nodes: int
    """The number of nodes that the ranks need; the job's remaining nodes are spares."""
    ranks_per_node: int


def _num_gpus(asked: str) -> int:
    """Return the number of GPUs in a value such as `4`, `h100:4`, `h100` (one) or `a100:2,h100:2`."""
    counts = [entry.partition("(")[0].rpartition(":")[2].strip() for entry in asked.split(",")]
    return sum(int(count) if count.isascii() and count.isdigit() else 1 for count in counts if count)


def lay_out(allocation: Allocation, num_ranks: int, tensor: int) -> Layout:
    """Distribute ranks over as few nodes as possible.

    Args:
        allocation: The job's resources.
        num_ranks: The number of ranks.
        tensor: The size of a tensor-parallel group.

    Raises:
        UserError: If the job has too few tasks, the ranks do not fill their nodes, or a tensor-parallel group would
            span several nodes.
    """
    per_node = min(allocation.tasks_per_node, num_ranks)
    if num_ranks % per_node:
        raise UserError(
            f"parallel.num_ranks = {num_ranks}: must be a multiple of {per_node}, the number of tasks "
            "per node, because ranks must fill their nodes"
        )
    num_nodes = num_ranks // per_node
    if num_nodes > len(allocation.nodes):
        raise UserError(
            f"parallel.num_ranks = {num_ranks} needs {num_nodes} nodes of {per_node} tasks, but the job has "
            f"{len(allocation.nodes)}: use sbatch --nodes={num_nodes}, or set parallel.num_ranks="
            f"{len(allocation.nodes) * allocation.tasks_per_node}"
        )
    if per_node % tensor:
        allowed = ", ".join(str(d) for d in range(1, per_node + 1) if per_node % d == 0)
        raise UserError(
            f"parallel.tensor = {tensor}: its ranks would be on several nodes of {per_node} tasks each; "
            f"set it to one of {allowed}"
        )
    return Layout(num_nodes, per_node)


def srun(
    allocation: Allocation,
    nodes: Sequence[str],
    tasks_per_node: int,
    module: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """Return the command that runs a Python module as tasks of a job step.

    If a task fails, srun leaves the others running for a minute, so that they can notice the failure and report their
    state.

    Args:
        allocation: The job's resources.
        nodes: The names of the nodes to use.
        tasks_per_node: The number of tasks per node.
        module: The module's name, followed by its arguments.
        environ: The environment. `SRUN_OPTIONS` adds options for srun; `RANK_PYTHON` replaces this process's Python.
    """
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={allocation.cpus_per_task}",
        "--distribution=block",
        "--cpu-bind=cores",
        "--gpu-bind=none",  # Every task sees all GPUs of its node and uses the one with the index of its local rank.
        "--kill-on-bad-exit=0",
        "--wait=60",
        *shlex.split(environ.get("SRUN_OPTIONS", "")),
        *(shlex.split(environ.get("RANK_PYTHON", "")) or [sys.executable]),
        "-u",
        "-m",
        *module,
    ]


@dataclass(frozen=True)
class JobState:
    """The state of a job, as reported by the Slurm controller."""

    name: str
    """Slurm's name of the state, for example RUNNING or CANCELLED."""
    restarts: int
    """The number of times Slurm has restarted the job."""
    reason: str = "None"
    """Slurm's reason for the state, for example TimeLimit. It is the text `None` if a person cancelled the job."""
    is_preempted: bool = False
    """Whether Slurm is taking the job's nodes for another job."""

    @property
    def is_ending(self) -> bool:
        """Whether the job was cancelled or is completing. Its processes may still run for a moment."""
        return self.name in ("CANCELLED", "COMPLETING")

    @property
    def is_cancelled(self) -> bool:
        """Whether a person has cancelled the job, so that Slurm does not run it again."""
        return self.is_ending and self.reason == "None"

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended and none of its processes still runs."""
        return self.name in ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def job_state(job_id: int) -> JobState:
    """Return the state of a job. If the controller does not answer, wait for it.

    Raises:
        UserError: If the controller has not answered for ten minutes.
    """
    return _state(_persist(["scontrol", "show", "job", "-o", str(job_id)]))


def job_state_now(job_id: int) -> JobState | None:
    """Return the state of a job; None if the controller does not answer now, or does not know the job."""
    try:
        text = _ask(["scontrol", "show", "job", "-o", str(job_id)])
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return _state(text) if "JobState=" in text else None


def cancel(job_id: int) -> None:
    """Make Slurm end a job, so that its state is CANCELLED.

    Raises:
        UserError: If Slurm refuses, or the controller has not answered for ten minutes.
    """
    _persist(["scancel", str(job_id)], ended_is_done=True)


def _state(line: str) -> JobState:
    fields = _fields(line)
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    return JobState(fields["JobState"], int(fields["Restarts"]), fields.get("Reason", "None"), preempted)


def requeue(job_id: int) -> None:
    """Make Slurm run a job again from its beginning. Slurm ends the running job with SIGTERM.

    Raises:
        UserError: If Slurm refuses, or the controller has not answered for ten minutes.
    """
    _persist(["scontrol", "requeue", str(job_id)], ended_is_done=True)


def exclude(job_id: int, nodes: Sequence[str]) -> None:
    """Exclude `nodes` from the nodes that a requeued job may use.

    Raises:
        UserError: If Slurm refuses, or the controller has not answered for ten minutes.
    """
    before = _fields(_persist(["scontrol", "show", "job", "-o", str(job_id)])).get("ExcNodeList", "(null)")
    listed = [*nodes, *([] if before == "(null)" else [before])]
    _persist(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(listed)}"])


def unavailable(nodes: Sequence[str]) -> list[str]:
    """Return the nodes in `nodes` that Slurm cannot reach or does not use."""
    lines = _ask(["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T"]).splitlines()
    states = dict(line.split() for line in lines if len(line.split()) == 2)
    return sorted(
        n for n, state in states.items() if state.endswith("*") or state.startswith(("down", "drain", "fail"))
    )


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _ask(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ASK_SEC).stdout


def _persist(command: Sequence[str], ended_is_done: bool = False) -> str:
    """Run a Slurm command until the controller answers, and return its output.

    When Slurm ends the job's processes with SIGTERM, the command itself may be one of them. It is then repeated, unless
    `ended_is_done` is true, as for commands that cause the job to end.

    Raises:
        UserError: If Slurm refuses, or the controller has not answered for ten minutes.
    """
    deadline = time.monotonic() + _CONTROLLER_SEC
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 or (done.returncode < 0 and ended_is_done):
            return done.stdout
        message = " ".join(done.stderr.split())
        unreachable = "Unable to contact" in message or "timed out" in message or "Connection" in message
        if not (unreachable or done.returncode < 0) or time.monotonic() > deadline:
            raise UserError(f"{' '.join(command)} failed: {message}")
        time.sleep(2 if unreachable else 0)
