"""One process per rank: find out which rank this is, or start all ranks of one machine.

The same program runs under `torchrun`, under DeepSpeed's launcher, as a task of `srun`, or alone: then it starts its
own ranks.
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

_ERROR_DIR = "TRAINER_ERROR_DIR"
"""Set for ranks that this module started: a rank leaves a user's error there, so that the launcher prints it once."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_GRACE_SEC = 20.0


@dataclass(frozen=True)
class RankEnv:
    """Who this process is among all."""

    rank: int
    local_rank: int
    """Among the ranks of this machine: its GPU."""
    world_size: int


def rank_env(environ: Mapping[str, str], num_ranks: int) -> RankEnv | None:
    """This process's place as its launcher tells it; None: there is no launcher, or none that started `num_ranks`.

    A lone Slurm task (an interactive shell) counts as no launcher when the recipe wants several ranks.

    Raises:
        UserError: a launcher's variables are incomplete.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _read(environ, "RANK", "LOCAL_RANK", "WORLD_SIZE")
    if "SLURM_STEP_NUM_TASKS" not in environ:  # absent in the batch script itself, which is no task
        return None
    if environ["SLURM_STEP_NUM_TASKS"] == "1" and num_ranks > 1:
        return None
    return _read(environ, "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """(address, port) where ranks meet: MASTER_ADDR and MASTER_PORT, else Slurm's first host and a port of the step's.

    Every step of every start of a job has a port of its own: ranks of an earlier one may still be there.

    Raises:
        UserError: neither says where.
    """
    address = environ.get("MASTER_ADDR")
    if address is None:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
        if nodes is None:
            raise UserError("MASTER_ADDR is not set: use torchrun, deepspeed or srun, or set it to rank 0's host")
        address = first_host(nodes)
    port = environ.get("MASTER_PORT")
    if port is not None:
        return address, int(port)
    job, restart, step = (
        int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    )
    return address, 20_000 + (job + 101 * restart + 11 * step) % 10_000


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[003-010,12],x5` → `gpu003`."""
    depth, end = 0, len(nodes)
    for i, char in enumerate(nodes):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes[:end])


def join(env: RankEnv) -> None:
    """Put this rank's place into the variables that torch and DeepSpeed read. Call before importing either."""
    address, port = rendezvous(os.environ)
    os.environ |= {
        "RANK": str(env.rank),
        "LOCAL_RANK": str(env.local_rank),
        "WORLD_SIZE": str(env.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # DeepSpeed looks for ninja in PATH; an interpreter called by its path has its own beside it.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    if _ERROR_DIR in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1  # a rank must not outlive a launcher that was killed
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def report_error(message: str) -> None:
    """Show a user's error: to the launcher that started this rank, else on stderr."""
    folder = os.environ.get(_ERROR_DIR)
    if folder is None:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        Path(folder, os.environ.get("RANK", "0")).write_text(message, encoding="utf-8")


def start_ranks(num_ranks: int, command: Sequence[str]) -> int:
    """Run `command` as `num_ranks` ranks on this machine; returns the exit code.

    The first rank that fails decides it; the others are then ended. Signals are passed on to all ranks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_ranks))),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as errors:
        ranks: list[subprocess.Popen[bytes]] = []
        heeded = [s for s in _FORWARDED if signal.getsignal(s) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        previous = {s: signal.signal(s, lambda number, _frame: _send(ranks, number)) for s in heeded}
        try:
            for rank in range(num_ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), _ERROR_DIR: errors}
                # A session of its own: a terminal's Ctrl-C then reaches each rank once, through the launcher.
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
    """0 when all ranks have ended well; else the first failure's code, as soon as it happens (128 + signal number)."""
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
