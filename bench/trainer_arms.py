"""The variants (arms) of `bench.trainer`. Each arm runs in one process per rank."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.engine.imports import lean_imports

with lean_imports():
    import deepspeed
    import torch
    import torch.distributed as dist

    from bench.trainer_work import DS_CONFIG, OPTIM, Setting, Sizes, Stopwatch, draw_samples, model_config
    from model.batch import Batch, Sample
    from trainer import parity, parity_cases
    from trainer.engine.ds_config import build_ds_config
    from trainer.parallel.groups import build_groups, connect
    from trainer.parallel.topology import Topology


def run_earshot(setting: Setting, sizes: Sizes, rank: int, world: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """Train with earshot's step, and return the measurements of `Stopwatch` and the losses of all updates.

    Collective: every rank of the world must call it.
    """
    groups = build_groups(
        Topology(world, setting.tensor, 1, setting.expert), rank, torch.device("cpu"), parity_cases.SEED
    )
    step = parity.build_step(
        model_config(sizes),
        groups,
        build_ds_config(DS_CONFIG, precision="fp32"),
        num_steps=1 + sizes.updates,
        batch_sec=480,
        pack_tokens=setting.pack_tokens,
        learned=parity_cases.Learned(OPTIM),
        recompute_calls=setting.recompute_calls,
    )
    watch, losses, size = Stopwatch(), [], sizes.global_batch
    for number, start in enumerate(range(0, len(samples), size)):
        if number == 1:
            watch.start()
        losses.append(step(number, Batch(tuple(samples[start + rank : start + size : world]))).loss)
    return watch.stop() | {"losses": losses}


def measure(setting: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Run one rank of an arm, and return its measurements.

    Collective: every rank of the world must call it.

    Args:
        setting: The fields of `Setting`.
        sizes: The fields of `Sizes` that differ from the defaults.
    """
    chosen, work = Setting(**setting), Sizes(**sizes)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Otherwise, DeepSpeed would compile a C++ extension at startup that only CPU inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world, _ = connect(timeout_sec=600)
    run = run_earshot
    if chosen.kind != "earshot":
        from bench.trainer_peer import run_peer as run
    found = run(chosen, work, rank, world, draw_samples(work))
    dist.barrier()
    dist.destroy_process_group()
    return found


def main() -> int:
    """Run one rank of an arm. The command's argument is JSON, and rank 0 writes the measurements to the file `out`."""
    import os

    job = json.loads(sys.argv[1])
    found = measure(job["setting"], job["sizes"])
    if os.environ["RANK"] == "0":
        Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
