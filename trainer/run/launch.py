"""The processes of a run, one per rank. This module finds the rank of a process and starts all ranks on one machine.

The same program can be started by `torchrun`, by DeepSpeed's launcher or by `srun`. Without any of these, it starts its
ranks itself.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from trainer.parallel.environment import whole_number

_ERROR_DIR = "TRAINER_ERROR_DIR"
"""The environment variable with the folder to which ranks write the message of a user error.

The launcher prints each message once. The variable is set only for ranks that this module started.
"""

_MEETING_FILE = "EARSHOT_MEETING_FILE"
"""The environment variable with the path to the file in which the ranks of one machine meet, in a folder that only this
user can open. `trainer/parallel/meeting.py` reads it."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GRACE_SEC = 20.0


@dataclass(frozen=True)
class RankEnv:
    """The place of this process among all ranks."""

    rank: int
    local_rank: int
    """The index among the ranks on this machine, which is also the index of the rank's GPU."""
    world_size: int


def rank_env(environ: Mapping[str, str], num_ranks: int) -> RankEnv | None:
    """Return the place among all ranks that a launcher assigned to this process.

    A single Slurm task, such as an interactive shell, does not count as a launcher if the recipe needs several ranks.

    Args:
        environ: The environment variables.
        num_ranks: The number of ranks that the recipe needs.

    Returns:
        The place of this process, or None if no launcher started it as one of the ranks.

    Raises:
        UserError: If the variables of the launcher are incomplete or malformed.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _read(environ, "RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "SLURM_STEP_NUM_TASKS" not in environ:  # The batch script is not a task.
        return None
    if environ["SLURM_STEP_NUM_TASKS"] == "1" and num_ranks > 1:
        return None
    return _read(environ, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the address and port at which the ranks connect.

    These are MASTER_ADDR and MASTER_PORT if they are set. Otherwise, the address is Slurm's first host, and the port is
    derived from the job step. Each restart and each step of a job has a different port, because the port of an earlier
    step may still be in use.

    Raises:
        UserError: If neither MASTER_ADDR nor Slurm's list of nodes is set, or a number is malformed.
    """
    address = environ.get("MASTER_ADDR")
    if not address:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise UserError("MASTER_ADDR is not set: use torchrun, deepspeed or srun, or set it to rank 0's host")
        address = first_host(nodes)
    if environ.get("MASTER_PORT"):
        port = whole_number(environ, "MASTER_PORT")
        if not 0 < port < 1 << 16:
            raise UserError(f"MASTER_PORT = {port}: must be a port from 1 to 65535")
        return address, port
    job, restart, step = (
        whole_number(environ, name, 0) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    )
    return address, 20_000 + (job + 101 * restart + 11 * step) % 10_000


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm node list, for example `gpu003` for `gpu[003-010,12],x5`."""
    depth, end = 0, len(nodes)
    for i, char in enumerate(nodes):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes[:end])


def join(env: RankEnv) -> None:
    """Set the environment variables that torch and DeepSpeed read. Call this function before importing either.

    Raises:
        UserError: If the address of the first rank is unknown (see `rendezvous`).
    """
    address, port = rendezvous(os.environ)
    os.environ |= {
        "RANK": str(env.rank),
        "LOCAL_RANK": str(env.local_rank),
        "WORLD_SIZE": str(env.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # DeepSpeed looks for ninja in PATH, and ninja may be next to the interpreter.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    if _ERROR_DIR in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1  # A rank must not outlive a launcher that was killed.
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def report_error(message: str) -> None:
    """Report a user error to the launcher if this module started the rank, and on stderr otherwise."""
    folder = os.environ.get(_ERROR_DIR)
    if folder is None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        Path(folder, os.environ.get("RANK", "0")).write_text(message, encoding="utf-8")


def start_ranks(num_ranks: int, command: Sequence[str]) -> int:
    """Run a command once per rank on this machine, and wait until all ranks have ended.

    If a rank fails, the others are terminated. Signals are forwarded to all ranks.

    Args:
        num_ranks: The number of ranks.
        command: The command of each rank.

    Returns:
        The exit code: 0 if all ranks succeeded, 2 if a rank reported a user error, and otherwise the exit code of the
        first rank that failed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_ranks))),
    }
    with (
        tempfile.TemporaryDirectory(prefix="ranks-") as errors,
        tempfile.TemporaryDirectory(prefix="meeting-") as meeting,
    ):
        shared[_MEETING_FILE] = str(Path(meeting, "store"))
        ranks: list[subprocess.Popen[bytes]] = []
        forwarded = [s for s in _FORWARDED if signal.getsignal(s) is not signal.SIG_IGN]  # nohup ignores SIGHUP.
        previous = {s: signal.signal(s, lambda number, _frame: _send(ranks, number)) for s in forwarded}
        try:
            for rank in range(num_ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _ERROR_DIR: errors}
                # In its own session, a rank receives Ctrl-C only once, through the launcher.
                ranks.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, start_new_session=True))
            code = _wait(ranks)
        finally:
            _end(ranks)
            for number, handler in previous.items():
                signal.signal(number, handler)
        messages = dict.fromkeys(p.read_text(encoding="utf-8") for p in sorted(Path(errors).iterdir()))
        for message in messages:
            print(f"error: {message}", file=sys.stderr, flush=True)
    return 2 if messages else code


def _read(environ: Mapping[str, str], rank: str, local_rank: str, world_size: str) -> RankEnv:
    try:
        return RankEnv(int(environ[rank]), int(environ[local_rank]), int(environ[world_size]))
    except KeyError as error:
        names = f"{rank}, {local_rank} and {world_size}"
        raise UserError(f"{error.args[0]} is not set: the launcher must set {names}") from None
    except ValueError as error:
        raise UserError(f"{rank}, {local_rank}, {world_size} must be whole numbers ({error})") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have succeeded or one has failed.

    Returns:
        0, or the exit code of the first rank that failed (128 + signal number if a signal ended it).
    """
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [c for c in codes if c not in (None, 0)]
        if failed:
            code = failed[0]
            assert code is not None
            return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(0.05)


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SEC
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
