"""Measure the fraction of padding in the frames that the encoders compute and in the tokens that the LLM computes.

    python -m bench.padding

The plan of `trainer.parallel` sends clips of similar length to the same rank, divides them into encoder calls (padded
batches) with little padding, and assigns samples to packed sequences of equal length for the LLM. The plan is compared
with batches in the order in which the samples arrive, with ten length buckets, and with padding of every clip to 30 s,
for the same samples and the same budget. The samples are all training clips of the kit (a set of small public
recordings, in the folder $KIT_DIR) and clips of log-normal duration, in global batches of several sizes. By default,
the plan assumes the cost of an additional encoder call on a CPU (`CALL_COST_SAMPLES`). It is also measured with
different costs.

Goal: at most 2 % of encoder frames and of LLM tokens are padding. The exit code is 1 if the goal is missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bench.loader_corpus import KIT, durations
from model.lengths import FRAME_SAMPLES, TokenRate, num_frames, num_samples
from trainer.parallel.balance import spread_alike
from trainer.parallel.dispatch import CALL_COST_SAMPLES, group_by_length
from trainer.parallel.packs import plan_packs

GOAL = 0.02
RATE = TokenRate((2, 2, 2))
ENCODER_BATCH_SEC, PACK_TOKENS = 480.0, 4096
"""The defaults of `train.encoder_batch_sec` and `train.llm_tokens_per_microbatch`."""
RANKS, BATCHES = (1, 8), (64, 256, 1024)
CALL_COST = CALL_COST_SAMPLES["cpu"]
OTHER_CALL_COSTS_SEC = (10.0, 3.0, 0.3)
"""Other costs of an additional encoder call, in seconds of audio. The first is the cost on a GPU."""
NUM_LOG_NORMAL = 16384
LONGEST_SEC = 30.0
NUM_BUCKETS = 10

Groups = list[list[int]]


def kit() -> tuple[list[float], list[int]] | None:
    """Return the duration and the number of text tokens (about four characters each) of each of the kit's training
    samples.

    The result is None without the kit.
    """
    seconds, text = [], []
    for path in sorted(KIT.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["split"] == "train" and isinstance(row["audio"], str):
                seconds.append(float(row["duration"]))
                text.append((len(row["instruction"]) + len(row["answer"])) // 4 + 2)
    return (seconds, text) if seconds else None


def log_normal() -> tuple[list[float], list[int]]:
    """Return log-normal durations and each clip's number of text tokens, assuming three spoken words per second."""
    seconds = durations(NUM_LOG_NORMAL)
    return seconds, [12 + round(4 * s) for s in seconds]


def waste(groups: Groups, frames: Sequence[int]) -> tuple[int, int]:
    """Return the total number of frames when every clip is padded to the longest in its batch, and the number without
    padding.
    """
    return sum(len(g) * max(frames[i] for i in g) for g in groups if g), sum(frames[i] for g in groups for i in g)


def planned(frames: Sequence[int], budget: int, call_cost: int) -> Groups:
    """Return the batches into which `trainer.engine.expert_parallel` splits a rank's clips."""
    return group_by_length([FRAME_SAMPLES * f for f in frames], FRAME_SAMPLES * budget, call_cost)


def naive(frames: Sequence[int], budget: int) -> Groups:
    """Return batches of consecutive samples, each of which ends before its padded size would exceed the budget."""
    groups: Groups = [[]]
    for i, length in enumerate(frames):
        longest = max([length, *(frames[j] for j in groups[-1])])
        if groups[-1] and (len(groups[-1]) + 1) * longest > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


def bucketed(frames: Sequence[int], budget: int) -> Groups:
    """Return batches formed within ten length buckets. The buckets hold about the same number of samples."""
    edges = np.quantile(frames, np.linspace(0, 1, NUM_BUCKETS + 1)[1:-1])
    bucket = np.searchsorted(edges, frames, side="left")
    groups: Groups = []
    for b in range(NUM_BUCKETS):
        members = np.flatnonzero(bucket == b).tolist()
        groups += [[members[i] for i in g] for g in naive([frames[i] for i in members], budget) if g]
    return groups


def steps(num: int, batch: int, seed: int = 0) -> Iterator[list[int]]:
    """Yield the sample indices of the global batches of one shuffled epoch."""
    order = np.random.default_rng(seed).permutation(num).tolist()
    for start in range(0, num - batch + 1, batch):
        yield order[start : start + batch]


def encoder_waste(frames: Sequence[int], batch: int, ranks: int, call_cost: int = CALL_COST) -> tuple[float, float]:
    """Return the fraction of padding in encoder frames, and the number of encoder calls per step and rank."""
    budget, padded, real, calls, num_steps = round(ENCODER_BATCH_SEC * 50), 0, 0, 0, 0
    for step in steps(len(frames), batch):
        rank_of = spread_alike([frames[i] for i in step], ranks)
        for rank in range(ranks):
            mine = [frames[step[i]] for i in np.flatnonzero(rank_of == rank)]
            groups = planned(mine, budget, call_cost)
            p, r = waste(groups, mine)
            padded, real, calls = padded + p, real + r, calls + len(groups)
        num_steps += 1
    return 1 - real / padded, calls / num_steps / ranks


def whole_set_waste(frames: Sequence[int], group: Callable[[Sequence[int], int], Groups]) -> float:
    """Return the fraction of padding of a method that divides the whole shuffled dataset into batches."""
    order = np.random.default_rng(0).permutation(len(frames))
    mine = [frames[i] for i in order]
    padded, real = waste(group(mine, round(ENCODER_BATCH_SEC * 50)), mine)
    return 1 - real / padded


def llm_waste(tokens: Sequence[int], batch: int, replicas: int) -> float:
    """Return the fraction of padding in the tokens of the LLM's packed sequences."""
    rows = real = 0
    for step in steps(len(tokens), batch):
        packs = plan_packs([tokens[i] for i in step], replicas, PACK_TOKENS, 1)
        rows += replicas * packs.num_microbatches * packs.pack_tokens
        real += sum(packs.num_tokens)
    return 1 - real / rows


def padded_llm_waste(tokens: Sequence[int]) -> float:
    """Return the fraction of padding in LLM batches of consecutive samples, each padded to its longest sample."""
    order = np.random.default_rng(0).permutation(len(tokens))
    mine = [tokens[i] for i in order]
    padded, real = waste(naive(mine, PACK_TOKENS), mine)
    return 1 - real / padded


def measure(seconds: Sequence[float], text: Sequence[int]) -> dict[str, Any]:
    """Return all measurements of one dataset, given the duration and the number of text tokens of each sample."""
    samples = [num_samples(s) for s in seconds]
    frames = [num_frames(s) for s in samples]
    tokens = [RATE.tokens_of_samples(s) + t for s, t in zip(samples, text, strict=True)]
    longest = round(LONGEST_SEC * 50)
    found: dict[str, Any] = {
        "encoder": {
            "to 30 s": 1 - sum(frames) / (len(frames) * longest),
            "naive": whole_set_waste(frames, naive),
            "10 buckets": whole_set_waste(frames, bucketed),
        },
        "llm": {"naive": padded_llm_waste(tokens)},
        "calls": {},
    }
    for ranks in RANKS:
        for batch in BATCHES:
            name = f"plan, {batch} samples, world size {ranks}"
            found["encoder"][name], found["calls"][name] = encoder_waste(frames, batch, ranks)
            found["llm"][name] = llm_waste(tokens, batch, ranks)
    for cost_sec in OTHER_CALL_COSTS_SEC:
        name = f"plan, {max(BATCHES)} samples, world size 1, call cost {cost_sec:g} s"
        found["encoder"][name], found["calls"][name] = encoder_waste(frames, max(BATCHES), 1, num_samples(cost_sec))
    return found


def main() -> int:
    """Run the benchmark.

    Returns:
        The exit code: 0 if the goal is met for the largest batch on one and on eight ranks for every dataset, else 1.
    """
    datasets = {"log-normal": log_normal()} | ({} if (found := kit()) is None else {"kit": found})
    results: dict[str, Any] = {}
    for name, (seconds, text) in datasets.items():
        results[name] = measure(seconds, text)
        print(f"{name}: {len(seconds)} samples, {sum(seconds) / 3600:.2f} h, mean {np.mean(seconds):.2f} s")
        for part in ("encoder", "llm"):
            for way, share in results[name][part].items():
                calls = results[name]["calls"].get(way) if part == "encoder" else None
                note = "" if calls is None else f", {calls:.1f} calls per rank and step"
                print(f"  {part:8} {way:52} {100 * share:6.2f} % padding{note}", flush=True)
    goals = {
        f"{name} {part}, world size {ranks}": bool(
            found[part][f"plan, {max(BATCHES)} samples, world size {ranks}"] <= GOAL
        )
        for name, found in results.items()
        for part in ("encoder", "llm")
        for ranks in RANKS
    }
    print(json.dumps({"results": results, "goals": goals, "passed": all(goals.values())}))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
