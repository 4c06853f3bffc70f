"""Tests of the watchdog's record of a rank's last collectives, and of the moment when it begins to watch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from trainer import build
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.run.watchdog import flight_record

C10D = torch._C._distributed_c10d


def record(*entries: tuple[int, str]) -> bytes:
    """Return a record of (time, operation) pairs in the format of torch's dumps."""
    listed = [{"time_created_ns": at, "profiling_name": name} for at, name in entries]
    return json.dumps({"version": "2.10", "pg_config": {}} | ({"entries": listed} if listed else {})).encode()


def test_nccl_entries_are_written_with_those_of_gloo_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a CUDA build of torch, in which NCCL's collectives are in a recorder of their own."""
    gloo = record((10, "gloo:all_gather"), (30, "gloo:barrier"))
    monkeypatch.setattr(C10D, "_dump_fr_trace_json", lambda: gloo)
    monkeypatch.setattr(C10D, "_dump_nccl_trace_json", lambda: record((20, "nccl:all_reduce")), raising=False)
    text = flight_record()
    assert text is not None
    found = json.loads(text)
    assert [(e["recorder"], e["profiling_name"]) for e in found["entries"]] == [
        ("gloo", "gloo:all_gather"),
        ("nccl", "nccl:all_reduce"),
        ("gloo", "gloo:barrier"),
    ]
    assert found["recorders"]["nccl"]["version"] == "2.10"


def test_nccl_entries_alone_are_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C10D, "_dump_fr_trace_json", lambda: record())
    monkeypatch.setattr(C10D, "_dump_nccl_trace_json", lambda: record((20, "nccl:all_reduce")), raising=False)
    assert "nccl:all_reduce" in (flight_record() or "")


def test_empty_records_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C10D, "_dump_fr_trace_json", lambda: record())
    assert flight_record() is None


def test_what_may_take_hours_is_done_before_the_watchdog_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Watching(Exception):
        pass

    def watch(*args: object) -> None:
        done.append("watchdog")
        raise Watching

    def prepare_once(recipe: Recipe, groups: object) -> tuple[Recipe, None]:
        done.append("shards")
        return recipe, None

    monkeypatch.setattr(build, "connect", lambda: (0, 1, torch.device("cpu")))
    monkeypatch.setattr(build, "build_groups", lambda *args: None)
    monkeypatch.setattr(build, "prepare_once", prepare_once)
    monkeypatch.setattr(build, "find_donors", lambda *args: done.append("donors"))
    monkeypatch.setattr(build, "Watchdog", watch)
    env = SimpleNamespace(world_size=1, rank=1, local_rank=0)
    with pytest.raises(Watching):
        build._train(load_recipe("debug", ["parallel.num_ranks=1"]), env, SimpleNamespace(run_dir=None), None)  # type: ignore[arg-type]
    assert done == ["shards", "donors", "watchdog"]
