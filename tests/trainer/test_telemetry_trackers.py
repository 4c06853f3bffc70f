"""Tests that trackers are exact after a resume, that their failures do not end a run, and that they get no secrets."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.errors import UserError
from trainer.telemetry.config import TelemetryConfig
from trainer.telemetry.origin import origin_of
from trainer.telemetry.trackers.base import TrackedRun, flatten_params, main_metrics
from trainer.telemetry.trackers.jsonl import JsonlTracker
from trainer.telemetry.trackers.mlflow import MlflowTracker, tracking_uri
from trainer.telemetry.trackers.table import CompositeTracker, add_files, build_trackers, read_ids, restore_ids


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_jsonl_is_flushed_immediately_and_is_strict_json(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "x" / "metrics.jsonl")
    tracker.log({"a": 1.5, "b": math.nan, "c": -math.inf}, step=1)

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "x" / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["step"] == 1 and record["a"] == 1.5 and (record["b"], record["c"]) == ("nan", "-inf")
    assert math.isnan(float(record["b"]))
    tracker.close()


def test_jsonl_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 8):
        tracker.log({"train/loss": float(step)}, step)
    tracker.close()
    kept = path.read_bytes().splitlines(keepends=True)[:4]
    with path.open("a") as file:
        file.write('{"step": 8, "tra')
    resumed = JsonlTracker(path, resume_step=4)
    assert path.read_bytes().splitlines(keepends=True) == kept
    resumed.log({"train/loss": 5.0}, 5)
    resumed.close()
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_jsonl_resume_without_a_file_and_fresh_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(path, resume_step=3).log({"a": 1}, 4)
    assert steps_in(path) == [4]
    JsonlTracker(path).log({"a": 1}, 1)
    assert steps_in(path) == [1]


def test_records_wait_for_space_on_a_full_disk_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    disk = tracker._log._file
    tracker.log({"a": 1.0}, 1)
    tracker._log._file = full.open("ab", buffering=0)
    for step in (2, 3):
        tracker.log({"a": 1.0}, step)
    assert sum("CANNOT BE WRITTEN" in r.message for r in caplog.records) == 1 and tracker.num_lost == 2
    tracker._log._file = disk
    tracker.log({"a": 1.0}, 4)
    assert steps_in(path) == [1, 2, 3, 4] and tracker.num_lost == 0 and "the 2 entries that were kept" in caplog.text
    tracker._log._file = full.open("ab", buffering=0)
    tracker.log({"a": 1.0}, 5)
    tracker.close()
    assert tracker.num_lost == 1 and "1 records were lost" in caplog.text


def mlflow_tracker(root: Path, resume: bool = False, params: dict[str, object] | None = None) -> MlflowTracker:
    (root / "x").mkdir(exist_ok=True)
    return MlflowTracker(TrackedRun("x", root, "tests", params or {}, resume_step=3 if resume else 0))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_mlflow_keeps_one_run_across_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = mlflow_tracker(tmp_path, params={"optim": {"lr": 0.1}, "data": {"password": "hunter2"}})
    started = time.perf_counter()
    for step in (1, 2, 3):
        first.log({"train/loss": 1.0 / step, "throughput/tokens_per_sec": 10.0}, step)
    assert time.perf_counter() - started < 0.5  # the store has not been opened yet
    first.close()
    second = mlflow_tracker(tmp_path, resume=True, params={"optim": {"lr": 0.2}})
    second.log({"train/loss": 0.25}, 4)
    second.close()
    assert (first.num_lost, second.num_lost) == (0, 0)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    assert [e.name for e in client.search_experiments()] == ["tests"]  # there is no empty experiment `Default`
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (tmp_path / "x" / "mlflow_run_id").read_text().strip()
    assert run.info.status == "FINISHED" and run.info.run_name == "x"
    assert run.data.params == {"optim.lr": "0.1", "data.password": "***"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (4, 0.25),
    ]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_files_are_added_to_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "x"
    run_dir.mkdir()
    file = tmp_path / "report.html"
    file.write_text("hello")
    assert add_files(run_dir, [file], "expert_usage") == [
        f"a tracker: {run_dir} has none of mlflow_run_id, wandb_run_id, so no tracker that keeps files knows the run"
    ]
    (run_dir / "recipe.yaml").write_text("telemetry: {trackers: []}\n")
    assert add_files(run_dir, [file], "expert_usage") == []
    (run_dir / "recipe.yaml").unlink()
    build_trackers(["mlflow"], TrackedRun("x", tmp_path, "tests", {})).close()
    assert add_files(run_dir, [file], "expert_usage") == []

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(tmp_path))
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    assert [a.path for a in client.list_artifacts(run_id, "expert_usage")] == ["expert_usage/report.html"]
    (run_dir / "mlflow_run_id").write_text("no-such-run\n")
    (failure,) = add_files(run_dir, [file], "expert_usage")
    assert failure.startswith("MLflow: ") and "no-such-run" in failure


@pytest.mark.timeout(120)
def test_mlflow_failure_is_logged_once_counted_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/not-a-folder/mlflow.db")
    with caplog.at_level(logging.WARNING, logger="trainer"):
        tracker = mlflow_tracker(tmp_path)
        for step in (1, 2, 3):
            tracker.log({"a": 1.0}, step)
        tracker.close()
        warnings = [r.message for r in caplog.records if r.name.startswith("trainer")]
    assert tracker.num_lost >= 3
    assert sum("LOST" in message for message in warnings) == 1


def test_importing_the_trackers_does_not_import_their_packages() -> None:
    packages = {"mlflow", "tensorboard", "wandb"}
    code = f"import sys, trainer.telemetry.trackers.table; sys.exit(bool({packages} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_run_without_trackers_has_its_file(tmp_path: Path) -> None:
    tracker = build_trackers([], TrackedRun("x", tmp_path, "tests", {}))
    tracker.log({"a": 1.0}, 1)
    tracker.close()
    assert isinstance(tracker, CompositeTracker) and tracker.num_lost == 0
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["x", "x/metrics.jsonl"]


def test_params_are_flat_and_contain_no_secrets() -> None:
    params = {
        "model": {"primary": {"name": "w"}, "experts": [{"name": "h"}, {"name": "v"}]},
        "data": {"url": "https://user:pass@host/x", "placeholder": "<SpeechHere>", "max_new_tokens": 64},
        "s3": {"secret_access_key": "k", "hf_token": "t"},
        "strides": (2, 2),
    }
    assert flatten_params(params) == {
        "model.primary.name": "w",
        "model.experts.0.name": "h",
        "model.experts.1.name": "v",
        "data.url": "https://***@host/x",
        "data.placeholder": "<SpeechHere>",
        "data.max_new_tokens": "64",
        "s3.secret_access_key": "***",
        "s3.hf_token": "***",
        "strides": "(2, 2)",
    }


def test_config_is_checked() -> None:
    with pytest.raises(UserError, match="telemetry.log_every_steps = 0"):
        TelemetryConfig(log_every_steps=0)
    with pytest.raises(UserError, match="telemetry.experiment is empty"):
        TelemetryConfig(experiment="")
    with pytest.raises(UserError, match="telemetry.trackers: wandb is given twice"):
        TelemetryConfig(trackers=("wandb", "wandb"))


def test_a_checkpoint_of_any_version_restores_the_ids(tmp_path: Path) -> None:
    for number, extra in enumerate([{"mlflow_run": "abc"}, {"trackers": {"mlflow": "abc", "wandb": "w", "gone": "g"}}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        restore_ids(folder, extra)
        assert read_ids(folder) == {"mlflow": "abc"} | ({"wandb": "w"} if number else {})
        restore_ids(folder, {"trackers": {"mlflow": "another"}})
        assert read_ids(folder)["mlflow"] == "abc"
    restore_ids(tmp_path, {"mlflow_run": None})
    assert read_ids(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_mlflow_knows_where_a_run_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "x"
    run_dir.mkdir()
    recipe, plan, scores = (run_dir / name for name in ("recipe.yaml", "plan.txt", "scores-test-step1.json"))
    recipe.write_text("name: x")
    started = time.time() - 100
    facts = TrackedRun("x", tmp_path, "tests", {}, 0, False, started, origin_of("name: x"), (recipe, plan))
    tracker = MlflowTracker(facts)
    tracker.log({"train/loss": 1.0, "eval/test/asr/wer": 0.5, "eval/test/asr/wer/low": 0.4}, 1)
    scores.write_text("{}")
    tracker.close()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(tmp_path))
    run = client.get_run((run_dir / "mlflow_run_id").read_text().strip())
    assert run.info.start_time == round(1000 * started) and run.info.end_time - run.info.start_time >= 100_000
    assert {"host", "user", "mlflow.user", "recipe_digest", "version.torch"} <= set(run.data.tags)
    assert sorted(a.path for a in client.list_artifacts(run.info.run_id)) == ["recipe.yaml", "scores-test-step1.json"]
    assert set(run.data.metrics) == {"train/loss", "eval/test/asr/wer"} and tracker.num_lost == 0


def test_stores_show_the_main_metrics_in_the_order_in_which_people_look_at_them() -> None:
    names = ["ranks/max_work/llm_sec", "encoders/hubert/wait_sec", "time/step_sec", "eval/test/asr/default/wer"]
    names += [
        "eval/test/asr/wer/low",
        "eval/test/asr/wer",
        "eval/test/asr/digits/wer",
        "train/loss",
        "encoders/imbalance",
    ]
    names += ["eval/test/er/default/accuracy"]  # no score of the whole task duplicates it
    shown = main_metrics(dict.fromkeys(names, 1.0))
    wanted = ["train/loss", "eval/test/asr/wer", "eval/test/asr/digits/wer", "eval/test/er/default/accuracy"]
    assert list(shown) == [*wanted, "time/step_sec", "encoders/imbalance"]


def test_origin_has_no_empty_tags() -> None:
    tags = origin_of("name: x", {"SLURM_JOB_ID": "4711"})
    assert tags["job"] == "4711" and len(tags["recipe_digest"]) == 12 and all(tags.values())
    assert "job" not in origin_of("name: x", {}) and tags["recipe_digest"] != origin_of("name: y")["recipe_digest"]
