"""Small runs that `sbatch slurm/train_70b.sh` submits to a real Slurm, and their comparison with an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.services.slurm import Cluster
from tools.demo_corpus import write_corpus
from trainer.checkpoint.catalog import find_checkpoint, read_extra
from trainer.checkpoint.reader import read_manifest
from trainer.telemetry.events import read_events

ROOT = Path(__file__).parents[2]
NUM_STEPS, EVERY_STEPS, NUM_RANKS = 24, 3, 2
ATTEMPT_SEC = 240.0
_RANK = r"(?s)^\S*python\S* -u .*trainer debug"


@dataclass
class Run:
    """A run of the recipe `debug` and its Slurm job."""

    bench: Bench
    folder: Path
    """The run's `train.run_dir`."""
    job_id: int
    submitted_at: float

    @property
    def run_dir(self) -> Path:
        return self.folder / "debug"

    @property
    def log(self) -> str:
        """The output of the job."""
        path = self.folder / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def events(self, kind: str) -> list[dict[str, object]]:
        return [e for e in read_events(self.run_dir) if e["event"] == kind]

    def records(self) -> list[dict[str, float]]:
        """The records of training steps in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [r for r in records if "train/loss" in r]

    def last_step(self) -> int:
        return max((int(r["step"]) for r in self.records()), default=0)

    def nodes(self) -> list[int]:
        """The numbers of the nodes with ranks. The first node runs the batch script."""
        line = next(line for line in reversed(self.log.splitlines()) if "ranks start on" in line)
        return [int(name.strip().removeprefix("n")) for name in line.partition("start on")[2].split(",")]

    def rank_pid(self, node: int) -> int:
        """Return the process id, on this machine, of the rank on a node."""
        return self.bench.cluster.pids(node, _RANK)[-1]

    def wait(self, condition: Callable[[], bool], what: str, timeout_sec: float = ATTEMPT_SEC) -> None:
        """Wait for a condition.

        Raises:
            AssertionError: If the condition is not met in time. The message contains the end of the job's log.
        """
        deadline = time.monotonic() + timeout_sec
        while not condition():
            state = self.state()
            ended = state in ("FAILED", "CANCELLED", "TIMEOUT")
            assert not ended and time.monotonic() < deadline, f"{what}: {state}; {self.log[-3000:]}"
            time.sleep(0.1)

    def wait_step(self, step: int, after: float = 0.0) -> float:
        """Wait for a step >= `step` that was recorded after the time `after`, and return the time of its record."""

        def made() -> list[float]:
            return [r["time"] for r in self.records() if r["step"] >= step and r["time"] > after]

        self.wait(lambda: bool(made()), f"step {step} is not reached")
        return min(made())

    def wait_step_after(self, num_steps: int) -> int:
        """Wait until the current attempt has done `num_steps` steps, and return the number of the last one."""
        start = float(str(self.events("submitted")[-1]["time"]))
        made = lambda: [int(r["step"]) for r in self.records() if r["time"] > start]  # noqa: E731
        self.wait(lambda: len(made()) >= num_steps, f"{num_steps} more steps are not made")
        return max(made())

    def state(self) -> str:
        return self.bench.cluster.job(self.job_id).get("JobState", "unknown")

    def wait_cancelled(self, timeout_sec: float = ATTEMPT_SEC) -> None:
        """Wait until the job's state in Slurm is cancelled.

        Raises:
            AssertionError: If this takes too long, or if the job ends in a different way.
        """
        deadline = time.monotonic() + timeout_sec
        while (state := self.state()) != "CANCELLED":
            ended = state in ("FAILED", "COMPLETED", "TIMEOUT")
            assert not ended and time.monotonic() < deadline, f"not cancelled: {state}; {self.log[-3000:]}"
            time.sleep(0.1)

    def wait_end(self, timeout_sec: float = ATTEMPT_SEC) -> None:
        """Wait until the job has ended."""
        self.wait(lambda: self.state() == "COMPLETED", "the job does not end", timeout_sec)


@dataclass
class Bench:
    """A cluster, a corpus with shards, and the undisturbed run with which other runs are compared."""

    cluster: Cluster
    folder: Path
    num_steps: int = NUM_STEPS
    environ: dict[str, str] = field(default_factory=dict)
    whole: Run | None = None

    def __post_init__(self) -> None:
        write_corpus(self.folder / "corpus", scale=0.05)
        command = [
            sys.executable,
            "-m",
            "tools.make_shards",
            str(self.folder / "corpus" / "demo.jsonl"),
            str(self.shards),
        ]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        self.environ |= {"OMP_NUM_THREADS": "1", "PREFLIGHT_MIN_MEMORY_GIB": "1", "PREFLIGHT_MIN_DISK_GIB": "0.001"}

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    def submit(
        self,
        name: str,
        *overrides: str,
        options: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        shards: str | None = None,
    ) -> Run:
        """Submit a run of two ranks on two nodes. The other nodes of the cluster are spares."""
        folder = folder or self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        shape = [f"--nodes={NUM_RANKS}-{self.cluster.num_nodes}", "--gpus-per-node=1"]
        shape += [f"--output={folder / 'job.log'}", *options]
        keys = [
            f"data.datasets=[{{name: demo, shards: {shards or self.shards}}}]",
            f"data.cache_dir={self.folder / 'cache'}",
            f"train.run_dir={folder}",
            f"train.steps={self.num_steps}",
            f"checkpoint.every_steps={EVERY_STEPS}",
            "restart.max_restarts=100",
            "eval.max_new_tokens=1",
        ]
        start = time.time()
        job_id = self.cluster.submit(
            *shape, "slurm/train_70b.sh", "debug", *keys, *overrides, cwd=ROOT, env={**self.environ, **(env or {})}
        )
        return Run(self, folder, job_id, start)

    def run_whole(self) -> Run:
        """Run the undisturbed run."""
        run = self.submit("whole")
        run.wait_end()
        self.whole = run
        return run

    def differences(self, run: Run, tolerance: float = 0.0) -> list[str]:
        """Return the differences between a finished run and the undisturbed one; an empty list if they are equal.

        Args:
            run: The finished run.
            tolerance: The largest relative difference in losses and gradient norms, for a run that changed its number
                of ranks. If it is 0, these numbers and the last weights must be bit-identical.
        """
        assert self.whole is not None
        found = []
        mine, wanted = (
            {int(r["step"]): (r["train/loss"], r["train/grad_norm"]) for r in x.records()} for x in (run, self.whole)
        )
        if len(run.records()) != self.num_steps or sorted(mine) != list(range(1, self.num_steps + 1)):
            found.append(f"steps recorded: {sorted(int(r['step']) for r in run.records())}")
        differing = [
            step
            for step, numbers in wanted.items()
            if step not in mine
            or any(abs(a - b) > tolerance * abs(b) for a, b in zip(mine[step], numbers, strict=True))
        ]
        if differing:
            found.append(f"loss or gradient norm differs at steps {differing}")
        if _account(run) != _account(self.whole):
            found.append("what was read of the data differs")
        if not tolerance and _weights(run) != _weights(self.whole):
            found.append("the last checkpoint's tensors differ")
        return found

    def drop(self, run: Run) -> None:
        """Delete the folder of a run."""
        shutil.rmtree(run.folder, ignore_errors=True)


def next_start(run: Run, moment: float) -> float:
    """Wait for the next start of an attempt after `moment`, and return its time."""

    def starts() -> list[float]:
        return [float(str(e["time"])) for e in run.events("submitted") if float(str(e["time"])) > moment]

    run.wait(lambda: bool(starts()), "no new attempt starts")
    return starts()[0]


def _account(run: Run) -> object:
    """Return the data state after the last step, which consists of the positions and skipped samples of all lanes."""
    extra = read_extra(find_checkpoint(str(run.run_dir)))
    return extra["step"], extra["data"]


def _weights(run: Run) -> dict[str, object]:
    """Return the digests of the last checkpoint's files of tensors and random states, by their names in the folder."""
    manifest = read_manifest(find_checkpoint(str(run.run_dir)))
    files = {
        ("frozen/" if "/" in name else "") + Path(name).name: (entry.size_bytes, entry.checksum)
        for name, entry in manifest.files.items()
    }
    return {name: entry for name, entry in files.items() if name.endswith(".safetensors")}


def scratch() -> Path:
    """Return a temporary folder with a short path, because the paths of sockets must be short."""
    return Path(os.environ.get("SLURM_TEST_DIR", "/tmp")) / f"earshot-slurm-{os.getpid()}"
