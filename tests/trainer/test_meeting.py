"""Tests that ranks on one machine are unreachable from outside, and that ranks of other jobs cannot read the store."""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks
from trainer.parallel.groups import connect
from trainer.parallel.meeting import FILE, SECRET, on_one_machine, open_store
from trainer.run.launch import start_ranks

ROOT = Path(__file__).parents[2]
LISTEN = "0A"


def listening_addresses() -> list[str]:
    """Return the addresses, in hexadecimal notation, at which this process listens."""
    folder = Path("/proc/self/fd")
    links = [os.readlink(path) for path in folder.iterdir() if path.is_symlink()]
    own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in own:
                found.append(fields[1].partition(":")[0])
    return found


def meet() -> list[str]:
    _, world, _ = connect(timeout_sec=60)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert int(total) == world
    return listening_addresses()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_of_one_machine_listen_on_loopback_only() -> None:
    for addresses in run_ranks(2, meet):
        assert addresses and set(addresses) == {"0100007F"}  # 127.0.0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_of_the_launcher_meet_in_a_file(tmp_path: Path) -> None:
    code = (
        "import json, os, stat; from tests.trainer.test_meeting import meet; found = meet();"
        f"store = os.environ['{FILE}']; mode = stat.S_IMODE(os.stat(os.path.dirname(store)).st_mode);"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['RANK']), 'w').write(json.dumps([found, mode, store]))"
    )
    previous = os.getcwd()
    os.chdir(ROOT)
    try:
        assert start_ranks(2, [sys.executable, "-c", code]) == 0
    finally:
        os.chdir(previous)
    for rank in "01":
        addresses, mode, store = json.loads((tmp_path / rank).read_text())
        assert set(addresses) == {"0100007F"} and mode == 0o700
        assert not Path(store).parent.exists()


def test_ranks_of_another_job_find_nothing(tmp_path: Path) -> None:
    second = datetime.timedelta(seconds=1)
    environ = {FILE: str(tmp_path / "store"), SECRET: "a"}
    mine, same, other = (open_store(0, 2, second, environ | {SECRET: secret}) for secret in ("a", "a", "b"))
    mine.set("key", "value")
    assert same.get("key") == b"value"
    assert not other.check(["key"])


@pytest.fixture()
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Start a store as a torchrun agent does, and yield the environment variables of ranks that use it.

    The store remains until the end of the test.
    """
    agent = dist.TCPStore("127.0.0.1", 0, None, True, datetime.timedelta(seconds=20), wait_for_workers=False)
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in environ.items():  # `rendezvous` reads them
        monkeypatch.setenv(name, value)
    yield environ | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", SECRET: "a"}


def test_a_start_finds_nothing_of_the_former_start_in_the_store_of_torchrun(torchrun: dict[str, str]) -> None:
    """Check that ranks wait for all ranks of their own start, although the store has the keys of the former start."""

    def start(rank: int, delays: tuple[float, ...]) -> dist.Store:
        time.sleep(delays[rank])
        return open_store(rank, 3, datetime.timedelta(seconds=20), torchrun)

    with ThreadPoolExecutor(3) as threads:
        for attempt, delays in enumerate([(0.0, 0.0, 0.0), (0.3, 0.0, 0.6), (0.0, 0.3, 0.0)]):
            stores = list(threads.map(start, range(3), [delays] * 3))
            assert not any(store.check(["address"]) for store in stores)
            stores[0].set("address", str(attempt))
            assert [store.get("address") for store in stores] == [str(attempt).encode()] * 3


def test_rank_0_names_the_ranks_that_did_not_arrive(torchrun: dict[str, str]) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not arrive within 0.3 s"):
        open_store(0, 3, datetime.timedelta(seconds=0.3), torchrun)


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "4", FILE: "/x"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"WORLD_SIZE": "4"}, False),
    ],
)
def test_the_launcher_says_whether_there_is_one_machine(environ: dict[str, str], wanted: bool) -> None:
    assert on_one_machine(environ) == wanted
