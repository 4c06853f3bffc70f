"""Compare training from a bucket, with two interruptions, with training from disk.

    python -m bench.s3_training [RECIPE] [--steps N] [key=value …]

The default is the recipe kit_cpu with its own number of steps.

The benchmark writes shards of the kit (a set of small public speech and sound datasets, in the folder $KIT_DIR), both
to disk and to a local Swift server, and trains RECIPE from disk on 2 ranks. It then trains from `s3://` on 2, 1 and 2
ranks: after a third and after two thirds of the steps, it kills all processes (SIGKILL) and resumes the run on the next
number of ranks.

Goals: at every step, the losses of the two runs have a relative difference of at most 1e-4. (They are not exactly
equal, since the order of additions depends on the number of ranks.) Both runs end with the same data-loading state
(positions and skipped samples). The exit code is 1 if a goal is missed, and 3 without the kit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.loader_corpus import KIT
from tests.services.swift import running
from tools.make_shards import main as make_shards
from trainer.config.load import load_recipe
from trainer.storage.open import open_store

GOAL = 1e-4
RANKS = (2, 1, 2)
"""The number of ranks for each of the three parts of the bucket run. The disk run uses the first number."""
FEW_EVALUATED = ("eval.max_samples=8", "eval.max_new_tokens=4")
"""Overrides that keep evaluations short in all runs, since only losses are compared."""


def dataset_overrides(recipe: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the recipe's manifests without their suffixes, and overrides that use shards instead."""
    datasets = load_recipe(recipe, list(overrides)).data.datasets
    stems = [Path(str(s.manifest)).stem if (KIT / str(s.manifest)).exists() else "asr" for s in datasets]
    changes = [
        c
        for i, stem in enumerate(stems)
        for c in (f"data.datasets.{i}.manifest=null", f"data.datasets.{i}.shards={stem}")
    ]
    return list(dict.fromkeys(stems)), changes


def start(recipe: str, run_dir: Path, ranks: int, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a training run. Its output is written to a file in the run's folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    expert = min(ranks, load_recipe(recipe, list(overrides)).parallel.expert)
    here = [f"train.run_dir={run_dir}", f"parallel.num_ranks={ranks}", f"parallel.expert={expert}"]
    with open(run_dir / "output.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", recipe, *overrides, *here], stdout=output, stderr=output
        )


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss of every logged step, by step."""
    found = {}
    for path in run_dir.glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            values = json.loads(line)
            if "train/loss" in values:
                found[values["step"]] = values["train/loss"]
    return found


def kill(run: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and all its ranks with SIGKILL."""
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)
    run.wait()


def kill_after(run: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    """Wait until the run has logged `step`, and kill it."""
    while max(losses(run_dir), default=0) < step:
        if run.poll() is not None:
            raise SystemExit(f"the run ended before step {step}; see {run_dir / 'output.txt'}")
        time.sleep(0.1)
    kill(run)


def finish(run: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Wait for the end of a run. Raises a SystemExit if the run failed."""
    if run.wait() != 0:
        raise SystemExit(f"the training run failed with exit code {run.returncode}; see {run_dir / 'output.txt'}")


def account(run_dir: Path) -> dict[str, Any]:
    """Return the data-loading state in the run's last checkpoint."""
    (last, *_) = sorted(run_dir.glob("*/checkpoints/step-*/state.json"), reverse=True)
    return json.loads(last.read_text())["extra"]["data"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, 1 if not, and 3 without the kit."""
    parser = argparse.ArgumentParser(prog="python -m bench.s3_training", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default="kit_cpu")
    parser.add_argument("--steps", type=int, help="number of steps (default: as in the recipe)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    if not (KIT / "asr.jsonl").exists():
        print(json.dumps({"passed": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    overrides = [*FEW_EVALUATED, *args.overrides, "telemetry.log_every_steps=1"]
    if args.steps:
        warmup_steps = min(load_recipe(args.recipe, overrides).optim.warmup_steps, args.steps // 2)
        overrides += [f"train.steps={args.steps}", f"optim.warmup_steps={warmup_steps}"]
    steps = load_recipe(args.recipe, overrides).train.steps
    every = max(1, steps // 6)
    stems, datasets = dataset_overrides(args.recipe, overrides)
    with tempfile.TemporaryDirectory() as scratch, running(Path(scratch) / "swift") as server:
        root = Path(scratch)
        os.environ.update(server.environ)
        server.make_bucket("kit")
        for stem in stems:
            assert make_shards([str(KIT / f"{stem}.jsonl"), str(root / "disk" / stem)]) == 0
            assert make_shards([str(KIT / f"{stem}.jsonl"), f"s3://kit/{stem}"]) == 0
            names = open_store(f"s3://kit/{stem}").list()
            assert names == open_store(str(root / "disk" / stem)).list(), "the same input gave different shards"
        common = [*datasets, *overrides, f"checkpoint.every_steps={every}", f"data.cache_dir={root / 'cache'}"]
        finish(start(args.recipe, root / "a", RANKS[0], [*common, f"data.root={root / 'disk'}"]), root / "a")
        bucket = [*common, "data.root=s3://kit"]
        for part, ranks in enumerate(RANKS):
            run = start(args.recipe, root / "b", ranks, bucket)
            if part < len(RANKS) - 1:
                kill_after(run, root / "b", (part + 1) * steps // len(RANKS))
            else:
                finish(run, root / "b")
        disk, s3 = losses(root / "a"), losses(root / "b")
        worst = max(abs(disk[k] - s3[k]) / abs(disk[k]) for k in disk) if disk.keys() == s3.keys() else float("inf")
        same_account = account(root / "a") == account(root / "b")
    result = {
        "recipe": args.recipe,
        "steps": steps,
        "ranks": list(RANKS),
        "loss_difference": worst,
        "same_account": same_account,
        "passed": worst <= GOAL and same_account and len(disk) == steps,
    }
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
