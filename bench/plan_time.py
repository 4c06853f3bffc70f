"""Compare the planned time of steps with measurements on this machine's CPU, for the recipes of `bench.plan_memory`.

    python -m bench.plan_time [CASE …] [--rounds N]

The ranks alternate between calibrating the machine (`bench.calibrate`, on all ranks at the same time, as in a step) and
training steps, so that other programs affect both equally. The samples have the lengths that the plan assumes. Three
comparisons are printed:

wall: the plan with the median rates over the rounds, and the median duration of a step.
best: the plan with the best rates, and the shortest step.
cpu: the plan with the best rates and without the pipeline's bubble, and the median CPU time of a step. Other programs
    that use the same cores make a step longer, but hardly change its CPU time.

Goal: the median step (wall) is within the range that the plan prints. The exit code is 1 if the goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.plan_memory import CASES, _as_planned, _batch, _case
from trainer.run.launch import start_ranks

_RESULT = "PLAN_TIME_RESULT"
_ROUNDS = "PLAN_TIME_ROUNDS"
_STEPS_PER_ROUND = 1
_SECONDS_PER_SHAPE = 0.03
_PEAK_TFLOPS = 1.0
"""The peak rate relative to which measured rates are stored. It exceeds the rate of a CPU core, and cancels out."""
_RING_BYTES = 2**22


def work(case: str) -> int:
    """Run one rank, which alternately calibrates and trains, and writes its measurements as JSON."""
    import torch

    from bench.calibrate import calibrate
    from trainer.build_step import build_step
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import build_topology
    from trainer.plan.accelerator import KNOWN

    recipe, workload = _case(case)
    rank, _, device = connect(timeout_sec=600)
    groups = build_groups(build_topology(recipe.parallel, recipe.parallel.num_ranks), rank, device, recipe.seed)
    step = build_step(recipe, groups, recipe.data.tokenizer.train_vocab_size)
    step.router_noise = lambda _number, batch: _as_planned(recipe, batch)
    batch = _batch(recipe, workload, rank)
    for number in range(2):
        step(number, batch)
    rounds = []
    for k in range(int(os.environ[_ROUNDS])):
        torch.distributed.barrier()
        rates = calibrate(device, torch.float32, KNOWN["h100"], _PEAK_TFLOPS, _SECONDS_PER_SHAPE)
        link = _link(recipe.parallel.num_ranks)
        torch.distributed.barrier()
        reports, cpu_sec = [], []
        for i in range(_STEPS_PER_ROUND):
            before = time.process_time()
            reports.append(step(2 + k * _STEPS_PER_ROUND + i, batch))
            cpu_sec.append(time.process_time() - before)
        rounds.append(
            {
                "rates": dataclasses.asdict(rates),
                "link": link,
                "steps": [r.seconds for r in reports],
                "cpu": cpu_sec,
                "phases": [dict(r.phase_sec) for r in reports],
            }
        )
    Path(os.environ[_RESULT], f"{rank}.json").write_text(json.dumps(rounds))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def _link(world: int) -> tuple[float, float]:
    """Return the bytes per second that a rank sends in an all-reduce, and the seconds per hop.

    Both are 0 for one rank.
    """
    import torch

    if world == 1:
        return 0.0, 0.0

    def seconds(count: int, repeat: int) -> float:
        tensor = torch.ones(count)
        start = time.perf_counter()
        for _ in range(repeat):
            torch.distributed.all_reduce(tensor)
        return (time.perf_counter() - start) / repeat

    sent, hops = 2 * (world - 1) / world * _RING_BYTES, 2 * (world - 1)
    return sent / seconds(_RING_BYTES // 4, 3), seconds(1, 20) / hops


def accelerator_of(rounds: Sequence[dict[str, Any]], choose: Callable[[list[float]], float]) -> Any:
    """Return the accelerator with the rates that `choose` selects from the rates of all rounds and ranks."""
    from trainer.plan.accelerator import Accelerator

    def rate(key: str) -> float:
        return choose([r["rates"][key] for r in rounds])

    first, world_has_links = rounds[0]["rates"], rounds[0]["link"][0] > 0
    matrix = tuple(
        (first["matrix"][i][0], choose([r["rates"]["matrix"][i][1] for r in rounds]))
        for i in range(len(first["matrix"]))
    )
    links = {}
    if world_has_links:
        links = {
            "node_gb_s": choose([r["link"][0] for r in rounds]) / 1e9,
            "node_latency_us": -choose([-r["link"][1] for r in rounds]) * 1e6,
            "link_efficiency": 1.0,
        }
    return Accelerator(
        **{
            **first,
            "name": "cpu",
            "matrix": matrix,
            "attention_efficiency": rate("attention_efficiency"),
            "memory_tb_s": rate("memory_tb_s"),
            "kernel_us": -choose([-r["rates"]["kernel_us"] for r in rounds]),
            **links,
        }
    )


def compare(case: str, num_rounds: int) -> dict[str, Any]:
    """Run the ranks of a case, plan the case with the measured rates, and return the measured and the planned times."""
    from trainer.plan.planner import Planner

    recipe, workload = _case(case)
    world = recipe.parallel.num_ranks
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_RESULT], os.environ[_ROUNDS] = folder, str(num_rounds)
        code = start_ranks(world, [sys.executable, "-m", "bench.plan_time", case, "--rank"])
        if code:
            raise SystemExit(code)
        ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]
    every = [one for rank in ranks for one in rank]
    # The slowest rank determines the duration of a step.
    steps = [max(rank[k]["steps"][i] for rank in ranks) for k in range(num_rounds) for i in range(_STEPS_PER_ROUND)]
    cpu = [max(rank[k]["cpu"][i] for rank in ranks) for k in range(num_rounds) for i in range(_STEPS_PER_ROUND)]
    found: dict[str, Any] = {"case": case, "ranks": world, "steps": steps, "cpu": cpu, "load": os.getloadavg()[0]}
    for name, choose, measured in (
        ("wall", median, median(steps)),
        ("best", max, min(steps)),
        ("cpu", max, median(cpu)),
    ):
        device = accelerator_of(every, choose)
        plan = Planner(recipe, device, "cpu").plan(recipe, workload)
        # A rank that waits in the pipeline's bubble uses no CPU time.
        kept = 1 - (plan.time.parts["the pipeline's bubble"] / plan.time.total if name == "cpu" else 0.0)
        planned, low, high = (kept * seconds for seconds in (plan.time.total, *plan.seconds_range))
        found[name] = {
            "measured_sec": measured,
            "planned_sec": planned,
            "range_sec": [low, high],
            "ratio": planned / measured,
            "in_range": low <= measured <= high,
            "too_small": plan.too_small,
            "parts_sec": plan.time.parts,
            "kernel_us": device.kernel_us,
            "memory_gb_s": device.memory_tb_s * 1e3,
            "gflops": max(share for _, share in device.matrix) * _PEAK_TFLOPS * 1e3,
        }
    phases: dict[str, list[float]] = {}
    for one in ranks[0]:
        for step in one["phases"]:
            for phase, seconds in step.items():
                phases.setdefault(phase, []).append(seconds)
    found["phases_sec"] = {phase: median(seconds) for phase, seconds in phases.items()}
    return found


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", default=[], help=f"cases to measure, from {', '.join(CASES)} (default: all)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of calibrations, each followed by a step (default: 5)"
    )
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return work(options.cases[0])
    rows = []
    for case in options.cases or CASES:
        row = compare(case, options.rounds)
        rows.append(row)
        for name in ("wall", "best", "cpu"):
            one = row[name]
            low, high = one["range_sec"]
            print(
                f"{case} {name}: measured {one['measured_sec']:.3f} s, planned {one['planned_sec']:.3f} s "
                f"({low:.3f}–{high:.3f}), ratio {one['ratio']:.2f}, in range: {one['in_range']}; "
                f"{one['gflops']:.1f} GFLOP/s, {one['memory_gb_s']:.1f} GB/s, {one['kernel_us']:.1f} us per kernel",
                flush=True,
            )
        parts = ", ".join(f"{n} {s:.3f}" for n, s in row["wall"]["parts_sec"].items() if s > 0.0005)
        print(f"   planned: {parts}\n   measured: ", end="")
        print(", ".join(f"{n} {s:.3f}" for n, s in row["phases_sec"].items()), f"; load {row['load']:.1f}", flush=True)
    passed = all(row["wall"]["in_range"] for row in rows)
    print(json.dumps({"passed": passed, "rows": rows}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
