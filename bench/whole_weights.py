"""Measure the CPU time in which one rank gathers the audio modules' weights and reduces their gradients.

    python -m bench.whole_weights [RECIPE] [--ranks N]

On a GPU machine, this is the time that Python spends launching copies and collectives. During this time, a fast GPU is
idle. The rank belongs to a fake process group of N ranks (default: 1008). The audio modules of RECIPE (default:
mowe_70b) are on the meta device, so nothing is computed or sent. A step consists of gathering weights,
accumulating one gradient per parameter, reducing gradients and releasing weights (`trainer.engine.whole_weights`). For
comparison, the same gradients are passed in buckets of 50 million elements to `reduce_scatter_coalesced`, the function
with which DeepSpeed's ZeRO-3 reduces gradients.

Goal: at most 20 ms per step. The exit code is 1 if the goal is missed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.engine.imports import lean_imports

with lean_imports():
    import deepspeed
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from trainer.config.load import load_recipe
from trainer.engine.placement import place
from trainer.engine.whole_weights import Bucket, buckets
from trainer.plan.fake_ranks import META
from trainer.plan.sizes import sized_model

GOAL_MS = 20.0
ROUNDS = 7
DEEPSPEED_BUCKET_ELEMENTS = 50_000_000


def parameters_of(recipe_name: str, world: int) -> list[Any]:
    """Return rank 0's parameters on the meta device, with the `ds_*` attributes that ZeRO-3 adds to its parameters."""
    recipe = load_recipe(recipe_name)
    model, ep = sized_model(recipe), recipe.parallel.expert
    tower = model.tower(place(model.config, ep).held_by(0)).to(torch.bfloat16)
    replicas = dist.new_group(list(range(0, world, ep)))
    found: list[Any] = []
    for name, parameter in tower.named_parameters():
        zero: Any = parameter
        zero.ds_process_group = replicas if name.startswith("experts.") else dist.group.WORLD
        zero.ds_shape, zero.ds_numel = parameter.shape, parameter.numel()
        zero.ds_status = ZeroParamStatus.NOT_AVAILABLE
        ranks = dist.get_world_size(zero.ds_process_group)
        zero.ds_tensor = torch.empty(-(-parameter.numel() // ranks), dtype=torch.bfloat16, device=META)
        zero.ds_tensor.ds_numel = len(zero.ds_tensor)
        found.append(parameter)
    return found


def our_step(parts: list[Bucket], frozen: list[Bucket], gradients: dict[int, torch.Tensor]) -> dict[str, float]:
    """Return the CPU milliseconds of each phase of a step. Frozen weights are only gathered in the first step."""
    spent = {}

    def phase(name: str, work: Callable[[], None]) -> None:
        begin = time.process_time()
        work()
        spent[name] = 1e3 * (time.process_time() - begin)

    def gather() -> None:
        for part in (*parts, *frozen):
            part.gather()

    def begin() -> None:
        for part in parts:
            part.begin_backward()

    def add() -> None:
        trained = [p for part in parts for p in part.parameters]
        torch.autograd.backward(trained, [gradients[id(p)] for p in trained])

    def reduce() -> None:
        for part in parts:
            part.reduce()

    def release() -> None:
        for part in parts:
            part.release(are_stale=True)
        for part in frozen:
            part.release(are_stale=False)

    phase("gather", gather)
    phase("begin backward", begin)
    phase("add gradients", add)
    phase("reduce", reduce)
    phase("release", release)
    return spent


def deepspeed_ms(parameters: list[Any], gradients: dict[int, torch.Tensor]) -> float:
    """Return the CPU milliseconds in which DeepSpeed reduces all gradients once."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see trainer/engine/encoders.py
    deepspeed.init_distributed(dist_init_required=False)
    begin = time.process_time()
    for group, members in _deepspeed_buckets(parameters):
        reduce_scatter_coalesced([gradients[id(p)].float() for p in members], group)
    return 1e3 * (time.process_time() - begin)


def _deepspeed_buckets(parameters: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    for group in {id(p.ds_process_group): p.ds_process_group for p in parameters}.values():
        bucket: list[Any] = []
        for parameter in (p for p in parameters if p.ds_process_group is group):
            if bucket and sum(p.ds_numel for p in bucket) + parameter.ds_numel > DEEPSPEED_BUCKET_ELEMENTS:
                yield group, bucket
                bucket = []
            bucket.append(parameter)
        yield group, bucket


def main() -> int:
    """Run the benchmark, and return the exit code: 0 if the goal is met, else 1."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mowe_70b", metavar="RECIPE")
    parser.add_argument("--ranks", type=int, default=1008, metavar="N", help="number of ranks (default: 1008)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=options.ranks, store=FakeStore())
    parameters: list[nn.Parameter] = parameters_of(options.recipe, options.ranks)
    gradients = {id(p): torch.empty_like(p) for p in parameters}
    trained = [p for p in parameters if p.requires_grad]
    theirs = deepspeed_ms(trained, gradients)
    parts = [Bucket(b, [torch.empty(len(p.ds_tensor), device=META) for p in b], META) for b in buckets(trained)]
    frozen = [Bucket(b, [], META) for b in buckets([p for p in parameters if not p.requires_grad])]
    rounds = [our_step(parts, frozen, gradients) for _ in range(ROUNDS)]
    best = min(rounds, key=lambda spent: sum(spent.values()))
    total = sum(best.values())
    elements = sum(g.numel() for g in gradients.values())
    size = f"{len(parameters)} parameters, {elements / 1e6:.0f} M elements"
    print(f"{options.recipe}, one of {options.ranks} ranks: {size}")
    print(f"{2 * len(parts)} collectives per step; CPU time of the fastest of {ROUNDS} steps:")
    for name, milliseconds in best.items():
        print(f"  {name:14s} {milliseconds:7.2f} ms")
    print(f"  {'total':14s} {total:7.2f} ms (goal: at most {GOAL_MS:g} ms)")
    print(f"DeepSpeed's reduction alone: {theirs:.0f} ms")
    passed = total <= GOAL_MS
    found = {"ranks": options.ranks, "collectives": 2 * len(parts), "ms": best, "deepspeed_reduce_ms": theirs}
    print(json.dumps({"passed": passed, **found}))
    dist.destroy_process_group()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
