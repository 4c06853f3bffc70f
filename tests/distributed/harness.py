"""Run a function on several gloo ranks, each its own process, without a launcher.

`run_ranks(4, "tests.distributed.test_x:body", {"tp": 2})` calls `body(tp=2)` on four ranks and returns what each of
them returned (JSON values). The first rank that fails, or the deadline, ends all of them; the error shows the ends of
their stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STDERR_TAIL_BYTES = 4000


def run_ranks(
    world: int,
    target: str | Callable[..., Any],
    kwargs: Mapping[str, Any] | None = None,
    timeout_sec: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call `target` ("module:function", or an importable function) with `kwargs` (JSON values) on `world` ranks.

    Ranks find RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in their environment; the
    function makes its own process group.

    Returns:
        The ranks' return values, by rank.

    Raises:
        AssertionError: a rank failed or the deadline passed; no rank is left running.
    """
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    port = _free_port()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = []
        try:
            for rank in range(world):
                ranks.append(_start(rank, world, port, name, dict(kwargs or {}), Path(scratch), dict(env or {})))
            _wait(ranks, Path(scratch), time.monotonic() + timeout_sec, timeout_sec)
        finally:
            _kill(ranks)
        return [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(world)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    rank: int, world: int, port: int, name: str, kwargs: dict[str, Any], scratch: Path, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": search,
        "PYTHONWARNINGS": "ignore",
        **env,
    }
    command = [
        sys.executable,
        "-m",
        "tests.distributed.harness",
        name,
        json.dumps(kwargs),
        str(scratch / f"{rank}.json"),
    ]
    with open(scratch / f"{rank}.out", "wb") as out, open(scratch / f"{rank}.err", "wb") as err:
        # Its own session, so that a rank's children die with it.
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=err, start_new_session=True)


def _wait(ranks: list[subprocess.Popen[bytes]], scratch: Path, deadline: float, timeout_sec: float) -> None:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            # A peer's lost connection is a consequence: give the others a moment, so that the cause is shown too.
            time.sleep(0.5)
            codes = [process.poll() for process in ranks]
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            raise AssertionError(f"ranks {failed} of {len(ranks)} failed{_tails(failed, scratch)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            hung = [rank for rank, code in enumerate(codes) if code is None]
            raise AssertionError(f"ranks {hung} of {len(ranks)} still ran after {timeout_sec} s{_tails(hung, scratch)}")
        time.sleep(0.05)


def _tails(which: list[int], scratch: Path) -> str:
    tails = ""
    for rank in which:
        text = (scratch / f"{rank}.err").read_bytes()[-STDERR_TAIL_BYTES:].decode(errors="replace")
        tails += f"\n--- rank {rank}, end of stderr ---\n{text}"
    return tails


def _kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _main() -> None:
    name, kwargs, result = sys.argv[1:]
    module, function = name.split(":")
    value = getattr(importlib.import_module(module), function)(**json.loads(kwargs))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    _main()
