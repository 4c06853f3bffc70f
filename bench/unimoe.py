"""Compare a mixture of donors' experts with identical copies and with a dense LLM, in Uni-MoE's three stages.

    python -m bench.unimoe --arm mixture --seed 1     train one arm with one seed, for at most 12 minutes
    python -m bench.unimoe --table                    print the results of all arms and seeds so far

`KEY=VALUE` arguments change all runs, as in `earshot chain`. On two cores, training two seeds at the same time, each on
one rank, takes about 60 % of the time of training them one after the other on two ranks:

    python -m bench.unimoe --arm mixture --seed 1 parallel.num_ranks=1 parallel.expert=1 parallel.ffn_expert=1 &
    python -m bench.unimoe --arm mixture --seed 2 parallel.num_ranks=1 parallel.expert=1 parallel.ffn_expert=1

The chain `unimoe_cpu` trains a small speech LLM, then adapters on its feed-forward networks as experts for speech,
emotion and sound, and then a mixture of these experts and the original network. The arms differ only in the last run:

    mixture       the chain as it is, with two experts per token and no balance loss
    top1          one expert per token
    balance       with the balance loss (`model.losses.expert_balance`)
    copies        four identical copies of the original network
    dense         no experts; the same data and as many steps as the mixture's own run
    dense_long    no experts; as many steps as the runs of the mixture and of the three experts together

The arms of a seed share the first run, and those with donors' experts share the runs that train these experts. An arm
may need several calls, and each call resumes where the last one stopped. A finished arm is added to `results.jsonl`
in the folder, with its scores on the test split of the kit (a set of small public recordings, in the folder KIT_DIR)
and the share of each expert in the choices for each task and modality. The exit code is 0 if the arm is finished, 75 if
it must be called again, 1 if a run failed, and 3 if the kit is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.loader_corpus import KIT
from bench.mixture import METRICS
from tools.chain import is_finished
from trainer.config.chain import load_chain
from trainer.config.load import dump
from trainer.config.schema import Recipe
from trainer.run.command import module_command
from trainer.run.exit_codes import ExitCode
from trainer.telemetry.token_history import HISTORY_NAME, read_history
from trainer.telemetry.token_load import TokenLoad, add_up

CHAIN, LAST, RESULTS = "unimoe_cpu", "unimoe_mixture", "results.jsonl"
EXPERT_RUNS = ("unimoe_speech", "unimoe_emotion", "unimoe_sound")
_DENSE = (
    "model.llm.experts=[]",
    "parallel.ffn_expert=1",
    "optim.parts=[{pattern: '*', frozen: true}, {pattern: 'audio.projector.*'}]",
)
_COPIES = ", ".join(f"{{name: copy{number}, from: chain:unimoe_align}}" for number in range(1, 5))
ARMS: dict[str, tuple[str, ...]] = {
    "mixture": (),
    "top1": ("model.llm.top_k=1", "model.llm.router.normalize=false"),
    "balance": ("model.losses={expert_balance: {weight: 0.01}}",),
    "copies": (f"model.llm.experts=[{_COPIES}]",),
    "dense": _DENSE,
    "dense_long": _DENSE,
}
"""The changes to the last run of the chain."""
NEEDS_EXPERTS = ("mixture", "top1", "balance")
_SAVE_SEC = 45
"""The time that is reserved for a save at the end of a call."""


@dataclass(frozen=True)
class Result:
    """The result of one arm with one seed."""

    arm: str
    seed: int
    num_steps: int
    """The number of steps of the arm's own run."""
    scores: dict[str, float]
    """The scores on the test split by metric; metrics without samples are missing."""
    shares: dict[str, dict[str, float]]
    """`task/modality` → expert → its share of the choices in the last quarter of the steps, averaged over layers."""


def recipes(arm: str, seed: int, folder: Path, scale: float = 1.0, changes: Sequence[str] = ()) -> list[Recipe]:
    """Return the runs that an arm needs, in order.

    Args:
        arm: One of `ARMS`.
        seed: The seed for all runs.
        folder: The folder of the benchmark.
        scale: A factor on the number of steps of every run.
        changes: `KEY=VALUE` for all runs.
    """
    own = [f"{LAST}:{change}" for change in ARMS[arm]]
    common = [f"seed={seed}", f"train.run_dir={folder}/seed{seed}", f"data.root={KIT}", "telemetry.trackers=[]"]
    steps = {recipe.name: recipe.train.steps for recipe in load_chain(CHAIN, common)}
    if arm == "dense_long":
        steps[LAST] += sum(steps[name] for name in EXPERT_RUNS)
    for name, number in steps.items():
        number = max(2, round(scale * number))
        own += [f"{name}:train.steps={number}", f"{name}:checkpoint.every_steps={max(1, number // 4)}"]
    common += ["eval.every_steps=0"]  # only the test split is evaluated, at the end of each run
    found = load_chain(CHAIN, [*common, *own, f"{LAST}:name={arm}", *changes])
    return [recipe for recipe in found if recipe.name not in EXPERT_RUNS or arm in NEEDS_EXPERTS]


def run(recipe: Recipe, folder: Path, deadline: float) -> int:
    """Train a run until it is finished or a deadline has passed, and return the exit code of the trainer.

    Args:
        recipe: The run.
        folder: The folder of the benchmark, to which the output is written.
        deadline: The time at which the run is asked to save and stop, in seconds of `time.monotonic`.
    """
    place = folder / "recipes" / f"{Path(recipe.train.run_dir).name}-{recipe.name}.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(dump(recipe), encoding="utf-8")
    with open(place.with_suffix(".txt"), "ab") as output:
        environ = {"OMP_NUM_THREADS": "1", **os.environ}
        trainer = subprocess.Popen(module_command("trainer", str(place)), stdout=output, stderr=output, env=environ)
        try:
            return trainer.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            trainer.send_signal(signal.SIGTERM)
            return trainer.wait()
        finally:
            if trainer.poll() is None:  # this process was interrupted
                trainer.send_signal(signal.SIGTERM)
                trainer.wait()


def train(arm: str, seed: int, folder: Path, minutes: float, scale: float = 1.0, changes: Sequence[str] = ()) -> int:
    """Train an arm for a limited time, add its result to the file if it is finished, and return the exit code."""
    if any((result.arm, result.seed) == (arm, seed) for result in read_results(folder)):
        print(f"{arm}, seed {seed}: finished earlier")
        return 0
    deadline = time.monotonic() + 60 * minutes - _SAVE_SEC
    needed = recipes(arm, seed, folder, scale, changes)
    for recipe in needed:
        if is_finished(recipe):
            continue
        if time.monotonic() >= deadline:
            print(f"{arm}, seed {seed}: {recipe.name} comes next; call again to resume")
            return ExitCode.STOPPED
        code = run(recipe, folder, deadline)
        if code == ExitCode.STOPPED:
            print(f"{arm}, seed {seed}: {recipe.name} was stopped by the time limit; call again to resume")
            return code
        if code:
            print(f"{arm}, seed {seed}: {recipe.name} ended with exit code {code}; see {folder / 'recipes'}")
            return 1
    result = read_result(arm, seed, needed[-1])
    with open(folder / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")
    print(json.dumps(asdict(result)))
    return 0


def read_result(arm: str, seed: int, recipe: Recipe) -> Result:
    """Return the result of an arm whose runs are finished, given the recipe of its last run."""
    place = Path(recipe.train.run_dir) / recipe.name
    scores = json.loads((place / "summary.json").read_text(encoding="utf-8"))["scores"]["test"]
    shares: dict[str, dict[str, float]] = {}
    history = read_history(place / HISTORY_NAME)
    last = [load for load in history if load.step > 0.75 * recipe.train.steps] or history[-1:]
    if last:
        shares = shares_of(add_up(last))
    return Result(arm, seed, recipe.train.steps, {m: scores[m] for m in METRICS if m in scores}, shares)


def shares_of(load: TokenLoad) -> dict[str, dict[str, float]]:
    """Return the share of each expert for each task and modality, averaged over layers."""
    return {
        "/".join(key): dict(zip(load.experts, cell.share.mean(0).round(4).tolist(), strict=True))
        for key, cell in load.totals("task", "modality").items()
    }


def read_results(folder: Path) -> list[Result]:
    """Return the results of all finished arms."""
    path = folder / RESULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [Result(**json.loads(line)) for line in lines]


def table(results: Sequence[Result]) -> str:
    """Return the mean and the range over seeds of every metric and arm, and the shares of the experts by arm."""
    arms = [arm for arm in ARMS if any(result.arm == arm for result in results)]
    seeds = {arm: sum(result.arm == arm for result in results) for arm in arms}
    lines = [f"{'test split':24}" + "".join(f"{f'{arm} ({seeds[arm]})':>24}" for arm in arms)]
    for metric in METRICS:
        cells = []
        for arm in arms:
            values = [result.scores[metric] for result in results if result.arm == arm and metric in result.scores]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})" if values else "–")
        lines.append(f"{metric:24}" + "".join(f"{cell:>24}" for cell in cells))
    for arm in arms:
        own = [result.shares for result in results if result.arm == arm and result.shares]
        for group in sorted({group for shares in own for group in shares}):
            found = [shares[group] for shares in own if group in shares]
            means = {expert: statistics.mean(shares[expert] for shares in found) for expert in found[0]}
            lines.append(f"{arm:12} {group:16} " + "  ".join(f"{name} {share:.2f}" for name, share in means.items()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.unimoe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", choices=tuple(ARMS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=12.0, help="time after which a call stops (default: 12)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all numbers of steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/unimoe"))
    parser.add_argument("--table", action="store_true", help="print the results of all arms and seeds so far")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="changes to all runs")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read_results(options.folder)))
        return 0
    if options.arm is None:
        parser.error("--arm or --table is required")
    if not (KIT / "asr.jsonl").exists():
        print(json.dumps({"passed": None, "reason": f"no kit at {KIT}; set KIT_DIR"}))
        return 3
    code: Any = train(options.arm, options.seed, options.folder, options.minutes, options.scale, options.changes)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
