"""Tests that the planned bytes of weights, gradients and optimizer states equal those of ranks on seven topologies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from trainer.parallel.topology import Topology

DS_CONFIG = Path(__file__).parent.parent.parent / "ds_configs" / "zero3.json"

# The cases by the number of ranks. Each has (tp, pp, ep, vp, cp), the LLM family, its number of layers, the precisions
# of weights and of gradients, the pattern of frozen parts, and the number of ranks that share the audio side.
CASES: dict[int, list[tuple[tuple[int, int, int, int, int], str, int, str, str, str, int | None]]] = {
    2: [((2, 1, 1, 1, 1), "llama", 4, "bf16", "bf16", "", 1), ((1, 2, 2, 2, 1), "qwen2", 7, "fp32", "fp32", "", None)],
    4: [
        ((1, 1, 2, 1, 1), "llama", 4, "bf16", "fp32", "audio.primary.*", 2),
        ((2, 2, 1, 1, 1), "qwen3", 5, "fp32", "fp32", "llm.*norm*", None),
        ((1, 2, 4, 2, 1), "qwen2", 6, "bf16", "bf16", "", None),
        ((2, 1, 2, 1, 1), "mistral", 4, "fp32", "fp32", "llm.*", None),
        ((1, 1, 1, 1, 2), "llama", 4, "bf16", "fp32", "llm.*norm*", None),
    ],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", sorted(CASES))
def test_model_states_are_exact(world: int) -> None:
    measured = run_ranks(world, "tests.distributed.test_plan_states:held", timeout_sec=400)
    for i, case in enumerate(CASES[world]):
        expected = planned(world, *case)
        found = [ranks[i] for ranks in measured]
        assert [f[:3] for f in found] == [e[:3] for e in expected], case
        # The plan of a snapshot is approximate: one of the ranks that hold a weight saves it, and sizes are rounded up.
        assert all(0.6 * e[3] <= f[3] <= e[3] + 4096 for f, e in zip(found, expected, strict=True)), (
            case,
            found,
            expected,
        )
        assert len({tuple(e) for e in expected}) > 1 or case[0][1] == 1  # pipeline stages differ


def reduction(gradients: str) -> Any:
    """Return a gradient reduction that overlaps, with buckets so small that the first stage has several."""
    import torch

    from trainer.engine.llm_optimizer import Reduction

    dtype = torch.bfloat16 if gradients == "bf16" else torch.float32
    return Reduction(True, True, dtype, bucket_elements=4000)


def planned(
    world: int,
    split: tuple[int, int, int, int, int],
    family: str,
    layers: int,
    precision: str,
    gradients: str,
    frozen: str,
    shard: int | None,
) -> list[list[int]]:
    """Return the planned bytes [weights, gradients, optimizer, snapshot] of every rank."""
    from model.llm.reference import resolve_hf_config
    from trainer.parity_cases import tiny_model
    from trainer.plan.ranks import rank_states
    from trainer.plan.sizes import SizedModel

    config = tiny_model(family, num_layers=layers)
    model = SizedModel(config, resolve_hf_config(config.llm), vocab_size=61)
    topology = Topology(world, *split[:3], vp=split[3], cp=split[4], shard=shard)
    ds_json = json.loads(DS_CONFIG.read_text())
    states = rank_states(model, topology, optim(frozen), precision, ds_json, reduction(gradients))
    found = (states.of_rank(rank) for rank in range(world))
    return [[s.weights, s.gradients, s.optimizer, s.snapshot] for s in found]


def optim(frozen: str) -> Any:
    from trainer.engine.optim import OptimConfig, PartConfig

    return OptimConfig(parts=(PartConfig(pattern="llm.*", lr=1e-5), PartConfig(frozen or "none", frozen=True)))


def held() -> list[list[int]]:
    """Return this rank's measured bytes [weights, gradients, optimizer, snapshot] after one step of each case."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups as deepspeed_groups
    from megatron.core import parallel_state

    from model.audio_tower import AudioTower
    from model.batch import Batch
    from model.llm.reference import resolve_hf_config
    from model.llm.weights import RandomSource
    from trainer.checkpoint import audio_state, llm_state
    from trainer.engine.ds_config import build_ds_config
    from trainer.engine.encoders import AudioEngine
    from trainer.engine.llm import LLMEngine
    from trainer.engine.placement import place
    from trainer.parallel.groups import build_groups, connect
    from trainer.parity_cases import VOCAB_SIZE, make_samples, tiny_model
    from trainer.plan.measure import held_states
    from trainer.training.step import Step

    rank, world, device = connect(timeout_sec=120)
    results = []
    for split, family, layers, precision, gradients, frozen, shard in CASES[world]:
        config, dtype = tiny_model(family, num_layers=layers), torch.bfloat16 if precision == "bf16" else torch.float32
        hf_config = resolve_hf_config(config.llm)
        topology = Topology(world, *split[:3], vp=split[3], cp=split[4], shard=shard)
        groups = build_groups(topology, rank, device, seed=1)
        source = RandomSource(hf_config, 1)
        llm = LLMEngine(hf_config, source, optim(frozen), groups, dtype, reduction=reduction(gradients))
        held = place(config, groups.topology.ep).held_by(rank)
        tower = AudioTower(config, hf_config.hidden_size, VOCAB_SIZE, held).train()
        audio = AudioEngine(tower, optim(frozen), build_ds_config(DS_CONFIG, precision=precision), groups, 1.5)  # type: ignore[arg-type]
        step = Step(config, optim(frozen), audio, llm, groups, num_steps=1, tokens_per_microbatch=48, seed=1)
        step(0, Batch(tuple(make_samples("mixed", world, config.adapter.rate)[rank])))
        states = held_states(audio, llm)
        copied = [s for s in (*audio_state.shards(audio), *llm_state.shards(llm)) if s.saved_here]
        snapshot = sum(v.numel() * v.element_size() for s in copied for v in s.values.values())
        results.append([states.weights, states.gradients, states.optimizer, snapshot])
        audio.engine.destroy()
        parallel_state.destroy_model_parallel()
        deepspeed_groups._get_expert_data_parallel_group_dict().clear()
        deepspeed_groups._get_expert_parallel_group_dict().clear()
    dist.destroy_process_group()
    return results
