"""The program as a user runs it: train, stop, go on; and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo_corpus import write_corpus
from trainer.predictions import read_predictions, score_predictions

ROOT = Path(__file__).parents[1]


def trainer(*arguments: str, timeout_sec: float = 200.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
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
def test_a_stopped_run_goes_on_bit_identically(corpus: Path, tmp_path: Path) -> None:
    common = [f"data.root={corpus}", f"data.cache_dir={tmp_path / 'cache'}", "checkpoint.keep_last=9"]
    done = trainer("debug", *common, f"train.run_dir={tmp_path / 'whole'}")
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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.rooter.top_k=1"], ("model.rooter", "router")),
        (["parallel.tensor=3"], ("parallel.tensor = 3", "1, 2")),
        (["data.root=/nowhere"], ("/nowhere", "demo.jsonl")),
        (["data.tokenizer.placeholder=two words"], ("placeholder", "one word")),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    corpus: Path, tmp_path: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    done = trainer("debug", f"data.root={corpus}", f"train.run_dir={tmp_path}", *overrides)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr
    assert not (tmp_path / "debug" / "metrics.jsonl").exists()


def test_the_70b_recipe_is_laid_out_without_a_cluster() -> None:
    done = trainer("mowe_70b", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "128" in done.stdout and "70" in done.stdout
