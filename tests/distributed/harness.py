"""A harness that calls a function on several ranks. The ranks are local processes and communicate with gloo.

`run_ranks(4, "tests.distributed.test_x:body", {"tp": 2})` calls `body(tp=2)` on four ranks and returns their results,
which must be JSON values. If a rank fails or the deadline passes, the harness ends all ranks and raises an error with
the last lines of their stderr.

Ranks are forked from a server that has already imported the engines (`tests.distributed.preload`). Otherwise, each rank
would need several seconds for these imports. Tests of how ranks are started use `trainer.run.launch` instead.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STDERR_TAIL_BYTES = 4000


def run_ranks(
    world: int,
    target: str | Callable[..., Any],
    kwargs: Mapping[str, Any] | None = None,
    timeout_sec: float = 120.0,
) -> list[Any]:
    """Call a function on `world` ranks, and return their results.

    The environment of a rank contains RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. The
    function must create its own process group.

    Args:
        world: The number of ranks.
        target: The function, or its name as "module:function". It must be importable.
        kwargs: Its arguments, which must be JSON values.
        timeout_sec: The number of seconds after which the harness ends all ranks.

    Returns:
        The ranks' return values, by rank.

    Raises:
        AssertionError: If a rank failed or the deadline passed. No rank is left running.
    """
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    port = _free_port()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = []
        try:
            for rank in range(world):
                ranks.append(_start(rank, world, port, name, dict(kwargs or {}), Path(scratch)))
            _wait(ranks, Path(scratch), time.monotonic() + timeout_sec, timeout_sec)
        finally:
            _kill(ranks)
        return [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(world)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@lru_cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept]))  # the server finds the preloaded module
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if kept is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = kept
    return context


def _start(rank: int, world: int, port: int, name: str, kwargs: dict[str, Any], scratch: Path) -> ForkServerProcess:
    variables = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    process = _context().Process(target=_run, args=(name, kwargs, str(scratch / str(rank)), variables))
    process.start()
    return process


def _run(name: str, kwargs: dict[str, Any], files: str, variables: dict[str, str]) -> None:
    """Run a rank, and write its stdout, stderr and result to `files`.out, .err and .json."""
    os.setsid()  # a session of its own, so that the rank's children are killed with it
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        with open(f"{files}.{suffix}", "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    warnings.filterwarnings("ignore")
    module, function = name.split(":")
    value = getattr(importlib.import_module(module), function)(**kwargs)
    Path(f"{files}.json").write_text(json.dumps(value))


def _wait(ranks: list[ForkServerProcess], scratch: Path, deadline: float, timeout_sec: float) -> None:
    while True:
        codes = [process.exitcode for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            # Another rank's failure may be the cause, so its error must be shown as well.
            time.sleep(0.5)
            codes = [process.exitcode for process in ranks]
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            raise AssertionError(f"ranks {failed} of {len(ranks)} failed{_tails(failed, scratch)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            hung = [rank for rank, code in enumerate(codes) if code is None]
            raise AssertionError(
                f"ranks {hung} of {len(ranks)} were still running after {timeout_sec} s{_tails(hung, scratch)}"
            )
        time.sleep(0.05)


def _tails(which: list[int], scratch: Path) -> str:
    tails = ""
    for rank in which:
        text = (scratch / f"{rank}.err").read_bytes()[-STDERR_TAIL_BYTES:].decode(errors="replace")
        tails += f"\n--- rank {rank}, end of stderr ---\n{text}"
    return tails


def _kill(ranks: list[ForkServerProcess]) -> None:
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # kills its children
        except ProcessLookupError:
            pass
