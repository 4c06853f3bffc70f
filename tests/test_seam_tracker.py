"""Tests of hooks and trackers: a plug-in's tracker, TensorBoard and W&B receive the content of `metrics.jsonl`."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest

from model.errors import UserError
from tests.plugin_package import records, train_two_steps, write_plugin, write_task_corpus
from trainer.telemetry.trackers.base import TrackedRun, main_metrics
from trainer.telemetry.trackers.mlflow import MlflowTracker
from trainer.telemetry.trackers.table import TRACKERS, add_files, build_trackers, check_trackers

SOURCE = '''
"""A tracker that writes one file, and a hook that writes another one."""

import json

from trainer.telemetry.hook import Hook
from trainer.telemetry.trackers.base import Tracker


class LinesTracker(Tracker):
    """A tracker that writes its records to the file `lines.json` when it is closed."""

    title = "lines"
    num_lost = 0

    def __init__(self, run):
        self.file, self.records = run.folder / "lines.json", []

    def log(self, metrics, step):
        self.records.append({"step": step, **metrics})

    def close(self):
        self.file.write_text(json.dumps(self.records))


class LossesHook(Hook):
    """A hook that writes the losses to the file `losses.json` when the run ends."""

    def on_start(self, state):
        self.file, self.losses = state.run_dir / "losses.json", []

    def on_step(self, report):
        self.losses.append(report.loss)

    def on_end(self, summary):
        self.file.write_text(json.dumps(self.losses))
'''
POINTS = {"earshot.trackers": {"lines": "LinesTracker"}, "earshot.hooks": {"losses": "LossesHook"}}


def wandb_history(file: Path) -> list[dict[str, float]]:
    """Return the records of a W&B offline file. After a header of 7 bytes, its format is that of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the last part of a record
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            if items := {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}:
                found.append({name: value for name, value in items.items() if not name.startswith("_")})
    return found


@pytest.mark.timeout(300)
def test_a_run_logs_to_all_its_trackers(tmp_path: Path) -> None:
    path = write_plugin(tmp_path / "site", "lines", SOURCE, POINTS)
    manifest = write_task_corpus(tmp_path / "corpus", "asr")
    trackers = "telemetry.trackers=[lines, tensorboard, wandb]"
    done = train_two_steps(manifest.parent, tmp_path / "runs", "lines", trackers, path=path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "debug"
    logged = [{k: v for k, v in r.items() if k != "time"} for r in records(folder)]
    assert [r["step"] for r in logged] == [1, 2, 2] and "eval/test/asr/wer" in logged[-1]
    assert json.loads((folder / "summary.json").read_text())["num_records_lost"] == 0

    assert json.loads((folder / "lines.json").read_text()) == logged
    losses = json.loads((folder / "losses.json").read_text())
    assert losses == [r["train/loss"] for r in logged if "train/loss" in r]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    shown = [{"step": r["step"], **main_metrics({k: v for k, v in r.items() if k != "step"})} for r in logged]
    assert set(events.Tags()["scalars"]) == {name for r in shown for name in r} - {"step"}
    for name in ("train/loss", "eval/test/asr/wer"):
        expected = [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in logged if name in r]
        assert [(e.step, e.value) for e in events.Scalars(name)] == expected

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert wandb_history(file) == [pytest.approx(r, rel=1e-9) for r in shown]
    run_id = (folder / "wandb_run_id").read_text().strip()
    assert run_id.startswith("earshot/") and file.name == f"run-{run_id.removeprefix('earshot/')}.wandb"
    checkpoint = json.loads((folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert checkpoint["extra"]["trackers"] == {"wandb": run_id}


@pytest.mark.timeout(120)
def test_wandb_continues_a_run_and_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        tracker = build_trackers(["wandb"], TrackedRun("x", tmp_path, "tests", {}, resume_step=step - 1))
        tracker.log({"a": 1.5}, step)
        tracker.close()
        assert tracker.num_lost == 0
    report = tmp_path / "report.html"
    report.write_text("hello")
    assert add_files(tmp_path / "x", [report], "profile") == []
    files = sorted(tmp_path.glob("x/wandb/offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {"run-" + (tmp_path / "x" / "wandb_run_id").read_text().strip()[6:]}
    assert [r for file in files for r in wandb_history(file)] == [{"a": 1.5, "step": 1}, {"a": 1.5, "step": 2}]
    end_sec = time.monotonic() + 60  # W&B's own process writes the files, possibly after the run has ended
    while not any(
        b"profile/report.html" in file.read_bytes() for file in tmp_path.glob("x/wandb/offline-run-*/*.wandb")
    ):
        assert time.monotonic() < end_sec, "the artifact was not stored"
        time.sleep(0.2)


def test_a_missing_package_or_name_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(MlflowTracker):
        package = "no_such_package"
        extra = "fancy"

    check_trackers(tuple(TRACKERS))
    monkeypatch.setitem(TRACKERS, "fancy", Missing)
    with pytest.raises(UserError) as error:
        check_trackers(["mlflow", "fancy"])
    assert str(error.value) == (
        "telemetry.trackers: fancy needs the package no_such_package, which is not installed; run pip install "
        "'earshot[fancy]', or remove fancy from telemetry.trackers"
    )
    with pytest.raises(UserError, match="telemetry.trackers: flow is not one of mlflow, tensorboard, wandb, fancy"):
        check_trackers(["flow"])
