"""Tests of the environment variables that are set before a process uses CUDA, and of a rank's number of open files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bench.scale import count_groups
from tests.distributed.harness import run_ranks
from trainer.job.gpu_check import Report
from trainer.job.node_check import Wanted, look
from trainer.parallel import environment
from trainer.parallel.environment import (
    START_LIMIT,
    low_limit,
    meeting_limit_sec,
    needed_descriptors,
    set_environment,
    start_limit_sec,
)
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology

ROOT = Path(__file__).parents[2]


def test_settings_are_made_once_and_keep_those_of_the_user() -> None:
    environ: dict[str, str] = {}
    set_environment(environ)
    assert environ == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCH_GLOO_LAZY_INIT": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    own = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_environment(own)
    assert own["CUDA_DEVICE_MAX_CONNECTIONS"] == "8" and "PYTORCH_ALLOC_CONF" not in own


def test_the_time_to_start_grows_with_the_ranks_unless_it_is_set() -> None:
    assert meeting_limit_sec(2, {}) == 60 and start_limit_sec(2, {}) == pytest.approx(120, abs=1)
    assert 800 < meeting_limit_sec(10_240, {}) < 1000 and start_limit_sec(10_240, {}) > 1400
    assert meeting_limit_sec(10_240, {START_LIMIT: "300"}) == 300


@pytest.mark.timeout(60)
def test_every_way_of_starting_sets_them_before_torch_is_imported() -> None:
    """Check the main function, which `earshot train` and the ranks of torchrun both call."""
    script = textwrap.dedent("""
        import json, os, resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        from trainer import __main__ as main
        def stop(options, arguments):
            names = ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_GLOO_LAZY_INIT", "PYTORCH_ALLOC_CONF")
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            print(json.dumps([[os.environ.get(n) for n in names], soft == hard, "torch" in sys.modules]))
            return 0
        main._run = stop
        main.main(["debug"])
    """)
    unset = ("CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_GLOO_LAZY_INIT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environ = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, timeout=50)
    assert json.loads(done.stdout) == [["1", "1", "expandable_segments:True"], True, False], done.stderr


def test_a_low_limit_is_named_with_the_number_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = needed_descriptors(1008, cuda=True)
    assert low_limit(needed, 1008, cuda=True) is None
    assert f"may open only 1024 files, but rank 0 of 1008 may need {needed}" in (low_limit(1024, 1008, cuda=True) or "")
    monkeypatch.setattr("trainer.job.node_check.raise_descriptor_limit", lambda: 1024)
    wanted = Wanted(0, str(tmp_path), (), (), 0, 0, num_ranks=1008)
    assert [f"rank 0 of 1008 may need {needed_descriptors(1008, cuda=False)}" in f for f in look(wanted).faults] == [
        True
    ]
    assert isinstance(look(Wanted(0, str(tmp_path), (), (), 0, 0)), Report)
    assert not look(Wanted(0, str(tmp_path), (), (), 0, 0)).faults


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("topology", "most"),
    [(Topology(128, 8, 4, 4), 1600), (Topology(1008, 8, 9, 4), 3400), (Topology(4096, 8, 8, 4), 9600)],
)
def test_a_rank_joins_two_gloo_groups_at_any_size(topology: Topology, most: int) -> None:
    found = count_groups(topology, rank=0)
    assert found.gloo_groups == 2  # the groups of the world and of checkpoints
    assert found.gloo_peers == 2 * (topology.world - 1)
    assert found.groups <= 24
    assert needed_descriptors(topology.world, cuda=True) <= most


def lazy_body() -> dict[str, Any]:
    """Return how many files this rank opens for the world, for all other groups, and for a gather to rank 0."""

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    rank, world, device = connect(timeout_sec=60)
    after_world = count()
    build_groups(Topology(world, 2, 2), rank, device, 0)
    after_groups = count()
    dist.gather_object(rank, [None] * world if rank == 0 else None)
    return {"world": after_world - before, "groups": after_groups - after_world, "gather": count() - after_groups}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_groups_without_traffic_have_no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    world = 8
    first, *others = run_ranks(world, lazy_body)
    num_groups = count_groups(Topology(world, 2, 2), rank=0, cuda=False).megatron_groups
    assert first["groups"] <= num_groups * environment.GLOO_GROUP_DESCRIPTORS + 2
    for found in others:
        assert found["groups"] <= num_groups * environment.GLOO_GROUP_DESCRIPTORS + 2
        assert found["gather"] <= 3  # connections to rank 0 only
    assert first["world"] + first["gather"] <= needed_descriptors(world, cuda=False) - environment.PROCESS_DESCRIPTORS
