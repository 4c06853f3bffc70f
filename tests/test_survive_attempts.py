"""Tests of faults that end an attempt but not the run: a killed data worker, and a newer attempt of the same run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tools.demo_corpus import write_corpus
from trainer.checkpoint.local import LocalCheckpoints
from trainer.run.exit_codes import ExitCode
from trainer.run.restart import RestartConfig, decide
from trainer.telemetry.events import begin_attempt, read_events

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, scale=0.05)
    return folder


def start(corpus: Path, runs: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "debug", f"data.root={corpus}", f"data.cache_dir={corpus / 'cache'}"]
    command += [f"train.run_dir={runs}", "parallel.num_ranks=1", "eval.every_steps=0", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not ready():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.1)


def kill_tree(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.communicate()


def again(run: Path, code: int) -> bool:
    return decide(read_events(run), code, RestartConfig(), time.time()).again


def saved(run: Path, least: int) -> bool:
    return len([e for e in read_events(run) if e["event"] == "saved"]) >= least


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_data_worker_is_retried(corpus: Path, tmp_path: Path) -> None:
    options = ("train.steps=100000", "checkpoint.every_steps=3", "data.num_workers=1")
    run, process = tmp_path / "debug", start(corpus, tmp_path, *options)
    try:
        wait_until(process, lambda: saved(run, 1))
        children = psutil.Process(process.pid).children(recursive=True)
        (worker,) = [c for c in children if "spawn_main" in " ".join(c.cmdline())]
        os.kill(worker.pid, signal.SIGKILL)  # as the kernel does when memory runs out
        _, errors = process.communicate(timeout=120)
    finally:
        kill_tree(process)
    assert process.returncode == ExitCode.FAILED, errors[-3000:]
    (failure,) = [e for e in read_events(run) if e["event"] == "failed"]
    assert "decoding process 0 died (exit code -9" in failure["error"] and "user" not in failure
    assert "Traceback" not in errors and again(run, process.returncode)
    # The state after the previous step was saved.
    steps = LocalCheckpoints(run / "checkpoints").steps()
    assert steps[-1] == failure["step"] - 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_fenced_attempt_does_not_end_the_newer_one(corpus: Path, tmp_path: Path) -> None:
    run, process = tmp_path / "debug", start(corpus, tmp_path, "train.steps=100000", "checkpoint.every_steps=2")
    try:
        wait_until(process, lambda: saved(run, 1))
        begin_attempt(run)
        LocalCheckpoints(run / "checkpoints").begin_attempt()
        _, errors = process.communicate(timeout=120)
    finally:
        kill_tree(process)
    assert process.returncode == ExitCode.FENCED, errors[-3000:]
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "attempt 2 of this run has started, so attempt 1 stops" in line and "Traceback" not in errors
    late = [e for e in read_events(run) if e["event"] in ("fenced", "failed")]
    assert [(e["event"], e["attempt"]) for e in late] == [("fenced", 1)]
    assert again(run, 137) and not again(run, process.returncode)
