"""Tests that the audio side's transfers and saved memory per step do not grow with the number of encoder calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.batch import Batch
from tests.distributed.harness import run_ranks
from trainer import parity, parity_cases
from trainer.parallel.groups import build_groups, connect
from trainer.parallel.topology import Topology
from trainer.parity_cases import DS_CONFIG

MOST_COLLECTIVES, MOST_BYTES = 12, 1.1
MOVES_SAMPLES = ("send", "recv", "alltoall")


class Counter(TorchDispatchMode):
    """A mode that counts collectives on weights and gradients.

    These are the collectives on floating-point tensors, except for those that move samples. Plans exchange integers.
    The size of a collective in bytes is the size of its largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not any(word in func.__name__ for word in MOVES_SAMPLES):
            flat, _ = torch.utils._pytree.tree_flatten(args)
            sizes = [t.nbytes for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if sizes:
                self.names.append(func.__name__)
                self.bytes += max(sizes)
        return func(*args, **(kwargs or {}))


def measure(tp: int, ep: int, lora: bool, gathering: str) -> dict[str, Any]:
    """Return the audio side's collectives and encoder calls in the second of two steps, and its element counts."""
    rank, world, device = connect(timeout_sec=250)
    groups = build_groups(Topology(world, tp, 1, ep), rank, device, parity_cases.SEED)
    learned = parity_cases.ADAPTERS if lora else parity_cases.ALL_WEIGHTS
    model = parity_cases.tiny_model()
    step = parity.build_step(model, groups, DS_CONFIG, 2, batch_sec=0.5, learned=learned, gathering=gathering)  # type: ignore[arg-type]
    counter, num_calls = Counter(), 0

    def count_call(*unused: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    audio = step.audio
    for name in audio.tower.expert_names if ep == 1 else tuple(audio.tower.experts):
        audio.tower.encoder(name).register_forward_hook(count_call)
    for name in ("forward", "backward", "step"):
        plain = getattr(audio, name)

        def counted(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            with counter:
                return plain(*args, **kwargs)

        setattr(audio, name, counted)
    samples = Batch(tuple(parity_cases.make_samples("mixed", world, model.adapter.rate)[rank]))
    for number in range(2):
        counter.names, counter.bytes, num_calls = [], 0, 0
        step(number, samples)
    parameters = [p for _, p in audio.named_parameters()]
    trained = [p for p in parameters if p.requires_grad]
    elements = {"all": sum(p.ds_numel for p in parameters), "trained": sum(p.ds_numel for p in trained)}  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()
    return {"names": counter.names, "bytes": counter.bytes, "calls": num_calls, **elements}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "tp", "ep", "lora"), [(2, 1, 1, False), (4, 1, 4, False), (2, 2, 2, True)])
def test_weights_are_gathered_and_gradients_reduced_once_per_update(world: int, tp: int, ep: int, lora: bool) -> None:
    ranks = run_ranks(world, measure, {"tp": tp, "ep": ep, "lora": lora, "gathering": "per_update"}, timeout_sec=280)
    assert max(r["calls"] for r in ranks) > 3, ranks
    for rank in ranks:
        # Trained weights are gathered and their gradients reduced once, in fp32. Frozen weights, such as Whisper's
        # positions, stay whole after the first step.
        once = 4 * rank["trained"] * 2
        assert rank["trained"] < rank["all"]
        assert len(rank["names"]) <= MOST_COLLECTIVES and once <= rank["bytes"] <= MOST_BYTES * once, rank


@pytest.mark.timeout(300)
def test_weights_that_are_gathered_per_module_take_many_collectives() -> None:
    # With expert parallelism, DeepSpeed gathers no weights ahead of time.
    ranks = run_ranks(2, measure, {"tp": 1, "ep": 2, "lora": False, "gathering": "per_module"}, timeout_sec=280)
    for rank in ranks:
        assert len(rank["names"]) > MOST_COLLECTIVES and rank["bytes"] > MOST_BYTES * 4 * rank["trained"] * 2, rank


def saved_bytes(recompute_calls: bool) -> dict[str, int]:
    """Return the bytes that encoder calls save for the backward pass, the bytes of their clips, and their number."""
    rank, world, device = connect(timeout_sec=250)
    groups = build_groups(Topology(world, 1, 1), rank, device, parity_cases.SEED)
    model = parity_cases.tiny_model()
    step = parity.build_step(model, groups, DS_CONFIG, 2, batch_sec=0.5, recompute_calls=recompute_calls)
    found = {"saved": 0, "clips": 0, "calls": 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found["saved"] += tensor.nbytes
        return tensor

    for dispatch in step.audio._dispatch.values():
        plain = dispatch._call

        def call(encoder: Any, clips: Any, plain: Any = plain) -> Any:
            found["clips"] += clips.values.nbytes
            found["calls"] += 1
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return plain(encoder, clips)

        dispatch._call = call  # type: ignore[method-assign]
    samples = Batch(tuple(parity_cases.make_samples("mixed", world, model.adapter.rate)[rank]))
    step.audio.forward(samples.clips, samples.prompts, None)
    dist.destroy_process_group()
    return found


@pytest.mark.timeout(300)
def test_calls_that_run_again_keep_their_clips_only() -> None:
    ((again,), (once,)) = (run_ranks(1, saved_bytes, {"recompute_calls": r}, timeout_sec=280) for r in (True, False))
    assert again["calls"] > 3 and again["clips"] == once["clips"]
    assert again["saved"] == again["clips"] + 4 * again["calls"]  # one more number per call carries the gradient
    assert once["saved"] > 5 * again["saved"]


def sums_of_small_gradients(copies: bool) -> dict[str, list[float]]:
    """Give bf16 weights [5] and [1, 2] two gradients on each rank, and return this rank's slices of the sums.

    Args:
        copies: Whether every rank holds copies of the weights, instead of slices.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from trainer.engine.whole_weights import Bucket

    rank, world, device = connect(timeout_sec=250)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    group = alone if copies else dist.group.WORLD
    sharers, index = dist.get_world_size(group), dist.get_rank(group)
    parameters, places = [], []
    for values in ([1.0, 2.0, 3.0, 4.0, 5.0], [[6.0, 7.0]]):
        whole = torch.tensor(values, dtype=torch.bfloat16)
        k = -(-whole.numel() // sharers)
        padded = torch.cat([whole.flatten(), torch.zeros(k * sharers - whole.numel(), dtype=torch.bfloat16)])
        parameter: Any = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        parameter.ds_process_group, parameter.ds_shape, parameter.ds_numel = group, whole.shape, whole.numel()
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        parameter.ds_tensor = padded[k * index : k * (index + 1)].clone()
        parameter.ds_tensor.ds_numel = k
        parameters.append(parameter)
        places.append(torch.zeros(k))
    bucket = Bucket(parameters, places, device, dist.group.WORLD if copies else None)
    found = {}
    for step in range(2):
        bucket.gather()
        bucket.begin_backward()
        # A sum in bf16 would lose the second gradient.
        for scale in (1.0, 2.0**-9):
            sum((scale * p * p).sum() for p in parameters).backward()
        bucket.reduce()
        assert all(p.grad is None for p in parameters)
        bucket.release(are_stale=step == 0)
        found = {str(i): place.tolist() for i, place in enumerate(places)}
    dist.destroy_process_group()
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("copies", [False, True])
def test_gradients_of_bf16_weights_are_summed_in_fp32(copies: bool) -> None:
    ranks = run_ranks(2, sums_of_small_gradients, {"copies": copies}, timeout_sec=280)
    expected = {"0": [2.0, 4.0, 6.0, 8.0, 10.0], "1": [12.0, 14.0]}
    for name, gradient in expected.items():
        slices = [ranks[0][name], ranks[1][name]]
        assert not copies or slices[0] == slices[1]
        found = slices[0] if copies else slices[0] + slices[1]
        assert found[: len(gradient)] == [2 * g * (1 + 2.0**-9) for g in gradient]
        assert not any(found[len(gradient) :])
