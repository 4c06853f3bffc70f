"""Tests of the program as a user runs it: training, stopping and resuming, and errors for bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tools.demo_corpus import write_corpus
from trainer.data.loader import Loader
from trainer.data.prepare import prepare
from trainer.data.stream import SampleStream
from trainer.evaluation.predictions import read_predictions, score_predictions
from trainer.expert_usage.forward import load_tower, open_checkpoint
from trainer.expert_usage.history import RunPath
from trainer.telemetry.expert_load import ExpertLoad
from trainer.telemetry.load_history import HISTORY_NAME, LoadMeter, read_history

ROOT = Path(__file__).parents[1]


def trainer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("trainer", *arguments)


def run_module(name: str, *arguments: str, timeout_sec: float = 200.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_sec)


def losses(run: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {d["step"]: (d["train/loss"], d["train/grad_norm"]) for d in lines if "train/loss" in d}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, scale=0.05)
    return folder


@pytest.mark.timeout(420)
def test_stopped_run_resumes_bit_identically(corpus: Path, tmp_path: Path) -> None:
    common = [f"data.root={corpus}", f"data.cache_dir={tmp_path / 'cache'}", "checkpoint.keep_last=9"]
    done = trainer("debug", *common, f"train.run_dir={tmp_path / 'whole'}", "profile.steps=2:4")
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole" / "debug"
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["num_ranks"] == 2 and len(summary["peak_memory_bytes"]) == 2
    assert {"encode", "llm", "backward", "update"} <= set(summary["phase_sec"])
    scored = json.loads((whole / "scores-test-step4.json").read_text())
    wer = next(s for s in scored["scores"] if (s["subset"], s["metric"]) == ("all", "wer"))
    assert wer["value"] == summary["scores"]["test"]["asr/wer"] and wer["low"] <= wer["value"] <= wer["high"]
    assert {"er", "aqa"} <= set(scored["confusions"])
    predictions = read_predictions(whole / "predictions-test-step4.jsonl")
    again = {s.name: s.value for s in score_predictions(predictions)}
    assert {name: summary["scores"]["test"][name] for name in again} == again

    half = tmp_path / "half" / "debug"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    done = trainer("debug", *common, f"train.run_dir={tmp_path / 'half'}")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout + done.stderr
    assert losses(half) == losses(whole) and sorted(losses(whole)) == [1, 2, 3, 4]
    check_profile(whole, half, corpus)


@pytest.mark.timeout(420)
def test_run_with_deterministic_kernels_resumes_bit_identically(corpus: Path, tmp_path: Path) -> None:
    common = [f"data.root={corpus}", f"data.cache_dir={tmp_path / 'cache'}", "train.deterministic=true"]
    common += ["checkpoint.keep_last=9", "parallel.tensor=2", "train.pack_multiple_tokens=64", "eval.max_samples=4"]
    whole, half = tmp_path / "whole" / "debug", tmp_path / "half" / "debug"
    done = trainer("debug", *common, f"train.run_dir={whole.parent}")
    assert done.returncode == 0, done.stderr
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    done = trainer("debug", *common, f"train.run_dir={half.parent}")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 2" in done.stdout + done.stderr
    assert losses(half) == losses(whole) and sorted(losses(whole)) == [1, 2, 3, 4]


@pytest.mark.timeout(420)
def test_run_that_does_not_improve_ends_early_and_stays_ended(corpus: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={corpus}", f"data.cache_dir={tmp_path / 'cache'}", f"train.run_dir={tmp_path}"]
    overrides += ["eval.every_steps=1", "eval.split=test", "eval.max_samples=4", "eval.stop_after=2", "optim.lr=1e-12"]
    overrides += ["checkpoint.best_metric=eval/test/asr/cer", "checkpoint.every_steps=4"]
    run = tmp_path / "debug"
    for _ in range(2):  # the second call must not continue the run
        done = trainer("debug", *overrides)
        assert done.returncode == 0, done.stderr
        assert "stopped at step 3: eval/test/asr/cer has not improved in 2 evaluations" in done.stdout
        summary = json.loads((run / "summary.json").read_text())
        assert summary["stopped_early"] == summary["num_steps"] == 3
        assert (run / "predictions-test-step3.jsonl").exists() and sorted(losses(run)) == [1, 2, 3]
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000003"]


def check_profile(whole: Path, half: Path, corpus: Path) -> None:
    """Check that the profile agrees with the run's data and the decisions of its router."""
    history = read_history(whole / HISTORY_NAME)
    assert [i.step for i in history] == [1, 2, 3, 4]
    # Steps that were repeated after the resume are counted once, and their routing is the same.
    assert [i.load.to_json() for i in read_history(half / HISTORY_NAME)] == [i.load.to_json() for i in history]
    done = run_module("tools.profile_experts", str(whole), "--json", "--fail-on", "imbalance=100")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if "train/loss" in r]
    audio_sec = sum(r["throughput/audio_sec_per_sec"] * r["time/step_sec"] for r in records)
    assert found["tasks"]["all"]["num_clips"] == 4 * 8  # every sample of the corpus has one clip
    assert found["tasks"]["all"]["audio_sec"] == pytest.approx(audio_sec, rel=1e-6)
    assert set(found["time"]["encoders"]) == {"whisper", "hubert", "wavlm"} and found["time"]["num_ranks"] == 2
    assert found["dead"] == [e for k, e in enumerate(found["experts"]) if history[-1].load.total().routed_clips[k] == 0]
    check_routing(history[2].load, half)
    done = run_module("tools.profile_experts", str(whole), "--data", str(corpus / "demo.jsonl"), "--json")
    assert done.returncode == 0, done.stderr
    routed = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (corpus / "demo.jsonl").read_text().splitlines()]
    tasks = Counter(row["task"] for row in rows) + Counter({"all": len(rows)})
    assert {task: found["num_clips"] for task, found in routed["tasks"].items()} == dict(tasks)
    assert routed["tasks"]["all"]["audio_sec"] == pytest.approx(sum(row["duration"] for row in rows), abs=0.01)
    events = json.loads((whole / "trace" / "trace.json").read_text())["traceEvents"]
    spans = {(e["pid"], e["args"]["step"], e["name"]) for e in events if e["ph"] == "X"}
    phases = ("load", "plan", "encode", "exchange", "llm", "backward", "report", "update", "wait")
    assert {(r, s, p) for r in (0, 1) for s in (2, 3) for p in phases} <= spans
    assert {step for _, step, _ in spans} == {2, 3}


def check_routing(third: ExpertLoad, run: Path) -> None:
    """Check that the recorded history of step 3 equals the routing of its batch in one process.

    Args:
        third: The recorded expert load of step 3.
        run: The run, whose weights after step 2 are used.
    """
    reader, recipe = open_checkpoint(RunPath(run, run / "checkpoints" / "step-00000002"))
    prepared = prepare(recipe.data, recipe.model.adapter.rate)
    with Loader(SampleStream(prepared, seed=recipe.seed, num_batches=recipe.train.steps)) as loader:
        batch = [batch for batch, _ in loader][2]
    tower = load_tower(recipe.model, reader)
    assert tower.primary is not None
    with torch.no_grad():
        routing = tower.router(batch.clips, tower.primary(batch.clips), batch.prompts)
    meter = LoadMeter(third.experts, "whisper")
    meter.add_clips(batch, routing)
    again = meter.take().load
    assert again.cells.keys() == third.cells.keys()
    for group, load in third.cells.items():
        assert again.cells[group].routed_clips.tolist() == load.routed_clips.tolist()
        assert again.cells[group].probs == pytest.approx(load.probs, abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.rooter.top_k=1"], ("model.rooter", "router")),
        (["parallel.tensor=3"], ("parallel.tensor = 3", "1, 2")),
        (["data.root=/nowhere"], ("/nowhere", "demo.jsonl")),
        (["data.tokenizer.placeholder=two words"], ("placeholder", "one word")),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(
    corpus: Path, tmp_path: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    done = trainer("debug", f"data.root={corpus}", f"train.run_dir={tmp_path}", *overrides)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert not (tmp_path / "debug" / "metrics.jsonl").exists()


def test_70b_recipe_is_laid_out_without_a_cluster() -> None:
    done = trainer("mowe_70b", "--dry-run", "--no-data")
    assert done.returncode == 0, done.stderr
    assert "128" in done.stdout and "70" in done.stdout
