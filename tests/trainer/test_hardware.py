"""Tests of hardware faults: how they are detected in simulated sources, and what the next start does about them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.run.exit_codes import ExitCode
from trainer.run.hardware import events_of_job, suspect_nodes, watch_gpus
from trainer.run.restart import RestartConfig, decide
from trainer.telemetry.events import EventLog, read_events
from trainer.telemetry.gpu_health import GpuFault, GpuWatch, find_faults, read_command

XID_79 = "[  12.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."
XID_31 = "[  13.0] NVRM: Xid (PCI:0000:3b:00): 31, pid=1234, MMU Fault: a program's own mistake"


def answers(smi: str = "", dmesg: str = "") -> Any:
    def read(command: Sequence[str]) -> str:
        return {"nvidia-smi": smi, "dmesg": dmesg}[command[0]]

    return read


@pytest.mark.parametrize(
    ("smi", "dmesg", "expected"),
    [
        ("0, 0, Not Active, Not Active\n1, 0, Not Active, Not Active\n", "", []),
        ("0, [N/A], [N/A], [N/A]\n", "", []),
        ("0, 2, Not Active, Not Active\n", "", [GpuFault("0", "2 uncorrected memory errors", True)]),
        (
            "3, 0, Active, Active\n",
            "",
            [GpuFault("3", "clocks are reduced because of heat and the power brake", False)],
        ),
        ("", XID_79, [GpuFault("PCI:0000:3b:00", "Xid 79", True)]),
        ("", XID_31, []),
        ("garbage\n", "garbage", []),
        ("", "", []),
    ],
)
def test_faults_are_found_in_both_sources(smi: str, dmesg: str, expected: list[GpuFault]) -> None:
    assert find_faults(answers(smi, dmesg)) == expected


def test_a_source_that_is_missing_or_fails_has_no_faults() -> None:
    assert read_command(["no-such-program-here"]) == ""
    assert read_command(["false"]) == ""
    assert read_command(["echo", "yes"]) == "yes\n"


def test_only_new_faults_are_reported_and_each_once() -> None:
    old, new = GpuFault("0", "old", False), GpuFault("1", "new", True)
    looks, seen, third = 0, [], threading.Event()

    def find() -> list[GpuFault]:
        nonlocal looks
        looks += 1
        if looks == 4:
            third.set()
        return [old] if looks == 1 else [old, new]

    with GpuWatch(seen.append, every_sec=0.001, find=find):
        assert third.wait(10)
    assert seen == [new]


def test_a_fault_is_an_event_with_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    watch_gpus(EventLog(tmp_path, 8, 1), lambda: 12)._emit(GpuFault("3", "Xid 79", True))
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["node"], event["gpu"]) == ("gpu_fault", 12, "n7", "3")
    assert suspect_nodes([event]) == {"n7": "GPU 3: Xid 79"}


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": 0.0, "attempt": 1, "host": "h", **fields}


def test_suspects_are_broken_or_certainly_corrupted_and_forgotten_by_a_new_job() -> None:
    events = [
        event("submitted", restarts=0),
        event("gpu_fault", node="n1", gpu="0", what="Xid 48", broken=True),
        event("submitted", restarts=0),
        event("gpu_fault", node="n2", gpu="0", what="hot", broken=False),
        event("corrupted", nodes=["n3"], certain=True, step=9),
        event("submitted", restarts=1),
        event("corrupted", nodes=["n4", "n5"], certain=False, step=9),
    ]
    assert set(suspect_nodes(events)) == {"n1", "n3"}
    assert suspect_nodes(events_of_job(events)) == {"n3": "other weights than most replicas after step 9"}
    assert events_of_job([event("started")]) == [event("started")]


def test_a_repeated_failure_with_a_hardware_fault_is_not_a_software_fault() -> None:
    failed = event("failed", step=5, fingerprint="f", error="CUDA error", samples=[])
    begun = [event("started"), failed, event("requeued"), event("started"), failed]
    assert not decide(begun, ExitCode.FAILED, RestartConfig(), 1.0).again
    faulty = event("gpu_fault", node="n1", gpu="0", what="Xid 79", broken=True)
    decision = decide([*begun, faulty], ExitCode.FAILED, RestartConfig(), 1.0)
    assert decision.again and "hardware fault on n1 (GPU 0: Xid 79)" in decision.why
