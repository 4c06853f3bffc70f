"""Tests that SmolLM2's published weights give the same logits as transformers, also on several ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.config import LLMConfig
from model.llm.reference import build_reference
from tests.distributed.harness import run_ranks

TEXTS = ("The capital of France is", "One, two, three, four, five, six,", "She had your dark suit in greasy wash water")
TOLERANCE = 1e-5
"""The largest difference, relative to the largest logit. At most 2.3e-6 has been measured."""
LAYOUTS = {2: [{"pp": 2}], 3: [{"pp": 3}, {"tp": 3}]}
"""The tested layouts, by the number of ranks. SmolLM2 has 30 layers and 3 key-value heads."""

Published = Callable[[str], Path]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(published: Published) -> Path:
    return published("smollm2-135m")


@pytest.fixture(scope="module")
def segments(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def wanted(folder: Path, segments: list[list[int]]) -> torch.Tensor:
    """Return the logits of transformers, [Σ tokens, vocabulary]."""
    return logits_alone(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), segments)


@torch.no_grad()
def logits_alone(model: Any, segments: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in segments])


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_the_converted_model_knows_what_it_learned(
    folder: Path, segments: list[list[int]], wanted: torch.Tensor
) -> None:
    ends = torch.tensor([len(ids) for ids in segments]).cumsum(0) - 1
    tokens = wanted[ends[:2]].argmax(-1).tolist()
    assert [AutoTokenizer.from_pretrained(folder).decode([token]) for token in tokens] == [" Paris", " seven"]


def test_the_oracle_computes_the_same_logits(folder: Path, segments: list[list[int]], wanted: torch.Tensor) -> None:
    oracle = build_reference(LLMConfig(weights=str(folder))).eval()
    assert difference(logits_alone(oracle, segments), wanted) <= TOLERANCE


@pytest.mark.parametrize("world", [2, 3])
def test_every_layout_computes_the_same_logits(
    world: int, folder: Path, segments: list[list[int]], wanted: torch.Tensor, tmp_path: Path
) -> None:
    kwargs = {"folder": str(folder), "segments": segments, "out": str(tmp_path)}
    run_ranks(world, "tests.real_weights.test_llm:write_logits", kwargs, timeout_sec=200)
    for i, layout in enumerate(LAYOUTS[world]):
        found = difference(torch.load(tmp_path / f"{i}.pt"), wanted)
        print(f"{layout}: {found:.2e}")
        assert found <= TOLERANCE, layout


def write_logits(folder: str, segments: list[list[int]], out: str) -> None:
    """Compute one pack in every layout for this number of ranks. The last rank writes the logits."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from trainer.parallel.cpu import megatron_calls

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for i, layout in enumerate(LAYOUTS[world]):
        with megatron_calls():
            parallel_state.initialize_model_parallel(layout.get("tp", 1), layout.get("pp", 1))
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            logits = _pack_logits(folder, segments, **layout)
            parallel_state.destroy_model_parallel()
        if rank == world - 1:
            assert logits is not None
            torch.save(logits, f"{out}/{i}.pt")
    dist.destroy_process_group()


@torch.no_grad()
def _pack_logits(folder: str, segments: list[list[int]], tp: int = 1, pp: int = 1) -> torch.Tensor | None:
    """Compute all segments in one pack, and return their logits on the last stage, or None on other stages."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from model.llm.megatron import build_megatron, embed_tokens
    from model.llm.packing import PackedSequences
    from model.llm.reference import resolve_hf_config, weight_source
    from model.llm.weights import load_megatron

    config = LLMConfig(weights=folder)
    hf_config = resolve_hf_config(config)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    gpt = build_megatron(hf_config, tp_size=tp, pp_size=pp, first_stage=first, last_stage=last)[0].eval()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    load_megatron([gpt], weight_source(config, hf_config, None), hf_config, tp_rank=tp_rank, tp_size=tp)
    num_tokens = sum(map(len, segments))
    num_padding = -num_tokens % tp
    ids = torch.tensor([*(token for one in segments for token in one), *[0] * num_padding])
    pack = PackedSequences(lengths=(*map(len, segments), *([num_padding] if num_padding else [])))

    def step(microbatches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        next(microbatches)
        output = model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embed_tokens(gpt, ids) if first else None,
            packed_seq_params=pack,
        )
        return output, lambda logits, non_loss_data: gather_from_tensor_model_parallel_region(logits[0])

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([0]),
        model=[gpt],
        num_microbatches=1,
        seq_length=pack.num_tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0][:num_tokens, : hf_config.vocab_size] if last else None
