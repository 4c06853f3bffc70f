"""The watchdog's record of the last collectives of a rank."""

from __future__ import annotations

import json

import pytest
import torch

from trainer.run.watchdog import flight_record

C10D = torch._C._distributed_c10d


def record(*entries: tuple[int, str]) -> bytes:
    """Return a record as torch dumps it, of (time, operation) pairs."""
    listed = [{"time_created_ns": at, "profiling_name": name} for at, name in entries]
    return json.dumps({"version": "2.10", "pg_config": {}} | ({"entries": listed} if listed else {})).encode()


def test_nccl_entries_are_written_with_those_of_gloo_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build has both recorders, and NCCL's collectives are only in its own."""
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
