"""Tests of step reports, timers, output on the terminal, and the summary."""

from __future__ import annotations

import io
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from model.router import Routing
from trainer.telemetry.events import EventLog, read_events
from trainer.telemetry.expert_load import ExpertLoad, group_of
from trainer.telemetry.hook import Hook, RunState
from trainer.telemetry.load_history import LoadInterval, LoadMeter
from trainer.telemetry.metrics import EvalReport, PhaseTimer, StepReport, flatten, flatten_eval, peak_memory_bytes
from trainer.telemetry.progress import Progress, fitting, number
from trainer.telemetry.trackers.jsonl import JsonlTracker
from trainer.training.hooks import EventHook, ProgressHook, SummaryHook, TrackerHook


def make_report(step: int, loss: float = 2.0, **changes: object) -> StepReport:
    values: dict[str, object] = {
        "losses": {"next_token": loss - 0.5, "ctc": 0.5},
        "task_losses": {"asr": (30.0, 10)},
        "grad_norm": 1.5,
        "lr": 1e-3,
        "num_samples": 8,
        "num_tokens": 200,
        "audio_sec": 40.0,
        "phase_sec": {"load": 0.5, "llm": 1.5},
        "num_skipped": {"broken": step},
        "epochs": {"kit": step / 2},
    }
    return StepReport(step, loss, **{**values, **changes})  # type: ignore[arg-type]


def test_flatten_one_step() -> None:
    assert flatten([make_report(1)]) == {
        "train/loss": 2.0,
        "train/loss_next_token": 1.5,
        "train/loss_ctc": 0.5,
        "train/loss/asr": 3.0,
        "train/grad_norm": 1.5,
        "train/lr": 1e-3,
        "time/load_sec": 0.5,
        "time/llm_sec": 1.5,
        "time/step_sec": 2.0,
        "throughput/tokens_per_sec": 100.0,
        "throughput/audio_sec_per_sec": 20.0,
        "throughput/samples_per_sec": 4.0,
        "data/epochs/kit": 0.5,
        "data/skipped/broken": 1,
    }


def test_flatten_several_steps_weights_tasks_by_tokens() -> None:
    second = make_report(
        2,
        loss=4.0,
        task_losses={"asr": (10.0, 30), "er": (2.0, 1), "ac": (0.0, 0)},
        phase_sec={"llm": 3.0, "save": 1.0},
        num_tokens=400,
        lr=5e-4,
    )
    metrics = flatten([make_report(1), second])
    assert metrics["train/loss"] == 3.0
    assert metrics["train/loss/asr"] == pytest.approx(40 / 40)
    assert metrics["train/loss/er"] == 2.0
    assert "train/loss/ac" not in metrics  # a task without target tokens has no loss
    assert metrics["train/lr"] == 5e-4
    assert metrics["time/save_sec"] == 0.5  # the mean over both steps, although only one has this phase
    assert metrics["throughput/tokens_per_sec"] == pytest.approx(600 / 6.0)
    assert metrics["data/skipped/broken"] == 2 and metrics["data/epochs/kit"] == 1.0


def make_load(step: int, experts: list[int], task: str = "asr") -> LoadInterval:
    """Return the load of one clip of 1 s per entry of `experts`, which is routed to that one of two experts."""
    probs = torch.eye(2)[experts][:, None]
    group = group_of(task, {}, 1.0)
    load = ExpertLoad.of(
        Routing(probs, probs.bool(), ("data_dependent",)),
        [group] * len(experts),
        [1.0] * len(experts),
        ["hubert", "wavlm"],
    )
    meter = LoadMeter(["hubert", "wavlm"], None)
    meter.add_step({"hubert": (2.0, 0.0, 8.0, 0.0)}, 3.0)
    part = meter.take()
    return meter.merge(step, [replace(part, load=load)])


def test_flatten_joins_the_intervals_that_ended() -> None:
    reports = [make_report(1), make_report(2, load=make_load(2, [0, 0, 0])), make_report(3, load=make_load(3, [1]))]
    metrics = flatten(reports)
    assert (
        metrics["routing/asr/hubert/clip_share"] == 0.75 and metrics["routing/all/wavlm/weight_data_dependent"] == 0.25
    )
    assert metrics["routing/num_dead"] == 0 and metrics["encoders/hubert/sent_bytes"] == 8.0
    assert not [name for name in flatten(reports[:1]) if name.startswith(("routing", "encoders"))]


def test_phases_are_exclusive_and_add_up() -> None:
    timer = PhaseTimer()
    start = time.perf_counter()
    with timer("outer"):
        time.sleep(0.02)
        with timer("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    with timer("inner"):
        time.sleep(0.01)
    total = time.perf_counter() - start
    seconds = timer.take()
    assert seconds["inner"] >= 0.06 and 0.04 <= seconds["outer"] < total - 0.06 + 1e-3
    assert sum(seconds.values()) == pytest.approx(total, abs=5e-3)
    assert timer.take() == {}


def test_phase_timer_closes_on_exceptions_and_synchronises_at_borders_for_a_listener() -> None:
    calls = []
    timer = PhaseTimer(synchronise=lambda: calls.append(1))
    with timer("a"):
        pass
    assert not calls, "without a listener, the host must not wait"
    timer.listener = Mock()
    with pytest.raises(KeyError), timer("a"):
        raise KeyError
    assert set(timer.take()) == {"a"} and len(calls) == 2
    with timer("open"), pytest.raises(AssertionError, match="open"):
        timer.take()


def test_peak_memory_grows_with_what_is_touched() -> None:
    before = peak_memory_bytes()["host"]
    block = bytearray(os.urandom(1 << 20) * 64)
    after = peak_memory_bytes()["host"]
    del block
    assert after >= before > 10 << 20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(10, start_step=2, every_steps=4, name="demo", stream=stream)
    for step in range(3, 11):
        progress.update(make_report(step, loss=step / 2))
    progress.write("a note")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d ", line) for line in lines)
    lines = [line.partition(" ")[2] for line in lines]
    assert [line.split("  ")[0] for line in lines] == [f"demo step {s}/10" for s in (3, 4, 8, 10)] + ["a note"]
    wanted = r"demo step 3/10  [\d:]+ left  loss 1\.500  lr 0.001  grad 1\.500  [\d,]+ tok/s  \d+x real time"
    assert re.fullmatch(wanted, lines[0]), lines[0]
    assert "  0:00 left  " in lines[3]
    assert "\r" not in stream.getvalue()


def test_remaining_time_is_that_of_the_current_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without the LLM has much shorter steps than others. First steps, which take longer, do not count."""
    now_sec = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_sec)
    stream = io.StringIO()
    progress = Progress(1000, name="demo", stream=stream, stage_ends=[("speech", 400), ("tasks", 1000)])
    for step in range(1, 406):
        is_first, is_short = step in (1, 401), step <= 400
        now_sec += 60 if is_first else 2 if is_short else 10
        progress.update(make_report(step))
    lines = stream.getvalue().splitlines()
    assert "demo step 1/1000  6:39:00 left in speech  " in lines[0]
    assert "demo step 2/1000  13:16 left in speech  " in lines[1]
    assert "demo step 400/1000  0:00 left in speech  " in lines[399]
    assert "demo step 405/1000  1:39:10 left in tasks  " in lines[404]


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = Progress(4, start_step=1, name="demo", stream=stream)
    for step in (2, 3, 4):
        progress.update(make_report(step))
    progress.close()
    assert "4/4" in stream.getvalue() and "loss 2.000" in stream.getvalue() and "\r" in stream.getvalue()
    assert "," not in stream.getvalue().rpartition("4/4")[2].partition("tok/s")[0].rpartition("grad")[0]


def test_a_narrow_terminal_keeps_the_remaining_time_and_the_loss() -> None:
    words = ["12:03 left", "loss 2.000", "lr 0.001", "grad 1.500", "1,000 tok/s", "MFU 41.0%", "61.2 GiB"]
    assert fitting(words, 10) == "12:03 left" and fitting(words, 30) == "12:03 left  loss 2.000"
    assert fitting(words, 200) == "  ".join(words)


def test_numbers_stay_short_when_a_run_diverges() -> None:
    values = (3.21456, 41.23, 0.0, 2e-5, 123456.0, -7e12, float("nan"), float("inf"))
    assert [number(v) for v in values] == ["3.215", "41.2", "0.000", "2.0e-05", "1.2e+05", "-7.0e+12", "nan", "inf"]


def run_hooks(hooks: list[Hook], state: RunState, last_step: int, summary: dict[str, object]) -> None:
    for hook in hooks:
        hook.on_start(state)
    for step in range(state.start_step + 1, last_step + 1):
        for hook in hooks:
            hook.on_step(make_report(step, loss=10.0 / step, phase_sec={"llm": 9.0 if step == 1 else 1.0}))
    for hook in hooks:
        hook.on_eval(EvalReport(last_step, "test", {"asr/wer": 0.25, "asr/digits/wer": 0.5}, num_samples=8))
        hook.on_save(str(state.run_dir / "checkpoints" / str(last_step)))
    for hook in hooks:
        hook.on_end(summary)


def test_hooks_write_metrics_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "runs" / "x"
    tracker = JsonlTracker(run_dir / "metrics.jsonl")
    hooks: list[Hook] = [TrackerHook(tracker, every_steps=2), SummaryHook(tracker), ProgressHook(2)]
    run_hooks(hooks, RunState("x", run_dir, num_steps=5, num_ranks=2), 5, {"wer_before": 1.0, "num_steps": 5})
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train/loss" in r] == [
        1,
        2,
        4,
        5,
    ]  # step 5 is the incomplete interval at the end
    assert next(r for r in records if r["step"] == 4)["train/loss"] == pytest.approx((10 / 3 + 10 / 4) / 2)
    assert next(r for r in records if "eval/test/asr/wer" in r)["eval/test/asr/digits/wer"] == 0.5
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["loss_first"] == 10.0 and summary["loss_last"] == 2.0 and summary["num_ranks"] == 2
    assert summary["phase_sec"] == {"llm": 1.0}  # excludes the first step, which takes 9 s
    assert summary["scores"] == {"test": {"asr/wer": 0.25, "asr/digits/wer": 0.5}}
    assert summary["wer_before"] == 1.0 and summary["num_records_lost"] == 0
    shown = capsys.readouterr().err
    assert "asr/wer 0.250" in shown and "digits" not in shown and "saved" in shown


def test_summary_keeps_the_first_loss_across_a_resume(tmp_path: Path) -> None:
    for start, last in ((0, 3), (3, 6)):
        tracker = JsonlTracker(tmp_path / "metrics.jsonl", resume_step=start)
        state = RunState("x", tmp_path, num_steps=6, num_ranks=1, start_step=start)
        run_hooks([TrackerHook(tracker), SummaryHook()], state, last, {})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss_first"] == 10.0 and summary["loss_last"] == pytest.approx(10 / 6)
    assert (summary["start_step"], summary["num_steps"]) == (3, 6)


def test_eval_metric_names() -> None:
    intervals = {"er/accuracy": (0.25, 0.75)}
    assert flatten_eval(EvalReport(3, "dev", {"er/accuracy": 0.5}, 4, 2.0, intervals)) == {
        "eval/dev/er/accuracy": 0.5,
        "eval/dev/er/accuracy/low": 0.25,
        "eval/dev/er/accuracy/high": 0.75,
        "eval/dev/num_samples": 4,
        "eval/dev/seconds": 2.0,
    }


def test_main_metrics_of_an_evaluation_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hook = ProgressHook()
    hook.on_start(RunState("r", Path("unused"), 4, 1))
    values = {"asr/wer": 0.25, "asr/cer": 0.125, "asr/digits/wer": 0.5, "er/accuracy": 0.75}
    hook.on_eval(EvalReport(2, "dev", values, 8, 1.0, {"asr/wer": (0.2, 0.3)}))
    captured = capsys.readouterr()
    assert "asr/wer 0.250 [0.200, 0.300]  er/accuracy 0.750\n" in captured.out + captured.err
    assert "0.125" not in captured.out + captured.err


def test_skipped_steps_do_not_affect_the_mean() -> None:
    nan = make_report(2, loss=float("nan"), grad_norm=float("nan"), skip_reason="loss is nan", num_skipped_updates=1)
    metrics = flatten([make_report(1), nan])
    assert metrics["train/loss"] == 2.0 and metrics["train/grad_norm"] == 1.5 and metrics["train/skipped_updates"] == 1
    assert metrics["time/step_sec"] == 2.0
    assert str(flatten([nan])["train/loss"]) == "nan"


def test_events_reach_the_file_and_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hooks: list[Hook] = [EventHook(EventLog(tmp_path, 0, 2)), ProgressHook(), SummaryHook()]
    for hook in hooks:
        hook.on_start(RunState("x", tmp_path, num_steps=9, num_ranks=2, start_step=4))
        hook.on_step(make_report(5, loss=3.0))
        hook.on_step(make_report(6, loss=float("nan"), skip_reason="loss is nan"))
        hook.on_event("skip", 6, {"why": "loss is nan", "samples": ["a", "b"]})
        hook.on_save(str(tmp_path / "step-00000006"))
        hook.on_event("stopped", 6, {})
        hook.on_end({})
    events = read_events(tmp_path)
    assert [(e["event"], e["step"], e["attempt"]) for e in events] == [
        ("resumed", 4, 2),
        ("skip", 6, 2),
        ("saved", 6, 2),
        ("stopped", 6, 2),
    ]
    assert events[1]["samples"] == ["a", "b"] and events[2]["checkpoint"] == "step-00000006"
    shown = capsys.readouterr().err
    assert "step 6: skip: loss is nan\n" in shown and "stopped" not in shown
    assert json.loads((tmp_path / "summary.json").read_text())["loss_last"] == 3.0
