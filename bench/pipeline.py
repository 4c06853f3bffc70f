"""Measure the speedup of running encoders on the ranks of all pipeline stages instead of only on the first stage.

    python -m bench.pipeline

Two real ranks (gloo) train the model of `bench.trainer` with two equal stages of its LLM (`parallel.pipeline: 2`). Two
variants (*arms*) take turns in the same processes and compute the same loss:

- spread (as in training): before the LLM's pipeline begins, all ranks encode clips, with equal shares of the work.
  After the pipeline has ended, they run the encoder backward passes.
- first stage: the ranks of the first stage encode all clips, as is usual with Megatron.

Goals: `spread` is at least 1.3 times as fast as `first stage`, and the losses agree to within 1e-5. If there are fewer
idle cores than ranks, the CPU time of the busiest rank is compared instead of the wall time. It is a lower bound on the
wall time with enough cores. The exit code is 1 if a goal is missed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.trainer import idle_cores
from trainer.run.launch import start_ranks

if TYPE_CHECKING:  # At run time, only the ranks import these modules.
    from bench.trainer_work import Sizes
    from model.batch import Batch
    from trainer.training.step import Step

SPEED_GOAL, LOSS_LIMIT = 1.3, 1e-5
ROUNDS, RANKS = 5, 2
PACK_TOKENS = 160
"""The maximum number of tokens in a micro-batch. This limit results in seven micro-batches per step."""
LLM_LAYERS = 8
"""The number of LLM layers. Each stage holds half of them."""
SPREAD, FIRST_STAGE = "spread", "first stage"
TIMES = ("step_sec", "busiest_rank_cpu_sec")

Record = dict[str, Any]


@contextmanager
def encoders_on_first_stage() -> Iterator[None]:
    """Make the dispatch plan send every clip to rank 0, which holds the first stage."""
    from trainer.engine import expert_parallel

    planner = expert_parallel.plan_dispatch

    def on_first_stage(*args: Any) -> Any:
        plan = planner(*args)
        return replace(plan, encoder_rank=np.zeros_like(plan.encoder_rank))

    expert_parallel.plan_dispatch = on_first_stage
    try:
        yield
    finally:
        expert_parallel.plan_dispatch = planner


def build(sizes: Sizes, pack_tokens: int) -> Step:
    """Return a training step for the model of `bench.trainer`, with one pipeline stage per rank and no recomputation.

    Collective: every rank of the world must call it.
    """
    from bench.trainer_work import DS_CONFIG, OPTIM, model_config
    from trainer import parity, parity_cases
    from trainer.engine.ds_config import build_ds_config
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology

    rank, world, device = connect(timeout_sec=600)
    step = parity.build_step(
        model_config(sizes),
        build_groups(Topology(world, 1, world), rank, device, parity_cases.SEED),
        build_ds_config(DS_CONFIG, precision="fp32"),
        num_steps=1,
        batch_sec=480,
        pack_tokens=pack_tokens,
        learned=parity_cases.Learned(OPTIM),
        mode=parity.Mode(recompute="none"),
    )
    step.audio.tower.set_recompute(False)
    return step


def timed(step: Step, batch: Batch) -> dict[str, Any]:
    """Compute the gradients of a batch, discard them, and return the measurements.

    Collective: every rank of the world must call it.

    Returns:
        The loss (`loss`), the maxima over ranks of the wall time and the CPU time (`times`), the seconds that this rank
        spent in each phase of the step (`phases`), and the seconds that each rank spent in encoder forward passes
        (`encoder_sec`).
    """
    import torch
    import torch.distributed as dist

    dist.barrier()
    start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
    report = step.forward_backward(0, batch)
    spent = torch.tensor([time.perf_counter() - start_sec, time.process_time() - start_cpu_sec])
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    step.audio.discard()
    encoder_sec = torch.zeros(dist.get_world_size())
    encoder_sec[dist.get_rank()] = sum(cost.compute_sec for cost in step.audio.take_costs().values())
    dist.all_reduce(encoder_sec)
    phases = step.timer.take()
    return {"loss": report.loss, "times": spent.tolist(), "phases": phases, "encoder_sec": encoder_sec.tolist()}


def measure(sizes: Mapping[str, int], rounds: int, pack_tokens: int = PACK_TOKENS) -> dict[str, list[Record]]:
    """Measure both arms on this rank, and return the records of each (see `timed`). The first record is a warm-up.

    Collective: every rank of the world must call it.

    Args:
        sizes: The fields of `bench.trainer_work.Sizes` that differ from the defaults.
        rounds: The number of steps of each arm after the warm-up.
        pack_tokens: The maximum number of tokens in a micro-batch.
    """
    from trainer.engine.imports import lean_imports

    with lean_imports():
        import deepspeed
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    import torch.distributed as dist

    from bench.trainer_work import Sizes, draw_samples
    from model.batch import Batch

    # Otherwise, DeepSpeed would compile a C++ extension at startup that only CPU inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    work = Sizes(**{"llm_layers": LLM_LAYERS, **sizes})
    step = build(work, pack_tokens)
    rank, world, samples = dist.get_rank(), dist.get_world_size(), draw_samples(work)[: work.global_batch]
    found: dict[str, list[Record]] = {SPREAD: [], FIRST_STAGE: []}
    for number in range(1 + rounds):
        for arm in list(found)[:: -1 if number % 2 else 1]:
            if arm == SPREAD:
                found[arm].append(timed(step, Batch(tuple(samples[rank::world]))))
            else:
                with encoders_on_first_stage():
                    found[arm].append(timed(step, Batch(tuple(samples if rank == 0 else ()))))
    dist.barrier()
    dist.destroy_process_group()
    return found


def compare(found: Mapping[str, Sequence[Record]], cores: int) -> dict[str, Any]:
    """Print a table, and return the result as a JSON-compatible tree.

    Args:
        found: The result of `measure`.
        cores: The number of idle cores.
    """
    rows: dict[str, Any] = {}
    timed_of = {arm: records[1:] for arm, records in found.items()}
    print(f"{RANKS} pipeline stages, {cores} idle cores: medians of {len(timed_of[SPREAD])} steps (range)")
    for arm, records in timed_of.items():
        rows[arm] = {}
        for i, what in enumerate(TIMES):
            column = [r["times"][i] for r in records]
            rows[arm][what] = statistics.median(column)
            text = f"{rows[arm][what]:.2f} ({min(column):.2f}–{max(column):.2f})"
            print(f"  {arm:12} {what.replace('_', ' '):22} {text}")
        rows[arm]["phases_sec"] = {n: statistics.median(r["phases"][n] for r in records) for n in records[0]["phases"]}
        print("  " + ", ".join(f"{name} {sec:.2f}" for name, sec in rows[arm]["phases_sec"].items()))
    pairs = list(zip(timed_of[SPREAD], timed_of[FIRST_STAGE], strict=True))
    ratios = {what: [b["times"][i] / a["times"][i] for a, b in pairs] for i, what in enumerate(TIMES)}
    deciding = TIMES[0 if cores >= RANKS else 1]
    speed = statistics.median(ratios[deciding])
    difference = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in pairs)
    return {
        "passed": speed >= SPEED_GOAL and difference <= LOSS_LIMIT,
        "speed": speed,
        "decided_by": deciding,
        "ratios": ratios,
        "loss_difference": difference,
        "arms": rows,
    }


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goals are met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps of each arm (default: {ROUNDS})")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to check the benchmark itself")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job = json.loads(options.worker)
        found = measure(job["sizes"], job["rounds"])
        if os.environ["RANK"] == "0":
            Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    sizes: dict[str, int] = {}
    if options.tiny:
        from bench.trainer_work import TINY

        sizes = asdict(TINY)
    cores = idle_cores()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        job_text = json.dumps({"sizes": sizes, "rounds": options.rounds, "out": str(out)})
        if code := start_ranks(RANKS, [sys.executable, "-m", "bench.pipeline", "--worker", job_text]):
            raise SystemExit(code)
        result = compare(json.loads(out.read_text(encoding="utf-8")), cores)
    print(
        f"{SPREAD} is {result['speed']:.2f} times as fast as {FIRST_STAGE}, measured by {result['decided_by']}; goals "
        f"(at least {SPEED_GOAL} times as fast, losses agree to within {LOSS_LIMIT}): "
        + ("both met" if result["passed"] else "MISSED")
    )
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
