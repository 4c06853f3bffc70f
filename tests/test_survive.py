"""Tests of faults that a run survives: NaN batches, signals, a hung rank, a full disk, and a failing step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tools.demo_corpus import write_corpus
from tools.run_status import read_status
from trainer.run import restart
from trainer.run.exit_codes import ExitCode
from trainer.run.launch import start_ranks
from trainer.telemetry.events import read_events

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, scale=0.05)
    return folder


@pytest.fixture(scope="module")
def spikes(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = {"folder": str(tmp_path_factory.mktemp("spikes")), "corpus": str(corpus)}
    found: dict[str, Any] = run_ranks(2, "tests.survive_run:spikes", arguments, timeout_sec=240)[0]
    return found


def named(run: dict[str, Any], event: str) -> list[dict[str, Any]]:
    return [e for e in run["events"] if e["event"] == event]


@pytest.mark.timeout(280)
def test_skipped_batch_of_nan_has_no_effect(spikes: dict[str, Any]) -> None:
    run, oracle = spikes["skip"], spikes["without 4"]
    assert run["error"] is None and run["losses"]["4"][0] == "nan"
    for step in "12356":
        assert run["losses"][step] == oracle["losses"][step], step
    (skip,) = named(run, "skip")
    assert skip["step"] == 4 and skip["why"] == "loss is nan" and len(skip["samples"]) == 8
    assert not named(oracle, "skip")


def test_rewind_continues_after_the_batch_with_the_checkpoints_weights(spikes: dict[str, Any]) -> None:
    run, oracle = spikes["rewind"], spikes["without 3 and 4"]
    assert run["error"] is None
    for step in "1256":
        assert run["losses"][step] == oracle["losses"][step], step
    (rewind,) = named(run, "rewind")
    assert (rewind["step"], rewind["to_step"]) == (4, 2)


def test_stop_saves_the_state_before_the_batch(spikes: dict[str, Any]) -> None:
    run = spikes["stop"]
    assert "the update of step 4 was skipped (loss is nan), and spike.action is stop" in run["error"]
    assert "after step 3" in run["error"]
    assert [e["checkpoint"] for e in named(run, "saved")] == ["step-00000002", "step-00000003"]
    for sample in named(run, "skip")[0]["samples"]:
        assert sample in run["error"]


def test_misspelt_metric_ends_a_run_after_saving_its_state(spikes: dict[str, Any]) -> None:
    run = spikes["misspelt metric"]
    assert "checkpoint.best_metric = eval/test/asr/werr: no evaluation reports it" in run["error"]
    assert "the state after step 3 is saved in" in run["error"] and named(run, "saved")[-1]["step"] == 3


def test_run_that_does_not_recover_stops(spikes: dict[str, Any]) -> None:
    run = spikes["three in a row"]
    assert [e["step"] for e in named(run, "skip")] == [2, 3, 4]
    # Step 2 is due to be saved, but its update was skipped. Nothing is saved at the end either.
    assert named(run, "saved") == [] and named(run, "diverged")[0]["onset"] == 2
    assert "3 steps in a row were skipped, the last at step 4" in run["error"] and "2: nan (nan)" in run["error"]
    assert "1. optim.lr = " in run["error"] and "there is no checkpoint from before step 2" in run["error"]


@pytest.mark.timeout(200)
def test_step_that_fails_twice_in_the_same_way_is_not_retried(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "debug"
    body = "from tests.survive_run import failing; from trainer.__main__ import leave; "
    body += f"leave(failing({str(tmp_path)!r}, {str(corpus)!r}))"
    for attempt, again in ((1, 0), (2, 1)):
        code = start_ranks(2, [sys.executable, "-c", body])
        assert code in (ExitCode.FAILED, ExitCode.PEER_LOST)  # depends on which rank ends first
        (failed,) = [e for e in read_events(run) if e["event"] == "failed" and e["attempt"] == attempt]
        assert (failed["rank"], failed["step"]) == (1, 3) and len(failed["samples"]) == 4
        capsys.readouterr()
        assert restart.main([str(run), "--exit-code", str(code)]) == again
    printed = capsys.readouterr().out
    assert "failed twice in the same way in step 3: ValueError: cannot do" in printed
    assert all(sample in printed for sample in failed["samples"])


@contextlib.contextmanager
def started(run_dir: Path, corpus: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "trainer", "debug", f"data.root={corpus}", f"data.cache_dir={run_dir / 'cache'}"]
    command += [f"train.run_dir={run_dir}", "train.steps=6", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(run_dir / "output.txt", "ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(40)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, "not in time"
        time.sleep(0.02)


def losses(run: Path) -> dict[str, list[float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {str(r["step"]): [r["train/loss"], r["train/grad_norm"]] for r in records if "train/loss" in r}


@pytest.mark.timeout(400)
def test_signals_and_a_hung_rank_do_not_change_the_result(corpus: Path, tmp_path: Path, spikes: dict[str, Any]) -> None:
    run = tmp_path / "debug"
    with started(tmp_path, corpus, "telemetry.trackers=[mlflow]") as process:
        wait_for(lambda: len(losses(run)) >= 1, process)
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert process.wait(60) == ExitCode.STOPPED, (tmp_path / "output.txt").read_text()
    first = read_events(run)
    stopped_at = first[-1]["step"]
    assert [e["event"] for e in first[-3:]] == ["signal", "saved", "stopped"] and stopped_at < 6
    assert first[-3]["name"] == "SIGTERM" and first[-2]["step"] == stopped_at
    tracked = (run / "mlflow_run_id").read_text()
    assert read_status(run, time.time()).state == "waiting"

    with started(tmp_path, corpus, "telemetry.trackers=[mlflow]", "train.hang_timeout_sec=8") as process:
        wait_for(lambda: any(e["event"] == "resumed" for e in read_events(run)), process)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGSTOP)
        assert process.wait(100) == ExitCode.HUNG, (tmp_path / "output.txt").read_text()
    hang = read_events(run)[-1]
    assert hang["event"] == "hang" and hang["ranks_without_stacks"] == [1] and hang["silent_sec"] >= 8
    stacks = (run / "hang-2" / "rank-0.txt").read_text()
    assert "rank 0 on " in stacks and "loop.py" in stacks
    assert "distributed_c10d.py" in stacks or "trainer/parallel/tree.py" in stacks  # where it waits for rank 1
    assert json.loads((run / "hang-2" / "collectives-0.json").read_text())["entries"]
    assert restart.main([str(run), "--exit-code", str(int(ExitCode.HUNG))]) == 0

    with started(tmp_path, corpus, "telemetry.trackers=[mlflow]") as process:
        assert process.wait(100) == ExitCode.FINISHED, (tmp_path / "output.txt").read_text()
    events = read_events(run)
    assert [e["attempt"] for e in events if e["event"] == "started"] == [1, 2, 3] and events[-1]["event"] == "finished"
    assert losses(run) == spikes["clean"]["losses"]
    assert (run / "mlflow_run_id").read_text() == tracked
    status = read_status(run, time.time())
    assert (status.state, status.step, status.attempts) == ("finished", 6, 3) and 0 < (status.goodput or 0) < 1
    assert not (run / ".watchdog").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.timeout(200)
def test_full_disk_does_not_end_a_run(corpus: Path, tmp_path: Path) -> None:
    disk, output, num_steps = tmp_path / "disk", tmp_path / "output.txt", 60
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    keys = [f"train.run_dir={disk}", f"train.steps={num_steps}", "checkpoint.every_steps=4", "checkpoint.keep_last=1"]
    try:
        with started(tmp_path, corpus, *keys) as process:
            wait_for(lambda: len(losses(disk / "debug")) >= 2, process)
            with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(4096))
            for words in ("metrics.jsonl CANNOT BE WRITTEN", "CHECKPOINT NOT SAVED"):
                wait_for(lambda words=words: words in output.read_text(), process)  # type: ignore[misc]
            (disk / "ballast").unlink()
            assert process.wait(100) == ExitCode.FINISHED, output.read_text()
        assert list(losses(disk / "debug")) == [str(step) for step in range(1, num_steps + 1)]
        events = read_events(disk / "debug")
        assert [e["time"] for e in events] == sorted(e["time"] for e in events) and events[-1]["event"] == "finished"
        assert named({"events": events}, "save_failed") and named({"events": events}, "saved")[-1]["step"] == num_steps
        assert "can be written again" in output.read_text()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
