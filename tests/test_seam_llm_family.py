"""Tests of training and export with the LLM family Seed-OSS (ByteDance), which one value in a plug-in adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.config import LLMConfig, ModelConfig
from model.errors import UserError
from model.llm.families import LLAMA_MODULES, LLM_FAMILIES, REQUIRED, LLMFamily
from model.llm.names import global_to_hf, hf_shapes, hf_to_local
from model.llm.reference import build_reference, resolve_hf_config
from tests.distributed.harness import run_ranks
from tests.tools.exportable import write_manifest, write_run
from tools import export
from trainer.parallel.topology import Topology
from trainer.parity_cases import tiny_model

ALWAYS = {"attention_bias": True, "attention_out_bias": False, "residual_dropout": 0}
SEED_OSS = LLMFamily(qkv_bias=True, required={**REQUIRED, **ALWAYS})


def register() -> None:
    """Add the family to the table, as a plug-in would with one line."""
    LLM_FAMILIES["seed_oss"] = SEED_OSS


@pytest.fixture
def plugin() -> Iterator[None]:
    register()
    yield
    del LLM_FAMILIES["seed_oss"]


def model_with_seed() -> ModelConfig:
    """Return the tiny model with a Seed-OSS LLM whose heads are wider than hidden_size / num_attention_heads."""
    model = tiny_model()
    config = {**model.llm.config, **ALWAYS, "model_type": "seed_oss", "attention_dropout": 0, "head_dim": 12}
    return replace(model, llm=LLMConfig(config=config))


def test_without_the_line_it_is_unknown() -> None:
    with pytest.raises(UserError, match="model_type = seed_oss: supported families are llama, mistral, qwen2, qwen3"):
        resolve_hf_config(model_with_seed().llm)


def test_a_family_that_does_not_describe_its_model_is_a_one_line_error(plugin: None) -> None:
    LLM_FAMILIES["seed_oss"] = LLMFamily(required=SEED_OSS.required)
    with pytest.raises(UserError, match=r"its LLMFamily does not describe .*layers.0.self_attn.k_proj.bias is missing"):
        build_reference(model_with_seed().llm, seed=1)


def test_what_the_family_does_not_compute_is_refused(plugin: None) -> None:
    config = {**model_with_seed().llm.config, "residual_dropout": 0.1}
    with pytest.raises(UserError, match="model.llm.config.residual_dropout = 0.1: only 0 is supported"):
        resolve_hf_config(LLMConfig(config=config))


def test_the_reference_trains_the_token_of_the_padding_too(plugin: None) -> None:
    """Check the gradient of the embedding of token 1, with which Seed-OSS pads. transformers would not train it."""
    reference = build_reference(model_with_seed().llm, seed=1)
    assert reference.config.pad_token_id == 1
    reference(torch.tensor([[1, 2]])).logits.sum().backward()
    assert reference.get_input_embeddings().weight.grad[1].abs().sum() > 0


def test_its_modules_may_have_other_names(plugin: None) -> None:
    names = {"layer": "transformer.h.{n}", "attention_output": "attention.dense", "embedding": "transformer.wte"}
    LLM_FAMILIES["seed_oss"] = replace(SEED_OSS, modules={**LLAMA_MODULES, **names})
    hf_config = resolve_hf_config(model_with_seed().llm)
    shapes = hf_shapes(hf_config)
    assert "transformer.h.3.attention.dense.weight" in shapes and "transformer.wte.weight" in shapes
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in ("decoder.layers.3.self_attention.linear_proj.weight", "embedding.word_embeddings.weight"):
        shards = [hf_to_local(name, lambda n, index: tensors[n][index], hf_config, rank, 2) for rank in range(2)]
        full = torch.cat(shards, dim=1 if "linear_proj" in name else 0)
        ((hf_name, tensor),) = global_to_hf(name, full, hf_config, 2).items()
        assert hf_name in shapes and tensor.equal(tensors[hf_name])


def train(tp: int, pp: int) -> list[list[float]]:
    """Compare this rank's training with the single-process model.

    Returns:
        The relative differences [loss, gradient] for a batch, and [loss, gradient norm] of a few training steps.
    """
    from trainer import parity, parity_cases
    from trainer.parallel.groups import build_groups, connect
    from trainer.parity_cases import DS_CONFIG

    register()
    rank, world, device = connect(timeout_sec=100)
    groups = build_groups(Topology(world, tp, pp), rank, device, parity_cases.SEED)
    model = model_with_seed()
    step, oracle = parity.build_step(model, groups, DS_CONFIG, 2), parity.build_oracle(model)
    assert any(name.endswith("linear_qkv.bias") for name, _ in step.llm.parameters())
    found = parity.compare(step, oracle, parity_cases.make_samples("mixed", world, model.adapter.rate))
    loss, norm = parity.loss_curves(step, oracle, 2)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return [[found.loss, found.gradient], [loss, norm]]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_it_trains_on_two_ranks_as_in_one_process(tp: int, pp: int) -> None:
    (batch, curve), _ = run_ranks(2, train, {"tp": tp, "pp": pp}, timeout_sec=150)
    assert max(batch) <= 1e-5 and max(curve) <= 1e-4, (batch, curve)


@pytest.mark.timeout(200)
def test_its_export_is_a_model_of_transformers(
    plugin: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", model=model_with_seed())
    manifest = write_manifest(tmp_path)
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "fp32", "--verify", str(manifest)]
    assert export.main(arguments) == 0, capsys.readouterr().err
    assert "llm.model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "out" / "model.safetensors")
