"""Tests of `earshot status`, which summarizes the folder of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.exportable import write_checkpoint
from tools import status
from tools.run_status import goodput, read_status, read_stored, undone_steps
from tools.status import sparkline

ROOT = Path(__file__).parents[2]


def write(run: Path, events: list[tuple[float, str, int, dict[str, Any]]], losses: dict[int, Any]) -> Path:
    run.mkdir()
    lines = [json.dumps({"time": t, "event": e, "attempt": a, "host": "h", **fields}) for t, e, a, fields in events]
    (run / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    records = [
        {"step": step, "time": 100.0 + step, "train/loss": loss, "time/step_sec": 2.0, "data/skipped/nan": 3}
        for step, loss in losses.items()
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return run


STARTED = {"name": "demo", "num_steps": 20, "num_ranks": 2}


def test_run_after_a_restart(tmp_path: Path) -> None:
    events: list[tuple[float, str, int, dict[str, Any]]] = [
        (90.0, "submitted", 0, {}),
        (100.0, "started", 1, STARTED),
        (110.0, "skip", 1, {"step": 3}),
        (115.0, "skip", 1, {"step": 7}),
        (120.0, "hang", 1, {"rank": 0}),
        (121.0, "requeued", 1, {"why": "hung"}),
        (130.0, "started", 2, STARTED),
        (131.0, "resumed", 2, {"step": 4}),
        (140.0, "straggler", 2, {"slow_rank": 1, "slow_host": "n7", "times_median": 1.5, "phase": "encode"}),
    ]
    run = write(tmp_path / "r", events, {1: 4.0, 5: 3.0, 10: 2.0})
    found = read_status(run, now_sec=150.0)
    assert (found.state, found.step, found.attempts, found.num_samples_skipped) == ("running", 10, 2, 3)
    assert found.since_sec == 19.0 and found.silent_sec == 10.0 and found.left_sec == 20.0
    assert found.num_skipped_updates == 1  # the skipped update of step 7 was repeated after the restart
    assert found.goodput == pytest.approx(9 * 2.0 / 50.0)
    text = status.describe(found, 150.0)
    for words in (
        "demo: running for 0:19",
        "10/20 (50%)",
        "36.0% over 2 attempts",
        "rank 1 on n7 takes 1.5 times as long",
        "4.000 █▅▁ 2.000",
    ):
        assert words in text, text
    assert text.splitlines()[-1].split()[:4] == ["0:10", "ago", "#2", "straggler"]


@pytest.mark.parametrize(
    ("names", "state"),
    [
        (["submitted"], "waiting"),
        (["started", "resumed", "signal", "saved"], "running"),
        (["started", "signal", "saved", "stopped"], "waiting"),
        (["started", "failed", "requeued"], "waiting"),
        (["started", "failed", "requeued", "refused"], "failed"),
        (["started", "hang"], "failed"),
        (["started", "finished", "refused"], "finished"),
        (["started", "cancelled", "signal", "saved", "stopped"], "cancelled"),
        (["started", "cancelled", "submitted"], "waiting"),
        (["started", "cancelled", "saved", "finished"], "finished"),
    ],
)
def test_states(tmp_path: Path, names: list[str], state: str) -> None:
    run = write(tmp_path / "r", [(100.0 + i, name, 1, {"step": 1}) for i, name in enumerate(names)], {})
    assert read_status(run, 200.0).state == state


def test_steps_that_a_rewind_undid() -> None:
    events = [
        {"event": "started", "attempt": 1},
        {"event": "skip", "attempt": 1, "step": 8},
        {"event": "rewind", "attempt": 1, "step": 8, "to_step": 5},
    ]
    assert undone_steps(events, 10) == {6, 7, 8}
    assert undone_steps(events, 7) == {6, 7}
    records = [{"step": 5, "time/step_sec": 1.0}, {"step": 10, "time/step_sec": 2.0}]
    assert goodput(records, {6, 7, 8}, 18.0) == pytest.approx((5 + 2 * 2) / 18)


def test_sparkline() -> None:
    assert sparkline([]) == "" and sparkline([2.0]) == "▁"
    assert sparkline([8.0, float("nan"), 1.0]) == "█×▁"
    assert len(sparkline([float(i) for i in range(1000)])) == 60


def test_foreign_lines_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "r", [(100.0, "started", 1, STARTED)], {1: 3.0})
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "event": "failed"}\n{"time": "now", "event": "failed", "attempt": 1}\n')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/loss": 2.0}\n')
    found = read_status(run, now_sec=150.0)
    assert (found.state, found.step, found.silent_sec, len(found.events)) == ("running", 2, 50.0, 1)
    assert status.main([str(run)]) == 0 and "2/20" in capsys.readouterr().out


def test_command_is_fast_and_reports_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "r", [(100.0, "started", 1, STARTED)], {1: "nan", 2: 2.0})
    assert status.main([str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"] == ["nan", 2.0] and found["state"] == "running"
    assert status.main([str(tmp_path / "none")]) == 2
    assert "none: contains no run" in capsys.readouterr().err
    assert status.main([str(run / "events.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "events.jsonl: contains no run; use the folder" in error and error.count("\n") == 1
    code = "import sys, tools.status; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_one_run_shows_scores_speed_and_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "r", [(100.0, "started", 1, STARTED)], {1: 3.0})
    record = {"step": 2, "time": 103.0, "train/loss": 2.0, "train/lr": 1e-4, "train/grad_norm": 0.5}
    speed = {"throughput/tokens_per_sec": 1234.5, "throughput/mfu": 0.41, "memory/rank0_peak_bytes": 3 << 30}
    score = {"step": 2, "time": 104.0, "eval/dev/asr/wer": 0.25, "eval/dev/asr/digits/wer": 0.5, "eval/dev/seconds": 1}
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(r) + "\n" for r in ({**record, **speed}, score)))
    assert status.main([str(run)]) == 0
    text = capsys.readouterr().out
    assert "1,234 tokens/s, MFU 41.0%, 3.0 GiB at most on rank 0" in text
    assert "learning rate 0.0001, gradient norm 0.5" in text and "score     dev/asr/wer 0.250\n" in text
    assert "digits" not in text


def test_all_runs_below_a_folder_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", [(100.0, "started", 1, STARTED), (109.0, "finished", 1, {"step": 20})], {20: 2.5})
    (tmp_path / "group").mkdir()
    write(tmp_path / "group" / "b", [(100.0, "started", 1, STARTED), (101.0, "failed", 1, {})], {})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("hello\n")
    assert status.main([str(tmp_path)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["run", "state", "step", "loss", "score"]
    assert rows[0].split()[:4] == ["a", "finished", "20/20", "2.500"] and "finished" in rows[0].split()[9]
    assert rows[1].startswith("broken") and "unreadable" in rows[1] and "line 1" in rows[1]
    assert rows[2].split()[:3] == ["group/b", "failed", "0/20"]
    assert status.main([str(tmp_path), "--json"]) == 0
    assert [r.get("state") for r in json.loads(capsys.readouterr().out)] == ["finished", None, "failed"]
    (tmp_path / "empty").mkdir()
    assert status.main([str(tmp_path / "empty")]) == 2 and "contains no run" in capsys.readouterr().err


def test_the_table_of_runs_fits_into_a_narrow_terminal(tmp_path: Path) -> None:
    run = write(tmp_path / "try", [(100.0, "started", 1, STARTED), (109.0, "finished", 1, {"step": 20})], {20: 10.2})
    record = {
        "step": 20,
        "time": 104.0,
        "train/loss": 1.0,
        "throughput/tokens_per_sec": 827.0,
        "eval/test/asr/wer": 1.075,
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    found = status.look(str(tmp_path), 5000.0)
    assert isinstance(found, list)
    whole = status.as_table(found, 5000.0)
    assert max(map(len, whole.splitlines())) > 80
    for width in (60, 80, 100):
        table = status.as_table(found, 5000.0, width).splitlines()
        assert max(map(len, table)) <= width and {"run", "state", "step", "loss", "left"} <= set(table[0].split())
    assert status.as_table(found, 5000.0, 200) == whole


def test_watch_draws_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path / "r", [(100.0, "started", 1, STARTED)], {1: 3.0})
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "train/loss": 2.0}\n')
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert status.main([str(run), "--watch", "0.5"]) == 0 and slept == [0.5, 0.5]
    first, second = capsys.readouterr().out.split(status._HOME)[1:]
    assert "1/20" in first and "2/20" in second
    assert status.main([str(run), "--watch", "0"]) == 2


def test_runs_below_a_prefix_are_known_by_their_checkpoints(tmp_path: Path) -> None:
    extra = {"step": 3, "recipe": "train: {steps: 3}", "guard": {"num_skipped_updates": 1}}
    for name, step in (("a", 2), ("b", 3)):
        write_checkpoint(tmp_path / name / "checkpoints" / f"step-{step:08d}", {"audio.a": torch.zeros(2)}, extra)
    found = read_stored(str(tmp_path), 0.0)
    assert [(s.name, s.state, s.step, s.num_steps) for s in found] == [("a", "stored", 2, 3), ("b", "finished", 3, 3)]
    assert found[0].num_skipped_updates == 1 and "a: stored\n" in status.describe(found[0], 0.0)
