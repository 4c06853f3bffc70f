"""Compare the speed and memory of training with Hugging Face Trainer on DeepSpeed ZeRO-3.

    python -m bench.trainer [--ranks 2 4] [--tune]

The model has a primary encoder, four encoder experts, two gates that each choose one expert per clip, and a Llama with
31 M parameters. All variants (*arms*) train the same model from the same weights (`model.speech_llm.SpeechLLM`) in
fp32, with the same optimizer and the same number of clips per update. The clips are noise with the lengths of clips in
the kit (a set of small public recordings, in the folder $KIT_DIR).

- earshot: earshot's training step, with data parallelism.
- padded: Trainer with padded micro-batches in random order. Every encoder expert encodes every clip, and the features
  of experts that the router did not choose get the weight 0. Such models are commonly trained in this way.
- grouped: like `padded`, but with clips of similar length in a micro-batch (`group_by_length`). Trainer's
  `batch_rebalance`, which divides the clips of an update into micro-batches of equal cost, is one of the settings that
  `--tune` measures.

The arms that use Trainer (*peers*) benefit from parts of earshot: their encoders do not pad clips to 30 s, and the
convolutions of the encoders are fast on CPUs. `--tune` measures settings other than `BEST`. In each round, the arms run
one after the other on the same clips. The first update is not timed. The updates of `padded` and `earshot`
have the same clips, so their losses must be equal.

Goals: earshot processes at least 2 times as many tokens per second as the best peer, its peak memory per rank is at
most that of this peer, and losses agree within 1e-4. If there are fewer idle cores than ranks, the wall time depends on
the other load, and the CPU seconds of all ranks are compared instead. The exit code is 1 if a goal is missed. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.run.launch import start_ranks

Record = dict[str, Any]

SPEED_GOAL, MEMORY_GOAL, LOSS_LIMIT = 2.0, 1.0, 1e-4
ROUNDS = 3
OURS = "earshot"
SAME_CLIPS, GROUPED = "padded", "grouped"
PEERS = (SAME_CLIPS, GROUPED)
BEST: dict[str, dict[str, Any]] = {OURS: {"expert": 2}, SAME_CLIPS: {"micro": 8}, GROUPED: {"micro": 8}}
"""The best known settings of each arm. Not all candidates have been measured (BENCHMARKS.md)."""
MICRO = [{"micro": clips} for clips in (4, 8, 16)]
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    OURS: [{}, {"expert": 2}, {"tensor": 2}, {"recompute_calls": True}],
    SAME_CLIPS: [*MICRO, {"micro": 8, "persistent": 10**9}],
    GROUPED: [*MICRO, {"micro": 8, "persistent": 10**9}, {"kind": "balanced", "micro": 8}],
}


def run_arm(kind: str, setting: Mapping[str, Any], ranks: int, sizes: Mapping[str, int]) -> Record:
    """Run an arm in new processes, and return its measurements.

    Raises:
        SystemExit: If a rank fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        job = json.dumps({"setting": {"kind": kind, **setting}, "sizes": dict(sizes), "out": str(out)})
        if code := start_ranks(ranks, [sys.executable, "-m", "bench.trainer_arms", job]):
            raise SystemExit(code)
        record: Record = json.loads(out.read_text(encoding="utf-8"))
        return record


def tune(ranks: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Measure each candidate setting of each arm once, and return the summaries by arm and setting."""
    work = work_of(sizes)
    found: dict[str, Any] = {}
    for kind, settings in CANDIDATES.items():
        for setting in settings:
            row, name = summary([run_arm(kind, setting, ranks, sizes)], work), f"{kind} {setting}"
            found[name] = row
            print(f"  {name:52} {row['tokens_per_sec']:8.1f} tokens/s {row['peak_mib']:7.0f} MiB", flush=True)
    return found


def work_of(sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the number of clips, tokens and seconds of audio in the timed part of an arm."""
    from bench.trainer_work import Sizes, draw_samples
    from model.lengths import SAMPLE_RATE

    chosen = Sizes(**sizes)
    samples = draw_samples(chosen)[chosen.global_batch :]
    return {
        "clips": len(samples),
        "tokens": sum(s.num_tokens for s in samples),
        "audio_sec": sum(len(s.clips[0]) for s in samples) / SAMPLE_RATE,
    }


def summary(records: Sequence[Record], work: Mapping[str, Any]) -> dict[str, Any]:
    """Return the median speed and CPU time over rounds, the range of the speed, and the maximum of the peak memory."""
    tokens, clips = work["tokens"], work["clips"]
    seconds = [r["sec"] for r in records]
    return {
        "tokens_per_sec": tokens / statistics.median(seconds),
        "range": [tokens / max(seconds), tokens / min(seconds)],
        "clips_per_sec": clips / statistics.median(seconds),
        "cpu_sec_per_clip": statistics.median(r["cpu_sec"] for r in records) / clips,
        "peak_mib": max(r["peak_mib"] for r in records),
    }


def idle_cores() -> int:
    """Return the number of cores that this process may use, minus the load average of the last minute."""
    return max(0, round(len(os.sched_getaffinity(0)) - os.getloadavg()[0]))


def compare(found: Mapping[str, Sequence[Record]], work: Mapping[str, Any], ranks: int, cores: int) -> dict[str, Any]:
    """Print a table, and return the measurements of one number of ranks.

    Args:
        found: The records of each arm.
        work: The result of `work_of`.
        ranks: The number of ranks.
        cores: The number of cores that were idle before the first arm started.
    """
    rows = {name: summary(records, work) for name, records in found.items()}
    print(
        f"{ranks} ranks: {work['clips']} clips, {work['audio_sec']:.0f} s of audio, {work['tokens']} tokens per round"
    )
    print(f"  {'arm':10} {'tokens/s (range)':>24} {'clips/s':>8} {'CPU s/clip':>11} {'peak MiB/rank':>14}")
    for name, row in rows.items():
        low, high = row["range"]
        speed = f"{row['tokens_per_sec']:.1f} ({low:.1f}–{high:.1f})"
        rest = f"{row['clips_per_sec']:8.2f} {row['cpu_sec_per_clip']:11.3f} {row['peak_mib']:14.0f}"
        print(f"  {name:10} {speed:>24} {rest}")
    peers = [name for name in rows if name != OURS]
    # Each round is compared with the same round of the peer, since other load on the machine slows both.
    ratios = {
        what: {n: [b[what] / a[what] for a, b in zip(found[OURS], found[n], strict=True)] for n in peers}
        for what in ("sec", "cpu_sec")
    }
    deciding = ratios["sec" if cores >= ranks else "cpu_sec"]
    best = min(peers, key=lambda name: statistics.median(deciding[name]))
    speed, memory = statistics.median(deciding[best]), rows[OURS]["peak_mib"] / rows[best]["peak_mib"]
    pairs = zip(found[OURS][0]["losses"], found[SAME_CLIPS][0]["losses"], strict=True)
    difference = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    passed = speed >= SPEED_GOAL and memory <= MEMORY_GOAL and difference <= LOSS_LIMIT
    for what, name in (("sec", "time"), ("cpu_sec", "CPU time")):
        each = ratios[what][best]
        spread = f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})"
        print(f"  the best peer, {best}, needs {spread} times the {name}")
    print(f"  {memory:.2f} times its memory; losses agree within {difference:.1e}; {cores} idle cores", flush=True)
    return {
        "passed": passed,
        "speed": speed,
        "decided_by": "time" if deciding is ratios["sec"] else "CPU time",
        "ratios": ratios,
        "best_peer": best,
        "memory": memory,
        "loss_difference": difference,
        "arms": rows,
    }


def run(ranks: Sequence[int], rounds: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Measure all arms on each number of ranks, and return the result as a JSON-compatible tree."""
    work, found, cores = work_of(sizes), {}, idle_cores()
    for num_ranks in ranks:
        records: dict[str, list[Record]] = {kind: [] for kind in (OURS, *PEERS)}
        for number in range(rounds):
            for kind in list(records)[:: -1 if number % 2 else 1]:
                records[kind].append(run_arm(kind, BEST[kind], num_ranks, sizes))
        found[f"{num_ranks} ranks"] = compare(records, work, num_ranks, cores)
    return {"passed": all(part["passed"] for part in found.values()), "work": work, "settings": BEST, **found}


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, 1 if not, 2 without accelerate."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="N", help="numbers of ranks (default: 2)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"number of rounds (default: {ROUNDS})")
    parser.add_argument("--tune", action="store_true", help="measure the candidate settings of each arm instead")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to check the benchmark itself")
    options = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        print("error: accelerate, which Trainer needs, is not installed: pip install accelerate", file=sys.stderr)
        return 2
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    sizes: dict[str, int] = {}
    if options.tiny:
        from bench.trainer_work import TINY

        sizes = asdict(TINY)
    if options.tune:
        print(json.dumps({f"{n} ranks": tune(n, sizes) for n in options.ranks}))
        return 0
    result = run(options.ranks, options.rounds, sizes)
    print(
        f"goals: {SPEED_GOAL} times the speed of the best peer, at most its memory, equal losses: "
        + ("met" if result["passed"] else "MISSED")
    )
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
