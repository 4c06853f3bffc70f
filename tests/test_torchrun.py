"""Two torchrun agents, as on two nodes: a killed rank and a lost node start all ranks anew, which resume."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import psutil
import pytest
import yaml

from tools.demo_corpus import write_corpus
from trainer.telemetry.events import read_events

ROOT = Path(__file__).parents[1]
NUM_STEPS = 12
CONTAINERS = ROOT / "tools" / "containers"


def agent(port: int, folder: Path) -> subprocess.Popen[str]:
    """Start the ranks of one node, as `tools/containers/kubernetes.yaml` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command += [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=earshot",
        "--local-addr=127.0.0.1",
    ]
    command += ["-m", "trainer", "debug", f"data.root={folder / 'corpus'}", f"train.run_dir={folder}"]
    command += [f"train.steps={NUM_STEPS}", "checkpoint.every_steps=3", "eval.every_steps=0", "eval.max_samples=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EARSHOT_JOB_SECRET": "of this test"}
    log = (folder / f"log-{time.monotonic_ns()}").open("w")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "trainer" in child.cmdline() and "debug" in child.cmdline()]


def wait_until(ready: Callable[[], bool], agents: list[subprocess.Popen[str]], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("log-*"))
        assert all(one.poll() is None for one in agents), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def saved(folder: Path) -> list[int]:
    return [event["step"] for event in read_events(folder / "debug") if event["event"] == "saved"]


@pytest.mark.skipif(
    "TORCHRUN_TEST" not in os.environ,
    reason="ranks do not always meet again after a restart by torchrun; set TORCHRUN_TEST=1 to look for the cause",
)
@pytest.mark.slow
@pytest.mark.timeout(290)
def test_ranks_start_anew_on_both_nodes_and_resume(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", scale=0.05)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [agent(port, tmp_path), agent(port, tmp_path)]
    try:
        wait_until(lambda: 3 in saved(tmp_path), agents, tmp_path)
        (rank,) = ranks_of(agents[1])
        rank.send_signal(signal.SIGKILL)
        assert [one.wait(150) for one in agents] == [0, 0]
    finally:
        for one in agents:
            if one.poll() is None:
                ranks = ranks_of(one)  # in sessions of their own
                for process in (psutil.Process(one.pid), *ranks):
                    process.kill()
            one.wait()
    events = read_events(tmp_path / "debug")
    assert len({e["attempt"] for e in events if e["event"] == "saved"}) == 2
    assert [e["step"] for e in events if e["event"] == "finished"] == [NUM_STEPS]
    (resumed,) = [e for e in events if e["event"] == "resumed"]
    assert resumed["step"] in saved(tmp_path) and resumed["step"] >= 3


def test_the_kubernetes_example_is_valid_and_waits_for_the_last_save() -> None:
    documents = list(yaml.safe_load_all((CONTAINERS / "kubernetes.yaml").read_text(encoding="utf-8")))
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, name = container["command"], job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:29400" in command
    assert pod["subdomain"] == service["metadata"]["name"]
    nodes = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == nodes and f"--nnodes={nodes}" in command
    assert f"parallel.num_ranks={nodes * container['resources']['limits']['nvidia.com/gpu']}" in command
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run(["hadolint", str(CONTAINERS / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_images_install_the_locked_environment() -> None:
    """Both images call `make setup`, which installs what `requirements/` pins with hashes."""
    for name in ("Dockerfile", "earshot.def"):
        text = (CONTAINERS / name).read_text(encoding="utf-8")
        assert "make setup" in text and "pip install" not in text, name
