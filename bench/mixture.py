"""Compare the routing of clips to encoder experts with the primary encoder alone and with all experts on every clip.

    python -m bench.mixture                         recipe kit_cpu with three seeds; the nine runs take hours
    python -m bench.mixture --steps 800 --seeds 1   a quick comparison

The three variants (*arms*) train for about the same time. A calibration run of 100 steps measures the step time of each
arm. Each other arm then trains for as many steps as fit into the duration of the mixture's steps. Every arm is
evaluated on the test split of the kit (a set of small public recordings, in the folder KIT_DIR). The benchmark has no
pass criterion. Its table shows the best arm for each metric, and whether the ranges of the two best arms over the seeds
overlap. Runs are stored in `runs/mixture`. An interrupted benchmark continues after the last finished run. The exit
code is 1 if a run fails, and 3 if the kit is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.loader_corpus import KIT
from trainer.config.load import load_recipe

RECIPE, CALIBRATION_STEPS, LOG_EVERY = "kit_cpu", 100, 10
ARMS = {
    "mixture": [],
    "primary only": ["model.experts=[]", "parallel.expert=1"],
    "all on": ["model.router.top_k=2"],
}
METRICS = {
    "asr/digits/wer": min,
    "asr/digit_strings/wer": min,
    "er/accuracy": max,
    "aqa/accuracy": max,
    "sqa/accuracy": max,
    "ac/meteor": max,
}
"""The function that selects the best of several values, by metric."""


@dataclass(frozen=True)
class Outcome:
    """The result of one training run."""

    arm: str
    seed: int
    num_steps: int
    minutes: float
    scores: dict[str, float]


def train(folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Return the summary of a training run. The run is only started if its summary does not exist yet.

    Raises:
        CalledProcessError: If the run fails.
    """
    summary = folder / name / "summary.json"
    if not summary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        keys = [f"name={name}", f"train.run_dir={folder}", f"data.root={KIT}", "telemetry.trackers=[]", *overrides]
        with open(folder / f"{name}.txt", "ab") as output:
            command = [sys.executable, "-m", "trainer", RECIPE, *keys]
            environ = {"OMP_NUM_THREADS": "1", **os.environ}
            subprocess.run(command, stdout=output, stderr=output, env=environ, check=True)
    found: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return found


def step_sec(folder: Path, arm: str) -> float:
    """Return the mean step time of an arm in seconds, over all logging intervals of a short run except the first."""
    name = f"calibration-{arm.replace(' ', '-')}"
    every = ["eval.every_steps=0", "checkpoint.every_steps=0", "eval.max_samples=4", "eval.max_new_tokens=1"]
    train(
        folder, name, [*ARMS[arm], f"train.steps={CALIBRATION_STEPS}", f"telemetry.log_every_steps={LOG_EVERY}", *every]
    )
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [r["time/step_sec"] for r in lines if "time/step_sec" in r]
    return statistics.mean(times[1:])


def run_all(folder: Path, steps: int, num_seeds: int) -> list[Outcome]:
    """Train every arm with every seed and return the results.

    All arms are trained with one seed before the first arm is trained with the next seed, so that other load on the
    machine affects all arms.
    """
    seconds = {arm: step_sec(folder, arm) for arm in ARMS}
    num_steps = {arm: round(steps * seconds["mixture"] / sec) for arm, sec in seconds.items()}
    for arm, number in num_steps.items():
        print(f"{arm:13} {seconds[arm]:.3f} s a step: {number} steps", flush=True)
    outcomes = []
    for seed in range(1, num_seeds + 1):
        for arm, number in num_steps.items():
            name = f"{arm.replace(' ', '-')}-{number}-seed{seed}"
            keys = [
                *ARMS[arm],
                f"seed={seed}",
                f"train.steps={number}",
                "eval.every_steps=0",
                "checkpoint.every_steps=0",
            ]
            summary = train(folder, name, keys)
            scores = {metric: summary["scores"]["test"][metric] for metric in METRICS}
            outcomes.append(Outcome(arm, seed, number, summary["seconds"] / 60, scores))
            shown = "  ".join(f"{metric} {value:.3f}" for metric, value in scores.items())
            print(f"{name:32} {outcomes[-1].minutes:5.1f} min  {shown}", flush=True)
    return outcomes


def compare(outcomes: list[Outcome]) -> dict[str, Any]:
    """Print a table of the scores, and return its data.

    The printed table contains, for each metric, the mean and range over the seeds of each arm, and the best arm.

    Returns:
        For each metric, the values of each arm by seed ("values"), the best and the second-best arm ("best",
        "second"), and whether the ranges of the best and the second-best arm are disjoint ("ranges_apart").
    """
    table: dict[str, Any] = {}
    print(f"\n{'test split':22} " + " ".join(f"{arm:>22}" for arm in ARMS) + "   best")
    for metric, better in METRICS.items():
        values = {arm: [o.scores[metric] for o in outcomes if o.arm == arm] for arm in ARMS}
        means = {arm: statistics.mean(found) for arm, found in values.items()}
        best = better(means, key=lambda arm: means[arm])
        second = better((arm for arm in means if arm != best), key=lambda arm: means[arm])
        low, high = (best, second) if better is min else (second, best)
        apart = max(values[low]) < min(values[high])
        verdict = f"{best}, by {abs(means[best] - means[second]):.3f}" + ("" if apart else " (ranges overlap)")
        cells = [f"{means[arm]:.3f} ({min(found):.3f}–{max(found):.3f})" for arm, found in values.items()]
        print(f"{metric:22} " + " ".join(f"{cell:>22}" for cell in cells) + f"   {verdict}")
        table[metric] = {"values": values, "best": best, "second": second, "ranges_apart": apart}
    return table


def main() -> int:
    """Run the benchmark and return the exit code: 0, 1 if a run fails, or 3 if the kit is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.mixture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps",
        type=int,
        default=load_recipe(RECIPE, []).train.steps,
        help="number of training steps of the arm mixture (default: as in the recipe)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/mixture"))
    options = parser.parse_args()
    if not (KIT / "asr.jsonl").exists():
        print(json.dumps({"passed": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    try:
        outcomes = run_all(options.folder, options.steps, options.seeds)
    except subprocess.CalledProcessError as error:
        print(json.dumps({"passed": False, "reason": f"a run ended with exit code {error.returncode}: {error.cmd}"}))
        return 1
    table = compare(outcomes)
    minutes = {arm: [round(o.minutes, 2) for o in outcomes if o.arm == arm] for arm in ARMS}
    steps = {o.arm: o.num_steps for o in outcomes}
    print(json.dumps({"passed": True, "steps": steps, "minutes": minutes, "metrics": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
