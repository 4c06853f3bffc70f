"""What a batch script knows of its Slurm job, and what it may ask for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from model.errors import UserError

_CONTROLLER_SEC = 600.0
"""How long a controller that does not answer is asked again: it may be restarting."""


@dataclass(frozen=True)
class Allocation:
    """A running job's resources."""

    job_id: int
    restarts: int
    """How often Slurm has started this job anew."""
    nodes: tuple[str, ...]
    tasks_per_node: int
    """One per GPU, or as --ntasks-per-node says."""
    cpus_per_task: int
    gpus_per_node: int
    """0: none were asked for; ranks then compute on CPUs."""

    @staticmethod
    def read(environ: Mapping[str, str]) -> Allocation:
        """From the variables of a batch script.

        Raises:
            UserError: one is missing.
        """
        listed = environ.get("SLURM_JOB_NODELIST", "")
        nodes = _ask(["scontrol", "show", "hostnames", listed]).split()
        # An exclusive job is told of all GPUs of its nodes by SLURM_GPUS_ON_NODE, whatever it asked for.
        asked = environ.get("SLURM_GPUS_PER_NODE") or environ.get("SLURM_GPUS_ON_NODE") or "0"
        gpus = int(asked.rpartition(":")[2])
        tasks = int(environ.get("SLURM_NTASKS_PER_NODE") or gpus)
        if not nodes or not tasks:
            raise UserError("the job has no GPUs: sbatch --gpus-per-node=N, or --ntasks-per-node=N to use CPUs")
        return Allocation(
            int(environ["SLURM_JOB_ID"]),
            int(environ.get("SLURM_RESTART_COUNT", "0")),
            tuple(nodes),
            tasks,
            int(environ.get("SLURM_CPUS_PER_TASK", "1")),
            gpus,
        )


@dataclass(frozen=True)
class Layout:
    """How ranks lie on nodes: in blocks, so that neighbouring ranks (a tensor-parallel group) share one."""

    num_nodes: int
    """So many are needed; the job's others are spares."""
    ranks_per_node: int


def lay_out(allocation: Allocation, num_ranks: int, tensor: int) -> Layout:
    """Full nodes first.

    Raises:
        UserError: too few tasks; ranks do not fill their nodes; a tensor-parallel group would span two nodes.
    """
    per_node = min(allocation.tasks_per_node, num_ranks)
    if num_ranks % per_node:
        raise UserError(
            f"parallel.num_ranks = {num_ranks}: not a multiple of the {per_node} tasks of a node; "
            "ranks must fill their nodes"
        )
    num_nodes = num_ranks // per_node
    if num_nodes > len(allocation.nodes):
        raise UserError(
            f"parallel.num_ranks = {num_ranks} needs {num_nodes} nodes of {per_node} tasks, the job has "
            f"{len(allocation.nodes)}: sbatch --nodes={num_nodes}, or parallel.num_ranks="
            f"{len(allocation.nodes) * allocation.tasks_per_node}"
        )
    if per_node % tensor:
        legal = ", ".join(str(d) for d in range(1, per_node + 1) if per_node % d == 0)
        raise UserError(
            f"parallel.tensor = {tensor}: its ranks would lie on several nodes of {per_node} tasks each; "
            f"legal values are {legal}"
        )
    return Layout(num_nodes, per_node)


def srun(
    allocation: Allocation,
    nodes: Sequence[str],
    tasks_per_node: int,
    module: Sequence[str],
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """The command line that starts a Python module, with its arguments, as tasks of a job step on `nodes`.

    A task that fails leaves the others a minute: they notice by themselves, and tell what they were doing.

    Args:
        environ: SRUN_OPTIONS, more options of srun; RANK_PYTHON, the Python command, else this process's.
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
        "--gpu-bind=none",  # every task sees all GPUs of its node and takes the one of its local rank
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
    """What the controller says of the job."""

    name: str
    """RUNNING, CANCELLED, …"""
    restarts: int


def job_state(job_id: int) -> JobState:
    """Asks until the controller answers.

    Raises:
        UserError: it does not, for ten minutes.
    """
    fields = _fields(_persist(["scontrol", "show", "job", "-o", str(job_id)]))
    return JobState(fields["JobState"], int(fields["Restarts"]))


def requeue(job_id: int) -> None:
    """Have Slurm run the job again from its beginning; this one is then ended by SIGTERM.

    Raises:
        UserError: refused, or no answer for ten minutes.
    """
    _persist(["scontrol", "requeue", str(job_id)], ended_is_done=True)


def exclude(job_id: int, nodes: Sequence[str]) -> None:
    """Keep a job that waits to run again from `nodes`. Raises UserError."""
    before = _fields(_persist(["scontrol", "show", "job", "-o", str(job_id)])).get("ExcNodeList", "(null)")
    listed = [*nodes, *([] if before == "(null)" else [before])]
    _persist(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(listed)}"])


def unavailable(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` that Slurm cannot reach, or will not use."""
    lines = _ask(["sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T"]).splitlines()
    states = dict(line.split() for line in lines if len(line.split()) == 2)
    return sorted(
        n for n, state in states.items() if state.endswith("*") or state.startswith(("down", "drain", "fail"))
    )


def _fields(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _ask(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _persist(command: Sequence[str], ended_is_done: bool = False) -> str:
    """Output of a command of Slurm's, asked again while the controller is away.

    Slurm ends a job's processes with SIGTERM, its own commands among them: they are asked again, too, unless it is they
    that have brought this about (`ended_is_done`).
    """
    deadline = time.monotonic() + _CONTROLLER_SEC
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 or (done.returncode < 0 and ended_is_done):
            return done.stdout
        said = " ".join(done.stderr.split())
        away = "Unable to contact" in said or "timed out" in said or "Connection" in said
        if not (away or done.returncode < 0) or time.monotonic() > deadline:
            raise UserError(f"{' '.join(command)}: {said}")
        time.sleep(2 if away else 0)
