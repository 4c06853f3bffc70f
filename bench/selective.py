"""Check that encoders that the router does not choose take no time.

    python -m bench.selective

One rank with three encoder experts of real families (HuBERT, WavLM, and Whisper without padding to 30 s, all with
random weights) runs forward and backward passes through `trainer.engine.expert_parallel.EncoderDispatch`. A *mix* is an
assignment of clips to experts. c_k is the measured cost of encoder k alone on all clips, and p_k is the fraction of the
clips that a mix sends to encoder k.

Goal: for every mix, the ratio of its CPU seconds to the CPU seconds with all encoders on all clips is within 5 % of
Σ p·c / Σ c. The fractions p_k count clips, but the cost of a clip depends on its length. Each mix therefore has the
same fractions among short and long clips. The CPU seconds include planning and batching. The exit code is 1 if the goal
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import numpy as np
import torch
from torch import Tensor

from model.batch import Ragged
from model.config import EncoderConfig
from model.encoders.registry import build_encoder, encoder_windowing
from model.lengths import num_samples
from model.mixture import Expert
from trainer.run.launch import start_ranks

NUM_CLIPS, MEDIAN_SEC, SIGMA, BATCH_SEC, DIM, ROUNDS = 40, 3.0, 0.5, 24, 128, 3
LIMIT = 0.05
CONV_STACK = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": [64] * 7,
    "num_conv_pos_embeddings": 32,
}
WHISPER = {"d_model": 192, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 768}
ENCODERS = (
    EncoderConfig("hubert", "hubert", config=CONV_STACK),
    EncoderConfig("wavlm", "wavlm", config=CONV_STACK),
    EncoderConfig("whisper", "whisper", config=WHISPER, length_mode="trim"),
)
MIXES = {
    "one expert per clip, evenly": ((0,), (1,), (2,)),
    "one expert per clip, uneven": ((0,),) * 6 + ((1,),) * 3 + ((2,),),
    "mostly Whisper": ((2,),) * 8 + ((0,), (1,)),
    "HuBERT never": ((1,), (2,)),
    "two gates": ((0, 1), (1, 2), (0, 2), (0,)),
}
"""A pattern of encoder experts for each mix, by the name of the mix.

The pattern is repeated over the clips from the longest to the shortest.
"""


def routing(lengths: tuple[int, ...], pattern: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return the encoder experts of each clip, [B, K] bool.

    Args:
        lengths: The lengths of the B clips.
        pattern: A value of `MIXES`.
    """
    wanted = torch.zeros(len(lengths), len(ENCODERS), dtype=torch.bool)
    for turn, clip in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        lap, place = divmod(turn, len(pattern))
        # Every second repetition is reversed. Otherwise, the first element would always get the longer clips.
        wanted[clip, list(pattern[-1 - place if lap % 2 else place])] = True
    return wanted


def measure() -> dict[str, list[float]]:
    """Measure the CPU seconds of a forward and backward pass in each round.

    Returns:
        The CPU seconds of each round. The keys are `all`, the names of the encoders, and the names of the mixes.
    """
    import torch.distributed as dist

    from trainer.engine.expert_parallel import EncoderDispatch
    from trainer.engine.placement import clip_cost
    from trainer.parallel.groups import Groups, connect
    from trainer.parallel.topology import Topology

    rank, world, device = connect(timeout_sec=60)
    assert dist.group.WORLD is not None
    groups = Groups(Topology(world, 1, 1), rank, device, dist.group.WORLD, dist.group.WORLD)
    torch.manual_seed(0)
    names = [e.name for e in ENCODERS]
    built = [build_encoder(e) for e in ENCODERS]
    experts = {n: Expert(encoder, encoder.dim, DIM) for n, encoder in zip(names, built, strict=True)}
    dispatch = EncoderDispatch(
        experts,
        names,
        [clip_cost(e) for e in ENCODERS],
        [encoder_windowing(e) for e in ENCODERS],
        [0] * len(names),
        1,
        groups,
        budget_samples=num_samples(BATCH_SEC),
        empty=torch.zeros(0, DIM),
    )
    clips = draw_clips()
    everything = torch.ones(NUM_CLIPS, len(names), dtype=torch.bool)
    only = {n: everything & (torch.arange(len(names)) == k) for k, n in enumerate(names)}
    runs = {"all": everything, **only, **{mix: routing(clips.lengths, pattern) for mix, pattern in MIXES.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + ROUNDS):
        for name in [*runs][:: 1 if number % 2 else -1]:
            start = time.process_time()
            sum(f.values.square().sum() for f in dispatch(names, clips, runs[name])).backward()
            if number:  # the first round is a warm-up
                seconds[name].append(time.process_time() - start)
    dist.destroy_process_group()
    return seconds


def draw_clips() -> Ragged:
    """Return clips of noise with log-normal durations."""
    rng = np.random.default_rng(0)
    durations = np.clip(rng.lognormal(np.log(MEDIAN_SEC), SIGMA, NUM_CLIPS), 1.0, 12.0)
    return Ragged.of(
        [torch.from_numpy(0.1 * rng.standard_normal(num_samples(s)).astype(np.float32)) for s in durations]
    )


def report(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Print a table, and return the result as a JSON-compatible tree."""
    lengths, names = draw_clips().lengths, [e.name for e in ENCODERS]
    # Other load on the machine can only increase the measured times, so the minimum is used.
    least = {name: min(spent) for name, spent in seconds.items()}
    cost = {name: least[name] for name in names}
    print("minimum CPU seconds on all clips: " + ", ".join(f"{n} {c:.2f}" for n, c in cost.items()), end="")
    print(f", all {least['all']:.2f}")
    print(f"{'mix':30} {'p':>18} {'Σp·c/Σc':>9} {'measured (range)':>24} {'off by':>7}")
    rows = []
    for mix, pattern in MIXES.items():
        p = routing(lengths, pattern).float().mean(0).tolist()
        expected = sum(share * cost[n] for share, n in zip(p, names, strict=True)) / sum(cost.values())
        ratios = [part / whole for part, whole in zip(seconds[mix], seconds["all"], strict=True)]
        found = least[mix] / least["all"]
        off = found / expected - 1
        rows.append({"mix": mix, "p": p, "expected": expected, "measured": found, "off": off})
        shares = " ".join(f"{s:.2f}" for s in p)
        spread = f"{found:.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
        print(f"{mix:30} {shares:>18} {expected:9.3f} {spread:>24} {100 * off:+6.1f}%")
    passed = all(abs(float(str(row["off"]))) <= LIMIT for row in rows)
    print(f"goal: within {100 * LIMIT:.0f} % for every mix: {'met' if passed else 'MISSED'}")
    return {"passed": passed, "cost_sec": cost, "mixes": rows}


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, else 1."""
    argparse.ArgumentParser(prog="python -m bench.selective", description=(__doc__ or "").splitlines()[0]).parse_args()
    if "RANK" not in os.environ:
        # The same shapes occur in every round, so oneDNN's cache must be able to hold the kernels for all shapes.
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "20000"}
        return start_ranks(1, [sys.executable, "-m", "bench.selective"])
    result = report(measure())
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
