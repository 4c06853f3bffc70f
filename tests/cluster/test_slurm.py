"""Tests of `sbatch slurm/train_70b.sh` on a real Slurm with simulated GPUs: restarts, cancellations and refusals."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cancels, faults
from tests.cluster.fault_table import FEWER, run_one, start_times
from tests.cluster.harness import ROOT, Bench, Run, next_start, scratch
from tests.services import swift
from tests.services.slurm import Cluster, running, why_not
from tools.init import write
from trainer.telemetry.events import read_events

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Start a cluster of three nodes.

    If Slurm cannot run, the tests are skipped. In CI, where REQUIRE_SERVICES is set, they fail.
    """
    reason = why_not()
    if reason and os.environ.get("REQUIRE_SERVICES"):
        pytest.fail(f"Slurm cannot run on this machine: {reason}")
    if reason:
        pytest.skip(f"Slurm cannot run on this machine: {reason}")
    with running(Cluster(scratch() / "slurm", num_nodes=3)) as cluster:
        yield Bench(cluster, tmp_path_factory.mktemp("bench"))


def test_run_resumes_after_a_warning_a_killed_rank_and_a_power_failure(bench: Bench) -> None:
    # The first node has a GPU with memory errors. The log must name this node, and the job must use the spare node.
    bench.cluster.gpus(1, num_errors=3)
    whole = bench.run_whole()
    assert "n1: BAD: GPU 0: 3 uncorrected memory errors" in whole.log and whole.nodes() == [2, 3]
    assert "all-reduce of 4 MiB over 2 ranks" in whole.log
    assert len(whole.events("submitted")) == 1
    print(start_times(whole))
    bench.cluster.gpus(1)

    run = bench.submit("disturbed")
    for step, fault in ((5, faults.warning), (10, faults.rank_killed), (16, faults.power_cut)):
        run.wait_step(step)
        moment = fault(run)
        back = run.wait_step(step, after=next_start(run, moment)) - moment
        print(f"{fault.__name__}: the next step comes after {back:.1f} s")
    run.wait_end()
    assert bench.differences(run) == []
    counts = {kind: len(run.events(kind)) for kind in ("submitted", "started", "resumed", "requeued", "finished")}
    assert counts == {"submitted": 4, "started": 4, "resumed": 3, "requeued": 3, "finished": 1}


def test_job_continues_on_fewer_nodes_with_the_same_batches(bench: Bench) -> None:
    assert bench.whole or bench.run_whole()
    row = run_one(bench, FEWER)
    assert row.differences == [] and row.attempts == 3, row
    run = Run(bench, bench.folder / "fewer", 0, 0.0)
    (fewer,) = run.events("fewer_nodes")
    assert (fewer["nodes"], fewer["num_ranks"]) == (1, 1)
    assert [e["num_ranks"] for e in run.events("started")] == [2, 1]
    assert [e["why"] for e in run.events("requeued")][1].startswith("without n"), run.log[-3000:]
    assert len(run.nodes()) == 1


def test_cancelled_job_saves_and_never_runs_again(bench: Bench) -> None:
    whole = bench.whole or bench.run_whole()
    run = bench.submit("cancelled")
    for name in ("scancel twice", "scancel --signal=TERM", "scancel while pending"):
        assert cancels.cancel(name, run, run.last_step() + 4) == [], (name, run.log[-3000:])
        run = bench.submit("cancelled", folder=run.folder)
    run.wait_end()
    assert bench.differences(run) == [] and whole.folder != run.folder
    kinds = Counter(str(e["event"]) for e in read_events(run.run_dir))
    assert (kinds["submitted"], kinds["cancelled"], kinds["requeued"]) == (4, 2, 1)  # the warning in `cancels.pending`


def test_job_that_cannot_run_is_refused_within_seconds(bench: Bench, tmp_path: Path) -> None:
    with swift.running(tmp_path / "swift", host=bench.cluster.address) as server:
        server.make_bucket("bucket")
        cases = {
            "key": (["optim.lrr=1"], {}, "error: optim.lrr: unknown key; did you mean lr?"),
            "bucket": (["data.datasets.0.shards=s3://nowhere/x"], server.environ, "no bucket s3://nowhere"),
            # The header of the script requests nodes with 192 CPUs and 8 GPUs, and 8 tasks on each.
            "nodes": (
                ["parallel.num_ranks=128", "data.global_batch_samples=128"],
                {},
                "parallel.num_ranks = 128 needs 16 nodes of 8 tasks, but the job has ",
            ),
        }
        runs = {}
        for name, (keys, env, text) in cases.items():
            options = ("--gpus-per-node=8",) if name == "nodes" else ()
            runs[name] = bench.submit(name, *keys, env=env, options=options), text
        for name, (run, text) in runs.items():
            run.bench.cluster.job(run.job_id)
            deadline = time.monotonic() + 120
            while run.state() not in ("FAILED", "COMPLETED") and time.monotonic() < deadline:
                time.sleep(0.5)
            job = bench.cluster.job(run.job_id)
            assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), (name, run.log)
            assert text in run.log.splitlines()[-1], run.log
            assert "ranks start on" not in run.log and "Traceback" not in run.log
            minutes, seconds = job["RunTime"].split(":")[-2:]
            print(f"{name}: refused after {int(minutes) * 60 + int(seconds)} s")
            if name != "key":  # with a wrong key, the run's folder is unknown
                assert [e["event"] for e in run.events("refused")] == ["refused"]


def test_documented_command_runs_unchanged(bench: Bench, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial_cluster.md").read_text(encoding="utf-8")
    block = text.partition("$ python -m tools.demo_corpus demo-data\n")[2].partition("```")[0]
    lines = [line.removeprefix("$ ").partition("   #")[0] for line in block.splitlines()]
    status = lines.pop()
    assert [line.split()[0] for line in lines] == ["export", "sbatch"] and status.startswith(
        "earshot status runs/debug"
    )
    write(tmp_path / "site", "mowe_8b")
    (tmp_path / "site" / "demo-data").symlink_to(bench.folder / "corpus")
    path = os.pathsep.join([str(Path(sys.executable).parent), bench.cluster.environ["PATH"]])
    script = f"cd {tmp_path / 'site'} && " + " && ".join(lines)
    done = bench.cluster.run("bash", "-c", script, env={"PATH": path, "OMP_NUM_THREADS": "1"})
    job_id = int(done.stdout.split()[-1])
    run = Run(bench, tmp_path / "site" / "runs", job_id, time.time())
    run.wait_end()
    log = next((tmp_path / "site").glob(f"*-{job_id}.log")).read_text()
    assert f"job {job_id} on n[" in log.splitlines()[0] and "2 ranks start on" in log
    assert [e["event"] for e in run.events("finished")] == ["finished"]
    status = f"cd {tmp_path / 'site'} && {status.replace('earshot', 'python -m tools', 1)}"
    shown = bench.cluster.run("bash", "-c", status, env={"PATH": path}, timeout_sec=120)
    assert shown.stdout.startswith("debug: finished"), shown


def test_sweep_trains_one_run_per_value_and_prints_a_table(bench: Bench, tmp_path: Path) -> None:
    write(tmp_path / "site", "mowe_8b")
    (tmp_path / "site" / "demo-data").symlink_to(bench.folder / "corpus")
    path = os.pathsep.join([str(Path(sys.executable).parent), bench.cluster.environ["PATH"]])
    limits = {"PREFLIGHT_MIN_MEMORY_GIB": "1", "PREFLIGHT_MIN_DISK_GIB": "0.001", "OMP_NUM_THREADS": "1"}
    command = ["slurm/sweep.sh", "--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=1", "slurm/train_8b.sh", "debug"]
    keys = ["seed=0,1", "data.root=demo-data", "parallel.num_ranks=1", "train.steps=2", "eval.max_new_tokens=1"]
    script = f"cd {tmp_path / 'site'} && {' '.join([*command, *keys])}"
    done = bench.cluster.run("bash", "-c", script, env={**limits, "PATH": path}, timeout_sec=120)
    assert done.stdout.splitlines()[:2] == ["debug-seed_0", "debug-seed_1"], done
    table = tmp_path / "site" / f"{re.search(r'sweep-[0-9]+', done.stdout)[0]}.log"  # type: ignore[index]
    deadline = time.monotonic() + 300
    while not (table.exists() and "debug-seed_1" in table.read_text()):
        logs = "".join(p.read_text()[-1500:] for p in (tmp_path / "site").glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
    rows = [line.split()[:3] for line in table.read_text().splitlines()[1:]]
    assert rows == [["debug-seed_0", "finished", "2/2"], ["debug-seed_1", "finished", "2/2"]]


def test_submit_checks_before_queueing(bench: Bench) -> None:
    list_jobs = ("squeue", "-h", "-a", "-t", "all", "-o", "%i")
    before = bench.cluster.run(*list_jobs).stdout.split()
    script = str(ROOT / "slurm" / "submit.sh")
    environ = {**bench.environ, "SLURM_SUBMIT_DIR": str(ROOT)}
    done = bench.cluster.run(
        script,
        "--nodes=2",
        str(ROOT / "slurm" / "train_70b.sh"),
        "debug",
        "optim.lrr=1",
        env=environ,
        check=False,
        timeout_sec=120,
    )
    assert done.returncode == 2 and done.stderr == "error: optim.lrr: unknown key; did you mean lr?\n"
    assert set(bench.cluster.run(*list_jobs).stdout.split()) <= set(before)


def test_job_is_requeued_without_a_faulty_node(bench: Bench, tmp_path: Path) -> None:
    code = """
    import os, signal
    from trainer.job import slurm
    signal.signal(signal.SIGTERM, lambda *_: print("ended", flush=True))
    job = slurm.Allocation.read(os.environ)
    print("start", job.restarts, *job.nodes, flush=True)
    if not job.restarts:
        slurm.requeue(job.job_id)
        slurm.exclude(job.job_id, ["n1"])
        assert slurm.job_state(job.job_id).restarts == 1
    """
    script, log = tmp_path / "job.sh", tmp_path / "job.log"
    script.write_text(f"#!/bin/bash\ntrap '' TERM\nexec {sys.executable} -c '{textwrap.dedent(code)}'\n")
    options = ["--nodes=2-3", "--gpus-per-node=1", "--exclusive", "--requeue", "--open-mode=append", f"--output={log}"]
    job_id = bench.cluster.submit(*options, str(script), cwd=ROOT)
    deadline = time.monotonic() + 60
    while bench.cluster.job(job_id)["JobState"] != "COMPLETED":
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    said = [line for line in log.read_text().splitlines() if line.startswith(("start", "ended"))]
    assert said == ["start 0 n1 n2 n3", "ended", "start 1 n2 n3"]
