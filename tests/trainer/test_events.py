"""Tests of writing and reading a run's events, including incomplete files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.telemetry import events
from trainer.telemetry.events import EVENTS_NAME, EventLog, begin_attempt, read_events
from trainer.training.hooks import EventHook

ROOT = Path(__file__).parents[2]


def test_an_attempt_begins_with_started(tmp_path: Path) -> None:
    run = tmp_path / "run"
    EventLog(run).add("submitted", job=12)
    first = begin_attempt(run, num_steps=9)
    first.add("saved", step=3)
    EventLog(run).add("requeued", why="hung")
    second = begin_attempt(run)
    first.add("failed", step=4)  # a remaining rank of the old attempt writes the number of that attempt
    second.add("finished", step=9)
    found = read_events(run)
    assert [(e["event"], e["attempt"]) for e in found] == [
        ("submitted", 0),
        ("started", 1),
        ("saved", 1),
        ("requeued", 1),
        ("started", 2),
        ("failed", 1),
        ("finished", 2),
    ]
    assert "rank" not in found[0] and found[0]["job"] == 12 and found[1]["rank"] == 0 and found[2]["step"] == 3
    assert all(e["host"] and abs(e["time"] - time.time()) < 60 for e in found)


def test_incomplete_line_is_the_only_one_lost(tmp_path: Path) -> None:
    EventLog(tmp_path).add("submitted")
    with (tmp_path / EVENTS_NAME).open("a") as file:
        file.write('{"time": 1.0, "event": "sav')
    assert [e["event"] for e in read_events(tmp_path)] == ["submitted"]
    EventLog(tmp_path).add("finished")
    assert [e["event"] for e in read_events(tmp_path)] == ["submitted", "finished"]
    assert read_events(tmp_path / "nothing") == []


def test_lines_that_are_not_events_are_skipped(tmp_path: Path) -> None:
    EventLog(tmp_path).add("submitted")
    with (tmp_path / EVENTS_NAME).open("a") as file:
        for line in (
            '{"time": 1.0, "event": "started"}',
            '{"time": "noon", "event": "started", "attempt": 1}',
            '{"time": NaN, "event": "started", "attempt": 1}',
            '{"time": 1.0, "event": 3, "attempt": 1}',
            '["started"]',
        ):
            file.write(line + "\n")
    assert [e["event"] for e in read_events(tmp_path)] == ["submitted"]
    assert begin_attempt(tmp_path).attempt == 1
    assert read_events(tmp_path / EVENTS_NAME) == []  # the path is a file, not a folder


def test_events_wait_for_a_full_disk_and_keep_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = EventHook(EventLog(tmp_path, rank=0, attempt=1))
    with monkeypatch.context() as full:
        full.setattr(events.os, "write", lambda descriptor, data: len(data) - 1)
        hook.on_event("skip", 3, {})
        then = time.time()
        with pytest.raises(OSError, match="No space left"):
            hook.on_end({})
    time.sleep(0.05)
    hook.on_save("runs/x/checkpoints/step-00000004")
    hook.on_end({})
    skip, saved = read_events(tmp_path)
    assert (skip["event"], saved["event"]) == ("skip", "saved") and skip["time"] < then + 0.01 < saved["time"]


def test_many_writers_do_not_mix(tmp_path: Path) -> None:
    log = EventLog(tmp_path, rank=1, attempt=1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: log.add("skip", step=i, samples=["k" * 100] * 50), range(200)))
    assert sorted(e["step"] for e in read_events(tmp_path)) == list(range(200))


def test_the_command_for_shells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert events.main([str(tmp_path), "node_lost", "nodes=n[3-4]", "step=7", "spare=true"]) == 0
    (found,) = read_events(tmp_path)
    assert (found["nodes"], found["step"], found["spare"]) == ("n[3-4]", 7, True)
    assert events.main([str(tmp_path), "node_lots"]) == 2
    assert "event node_lots is not one of submitted, " in capsys.readouterr().err
    assert events.main([str(tmp_path), "signal", "time=3"]) == 2
    assert events.main([str(tmp_path), "signal", "name"]) == 2
    assert len(read_events(tmp_path)) == 1


def test_shells_do_not_wait_for_torch() -> None:
    imports = "import sys, trainer.telemetry.events, trainer.run.restart"
    code = f"{imports}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [], done.stderr


def test_separators_and_damaged_lines_do_not_hide_events(tmp_path: Path) -> None:
    log = begin_attempt(tmp_path)
    log.add("failed", error="a sample named \u2028 x\u2029\x85\x0b\x1c")
    for line in (b"\xff\xfe", b"[" * 100_000, b'{"event": "failed", "attempt": true, "time": 1}', b"\x00"):
        with log.path.open("ab") as file:
            file.write(line + b"\n")
    log.add("finished")
    assert [e["event"] for e in read_events(tmp_path)] == ["started", "failed", "finished"]
    assert read_events(tmp_path)[1]["error"].startswith("a sample named \u2028 x")
