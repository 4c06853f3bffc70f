"""Compare a mixture of separately trained FFN experts with a mixture of identical copies and with a dense LLM.

    python -m bench.unimoe --arm mixture --seed 1     train one variant with one seed, for at most 12 minutes
    python -m bench.unimoe --table                    print the results of all variants and seeds so far

`KEY=VALUE` arguments change all runs, as in `earshot chain`. On two cores, training two seeds in parallel, each on one
rank, takes about 60 % of the time that training them one after the other on two ranks takes:

    python -m bench.unimoe --arm mixture --seed 1 parallel.num_ranks=1 parallel.expert=1 parallel.ffn_expert=1 &
    python -m bench.unimoe --arm mixture --seed 2 parallel.num_ranks=1 parallel.expert=1 parallel.ffn_expert=1

The chain `unimoe_cpu` reproduces the three stages of Uni-MoE (arXiv 2405.11273). It trains a small speech LLM, then
one expert each for speech, emotion and sound with low-rank adapters on the LLM's feed-forward networks, and finally a
mixture of these experts and the original network. The variants, called *arms*, differ only in this last run:

    mixture       two experts per token and no balance loss, as in the chain
    top1          one expert per token
    balance       with the balance loss (`model.losses.expert_balance`)
    copies        four identical copies of the original network as experts
    dense         no experts; the same data and number of steps as the last run of `mixture`
    dense_long    no experts; as many steps as the last run of `mixture` and the three expert runs together

All arms with the same seed share the first run, and `mixture`, `top1` and `balance` also share the runs that train the
experts. If the time limit stops an arm, rerun the command to resume it. The result of a finished arm is appended to
`results.jsonl` in the folder: the scores on the test split of the kit (a set of small public recordings, in the folder
KIT_DIR), and the fraction of routing decisions that selected each expert, for each task and modality. The exit code is
0 if the arm is finished, 75 if the command must be rerun, 1 if a run failed, and 3 if the kit is missing.
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
"""The recipe changes of each arm. They apply to the last run of the chain."""
NEEDS_EXPERTS = ("mixture", "top1", "balance")
"""The arms whose last run begins with the separately trained experts."""
_SAVE_SEC = 45
"""The time that is reserved for saving a checkpoint before the time limit, in seconds."""


@dataclass(frozen=True)
class Result:
    """The result of one arm with one seed."""

    arm: str
    seed: int
    num_steps: int
    """The number of steps of the arm's last run."""
    scores: dict[str, float]
    """The scores on the test split by metric. Metrics that apply to no sample are omitted."""
    shares: dict[str, dict[str, float]]
    """`task/modality` → expert → its fraction of the router's choices in the last quarter of the steps, averaged over
    layers."""


def recipes(arm: str, seed: int, folder: Path, scale: float = 1.0, changes: Sequence[str] = ()) -> list[Recipe]:
    """Return the recipes of the runs that an arm needs, in order.

    Args:
        arm: One of `ARMS`.
        seed: The seed for all runs.
        folder: The folder of the benchmark.
        scale: The factor by which the number of steps of every run is scaled.
        changes: `KEY=VALUE` changes to all runs.
    """
    own = [f"{LAST}:{change}" for change in ARMS[arm]]
    common = [f"seed={seed}", f"train.run_dir={folder}/seed{seed}", f"data.root={KIT}", "telemetry.trackers=[]"]
    steps = {recipe.name: recipe.train.steps for recipe in load_chain(CHAIN, common)}
    if arm == "dense_long":
        steps[LAST] += sum(steps[name] for name in EXPERT_RUNS)
    for name, number in steps.items():
        number = max(2, round(scale * number))
        own += [f"{name}:train.steps={number}", f"{name}:checkpoint.every_steps={max(1, number // 4)}"]
    common += ["eval.every_steps=0"]  # Only the test split is evaluated, at the end of each run.
    found = load_chain(CHAIN, [*common, *own, f"{LAST}:name={arm}", *changes])
    return [recipe for recipe in found if recipe.name not in EXPERT_RUNS or arm in NEEDS_EXPERTS]


def run(recipe: Recipe, folder: Path, deadline: float) -> int:
    """Train a run until it finishes or the deadline passes, and return the exit code of the trainer.

    Args:
        recipe: The run.
        folder: The folder of the benchmark, to which the output is written.
        deadline: The value of `time.monotonic` at which the run is asked to save a checkpoint and stop.
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
            if trainer.poll() is None:  # This process was interrupted.
                trainer.send_signal(signal.SIGTERM)
                trainer.wait()


def train(arm: str, seed: int, folder: Path, minutes: float, scale: float = 1.0, changes: Sequence[str] = ()) -> int:
    """Train an arm for a limited time, append its result to the file if it is finished, and return the exit code."""
    if any((result.arm, result.seed) == (arm, seed) for result in read_results(folder)):
        print(f"{arm}, seed {seed}: already finished")
        return 0
    deadline = time.monotonic() + 60 * minutes - _SAVE_SEC
    needed = recipes(arm, seed, folder, scale, changes)
    for recipe in needed:
        if is_finished(recipe):
            continue
        if time.monotonic() >= deadline:
            print(f"{arm}, seed {seed}: {recipe.name} comes next; rerun this command to resume")
            return ExitCode.STOPPED
        code = run(recipe, folder, deadline)
        if code == ExitCode.STOPPED:
            print(f"{arm}, seed {seed}: {recipe.name} was stopped by the time limit; rerun this command to resume")
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
    """Return the result of a finished arm, given the recipe of its last run."""
    place = Path(recipe.train.run_dir) / recipe.name
    scores = json.loads((place / "summary.json").read_text(encoding="utf-8"))["scores"]["test"]
    shares: dict[str, dict[str, float]] = {}
    history = read_history(place / HISTORY_NAME)
    last = [load for load in history if load.step > 0.75 * recipe.train.steps] or history[-1:]
    if last:
        shares = shares_of(add_up(last))
    return Result(arm, seed, recipe.train.steps, {m: scores[m] for m in METRICS if m in scores}, shares)


def shares_of(load: TokenLoad) -> dict[str, dict[str, float]]:
    """Return the fraction of choices that selected each expert for each task and modality, averaged over layers."""
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
    """Return a table of the mean and range of every metric over seeds, and of the expert shares, for each arm."""
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
    parser.add_argument("--minutes", type=float, default=12.0, help="time limit of this command (default: 12)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the number of steps of every run")
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
