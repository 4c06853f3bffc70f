"""Compare planned step times and peak memory with the values of published training runs.

    python -m bench.plan_published [ROW …] [--memory] [--halves]

`bench/published.csv` contains the runs with their sources. Earshot's planner plans each run as an LLM with a one-layer
encoder and one clip of 0.1 s. The column `recipe` lists recipe keys for mechanisms that the run used. The column
`mechanisms` lists mechanisms that the run used but the trainer does not have. The column `counts` is `yes` for runs
that decide the exit code, `what-if` for runs that the trainer cannot reproduce (because of context parallelism,
overlapping tensor parallelism, fp8 or deterministic kernels), and `no` for runs whose step time or micro-batch is
uncertain.

The last line is a JSON object. The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROWS = Path(__file__).with_name("published.csv")
TIME_LIMITS, RMS_LIMIT, MEMORY_LIMIT = (0.8, 1.25), 0.12, 0.15
GIB = 2**30


@dataclass(frozen=True)
class Published:
    """A published run."""

    id: str
    counts: str
    accelerator: str
    recompute: str
    recipe: str
    mechanisms: str
    settings: dict[str, int]
    """The columns with whole numbers, such as the sizes of the model and of the layout, by name."""
    step_sec: float
    """The published duration of a step in seconds."""
    peak_gib: float | None
    """The published peak memory of a GPU in GiB; None if it was not published."""
    source: str
    note: str
    """The properties of the run that a recipe cannot express."""


@dataclass(frozen=True)
class Compared:
    """A published run, and the step time and memory of its plan."""

    row: Published
    step_sec: float
    """The planned duration of a step in seconds. `low_sec` and `high_sec` are the bounds of its range."""
    low_sec: float
    high_sec: float
    peak_gib: float | None
    """The planned peak memory of a GPU in GiB; None if it was not planned."""

    @property
    def ratio(self) -> float:
        """The planned step time divided by the published step time."""
        return self.step_sec / self.row.step_sec

    @property
    def memory_ratio(self) -> float | None:
        """The planned peak memory divided by the published peak memory; None if one of them is unknown."""
        if self.peak_gib is None or self.row.peak_gib is None:
            return None
        return self.peak_gib / self.row.peak_gib


def published(path: Path = ROWS) -> list[Published]:
    """Read the published runs."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            own = {k: int(v) for k, v in row.items() if k not in _TEXT}
            peak = float(row["published_peak_gib"]) if row["published_peak_gib"] else None
            found.append(
                Published(
                    row["id"],
                    row["counts"],
                    row["accelerator"],
                    row["recompute"],
                    row["recipe"],
                    row["mechanisms"],
                    own,
                    float(row["published_step_sec"]),
                    peak,
                    row["source"],
                    row["note"],
                )
            )
    return found


_TEXT = (
    "id",
    "counts",
    "accelerator",
    "recompute",
    "recipe",
    "mechanisms",
    "published_step_sec",
    "published_peak_gib",
    "note",
    "source",
)


def recipe_of(row: Published) -> Any:
    """Return a recipe with the run's LLM and layout, and with very small audio modules."""
    from trainer.config.load import load_recipe

    s = row.settings
    encoder = "{name: whisper, family: whisper, config: {num_mel_bins: 80, d_model: 32, encoder_layers: 1, "
    encoder += "encoder_attention_heads: 2, encoder_ffn_dim: 64}}"
    samples = s["global_batch"]
    return load_recipe(
        "debug",
        [
            f"model.primary={encoder}",
            "model.experts=[]",
            "model.ctc_weight=0",
            f"model.llm.config.vocab_size={s['vocab']}",
            f"model.llm.config.hidden_size={s['hidden']}",
            f"model.llm.config.intermediate_size={s['ffn']}",
            f"model.llm.config.num_hidden_layers={s['layers']}",
            f"model.llm.config.num_attention_heads={s['heads']}",
            f"model.llm.config.num_key_value_heads={s['kv_heads']}",
            f"model.llm.config.max_position_embeddings={s['seq'] + 1}",
            f"parallel.num_ranks={s['ranks']}",
            f"parallel.tensor={s['tensor']}",
            f"parallel.pipeline={s['pipeline']}",
            f"data.global_batch_samples={samples}",
            f"data.num_lanes={samples}",
            f"train.llm_tokens_per_microbatch={s['seq'] * s['micro_batch']}",
            f"train.recompute_llm={row.recompute}",
            "train.precision=bf16",
            "train.deepspeed=ds_configs/zero3.json",
            *row.recipe.split(),
        ],
    )


def mechanisms_of(row: Published) -> Any:
    """Return the mechanisms that the run used but the trainer does not have."""
    from trainer.plan.mechanisms import Mechanisms

    changes: dict[str, Any] = {}
    for item in row.mechanisms.split():
        key, value = item.split("=")
        changes[key] = value == "true" if value in ("true", "false") else int(value) if value.isdigit() else value
    return dataclasses.replace(Mechanisms(), **changes)


def compare(row: Published, memory: bool, scale: float = 1.0) -> Compared:
    """Plan a published run.

    Args:
        row: The run.
        memory: True to plan the peak memory too, if the run's peak memory was published.
        scale: A factor for the fractions of the peak rate that matmuls reach.
    """
    from trainer.parallel.topology import build_topology
    from trainer.plan.accelerator import parse_accelerator
    from trainer.plan.plan import UNCERTAINTY
    from trainer.plan.planner import Planner
    from trainer.plan.states import States
    from trainer.plan.workload import Workload, source_ranks_of

    recipe = recipe_of(row)
    accelerator, mechanisms = parse_accelerator(row.accelerator), mechanisms_of(row)
    matrix = tuple((at, min(1.0, share * scale)) for at, share in accelerator.matrix)
    accelerator = dataclasses.replace(accelerator, matrix=matrix)
    planner = Planner(recipe, accelerator, mechanisms=mechanisms)
    samples = row.settings["global_batch"]
    clips = np.zeros(samples, dtype=np.int64)
    clips[0] = 1600
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    tokens = np.full(samples, row.settings["seq"], dtype=np.int64)
    workload = Workload(clips, tokens, source_ranks_of(recipe, topology))
    topology, work, packs = planner.place(recipe, workload)
    ranks = row.settings["ranks"] / topology.dp
    weights = sum(s.total for n, s in planner.sizes.items() if n.startswith("llm.")) / ranks
    states = States(int(2 * weights), int(4 * weights), int(12 * weights / topology.dp))
    seconds = []
    for change in (0.0, UNCERTAINTY, -UNCERTAINTY):
        planner.accelerator = accelerator.ranging(change)
        seconds.append(planner.time(recipe, workload, topology, work, packs, states)[2].total)
    peak = None
    if memory and row.peak_gib is not None:
        planner.accelerator = accelerator
        plan = planner.plan(recipe, workload)
        peak = plan.worst.total / GIB
    return Compared(row, *seconds, peak)


def rms(ratios: Sequence[float]) -> float:
    """Return the root mean square of the deviations of `ratios` from 1."""
    return float(np.sqrt(np.mean((np.array(ratios) - 1) ** 2))) if ratios else 0.0


def halves(rows: Sequence[Published]) -> list[dict[str, float]]:
    """Fit one factor for all matmul tables on half of the rows, evaluate it on the other half, and swap the halves.

    Returns:
        For each half, the fitted factor, and the RMS deviation on the other half with and without this factor.
    """
    planned = {scale: [compare(row, memory=False, scale=scale).ratio for row in rows] for scale in _SCALES}
    found = []
    for first in (0, 1):
        best = min(_SCALES, key=lambda scale: rms(planned[scale][first::2]))
        other = slice(1 - first, None, 2)
        found.append({"factor": best, "rms": rms(planned[best][other]), "rms_unfitted": rms(planned[1.0][other])})
    return found


_SCALES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)


def main() -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0 if the goals are met, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan_published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="parts of the names of rows (default: all rows)")
    parser.add_argument("--memory", action="store_true", help="also plan the peak memory of runs that published it")
    parser.add_argument(
        "--halves",
        action="store_true",
        help="also fit one factor on half of the rows whose `counts` is not `no`, and evaluate it on the other half",
    )
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from trainer.__main__ import be_calm

    be_calm()
    found = []
    print(f"{'row':26s} {'counts':8s} {'published':>9s} {'planned':>8s} {'range':>15s} {'ratio':>6s} {'memory':>6s}")
    for row in published():
        if options.rows and not any(part in row.id for part in options.rows):
            continue
        one = compare(row, options.memory)
        found.append(one)
        memory = f"{one.memory_ratio:6.2f}" if one.memory_ratio is not None else ""
        span = f"{one.low_sec:.2f}–{one.high_sec:.2f}"
        times = f"{row.step_sec:9.2f} {one.step_sec:8.2f} {span:>15s}"
        print(f"{row.id:26s} {row.counts:8s} {times} {one.ratio:6.2f} {memory}", flush=True)
    result = {
        counts: summary([one for one in found if one.row.counts == counts]) for counts in ("yes", "what-if", "no")
    }
    for counts, one in result.items():
        print(f"{counts}: {one['rows']} rows, rms {one['rms']:.1%}, ratios {one['least']:.2f}–{one['most']:.2f}, "
              f"{one['in_range']} published times in the planned range")  # fmt: skip
    counted = result["yes"]
    missed = [one.row.id for one in found if one.row.counts == "yes" and not within(one)]
    passed = not missed and counted["rms"] <= RMS_LIMIT
    checked = halves([one.row for one in found if one.row.counts != "no"]) if options.halves else []
    for half in checked:
        print(
            "halves: factor {factor:.2f} fitted on one, rms {rms:.1%} on the other ({rms_unfitted:.1%} without the "
            "factor)".format(**half)
        )
    print(json.dumps({"passed": passed, "missed": missed, **result, "halves": checked}))
    return 0 if passed else 1


def within(one: Compared) -> bool:
    """Return whether a run meets the goals for single runs."""
    memory = one.memory_ratio
    return TIME_LIMITS[0] <= one.ratio <= TIME_LIMITS[1] and (memory is None or abs(memory - 1) <= MEMORY_LIMIT)


def summary(rows: Sequence[Compared]) -> dict[str, Any]:
    """Return the number of runs, and statistics of the ratios of planned to published time and memory."""
    ratios = [one.ratio for one in rows]
    in_range = sum(one.low_sec <= one.row.step_sec <= one.high_sec for one in rows)
    memory = [one.memory_ratio for one in rows if one.memory_ratio is not None]
    return {
        "rows": len(rows),
        "rms": rms(ratios),
        "least": min(ratios, default=0.0),
        "most": max(ratios, default=0.0),
        "in_range": in_range,
        "memory_ratios": memory,
    }


if __name__ == "__main__":
    sys.exit(main())
