"""Tests of the options for FFN experts in a recipe: shared experts, null experts, balancing biases, and jitter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.config import LLMConfig, LoraConfig
from model.errors import UserError
from model.llm.experts import MixtureLayer, balance, balance_experts, choose, jittered, observed
from model.llm.jitter import TokenNoise, jitter_factors, jittered_rows
from model.llm.mixture import ExpertConfig, ExpertRouterConfig, Mixture, described, read_experts
from model.llm.names import hf_shapes, local_pieces
from model.llm.reference import build_reference, resolve_hf_config
from model.llm.weights import RandomSource
from model.lora import Adapters, add_adapters

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ROUTER = ExpertRouterConfig(null_experts=2, bias_rate=0.01, jitter=0.125)
TWO = Mixture(("a", "b"), 2, 1, (0,), normalize=False, num_null=2)
NAMES = {
    "router": "{e}.router",
    "shared_score": "{e}.score",
    **{f"{kind}_{role}": f"{{e}}.{role}" for kind in ("expert", "shared") for role in ("gate", "up", "down")},
}
PROBABILITIES = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.05, 0.45, 0.4], [0.5, 0.3, 0.1, 0.1]])
"""The probabilities [3, 4] of two experts and two null experts. The tokens choose one, none and both experts."""


def llm(router: ExpertRouterConfig, top_k: int = 2) -> LLMConfig:
    experts = (ExpertConfig("speech"), ExpertConfig("text"))
    return LLMConfig(config=LLAMA, experts=experts, moe_layers=(1,), top_k=top_k, router=router)


def test_null_experts_have_no_weight() -> None:
    logits = PROBABILITIES.log().requires_grad_()
    found = choose(logits, TWO)
    assert found.experts.tolist() == [[0, 2], [2, 3], [0, 1]]
    torch.testing.assert_close(found.weights, torch.tensor([[0.4, 0.0], [0.0, 0.0], [0.5, 0.3]]))
    assert found.counts().tolist() == [2, 1, 2, 1]
    normalized = choose(logits, replace(TWO, normalize=True))
    torch.testing.assert_close(normalized.weights, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.625, 0.375]]))
    (gradient,) = torch.autograd.grad(normalized.weights[:, 0].sum(), logits)
    assert torch.isfinite(gradient).all() and not gradient[:2].any() and gradient[2, :2].all()


def test_a_bias_changes_the_choice_but_not_the_weights() -> None:
    logits, bias = PROBABILITIES.log(), torch.tensor([0.0, 0.25, 0.0, 0.0])
    found = choose(logits, TWO, bias)
    assert found.experts.tolist() == [[0, 1], [2, 3], [1, 0]]
    torch.testing.assert_close(found.weights, torch.tensor([[0.4, 0.1], [0.0, 0.0], [0.3, 0.5]]))
    torch.testing.assert_close(found.ranking, PROBABILITIES + bias)
    forced = choose(logits, replace(TWO, forced="a"), torch.tensor([-10.0, 0, 0, 0]))
    assert forced.experts[:, 0].tolist() == [0, 0, 0] and forced.weights[:, 0].tolist() == [1, 1, 1]


def test_biases_follow_the_counts() -> None:
    bias = torch.tensor([0.5, 0.0, 0.0, -0.25])
    balance(bias, torch.tensor([7.0, 1.0, 4.0, 4.0], dtype=torch.float64), 0.01)
    torch.testing.assert_close(bias, torch.tensor([0.49, 0.01, 0.0, -0.25]))


def test_biases_make_the_use_of_experts_even() -> None:
    model = build_reference(llm(ExpertRouterConfig(bias_rate=0.02), top_k=1), seed=1)
    ids = torch.randint(0, 61, (4, 40), generator=torch.Generator().manual_seed(2))

    def shares() -> Tensor:
        with torch.no_grad(), observed(model) as choices:
            model(ids, use_cache=False)
        balance_experts(model, choices)
        return choices[0].counts() / 160

    first = shares()
    for _ in range(40):
        last = shares()
    assert (first - 0.5).abs().max() > 0.1 and (last - 0.5).abs().max() < 0.05, (first, last)


def test_a_layer_adds_only_the_experts_that_compute() -> None:
    torch.manual_seed(1)
    mixture = replace(TWO, normalize=True, width=4)
    layer = MixtureLayer(mixture, 8, NAMES, number=1)
    hidden = torch.randn(30, 8)
    chosen: list[Any] = []
    layer.observe = chosen.append
    output = layer(hidden)
    for row, experts, weights, found in zip(hidden, chosen[0].experts, chosen[0].weights, output, strict=True):
        wanted = torch.zeros(8)
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            if expert < 2:
                gate, up, down = (layer.get_submodule(f"{'ab'[expert]}.{name}") for name in ("gate", "up", "down"))
                wanted = wanted + weight * down(torch.nn.functional.silu(gate(row)) * up(row))
        torch.testing.assert_close(found, wanted)
    counts = chosen[0].counts()
    assert counts[:2].all() and counts[2:].all(), "the tokens must choose all experts and null experts"


@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts_compute_every_token(gate: bool) -> None:
    torch.manual_seed(1)
    mixture = replace(TWO, width=4, shared=("c", "d"), shared_width=6, shared_gate=gate)
    layer = MixtureLayer(mixture, 8, NAMES, number=1)
    hidden = torch.randn(2, 15, 8)
    routed = MixtureLayer(replace(mixture, shared=()), 8, NAMES, number=1)
    routed.load_state_dict(layer.state_dict(), strict=False)
    wanted = routed(hidden)
    for expert in "cd":
        own = {name: layer.get_submodule(f"{expert}.{name}") for name in ("gate", "up", "down")}
        output = own["down"](torch.nn.functional.silu(own["gate"](hidden)) * own["up"](hidden))
        wanted = wanted + output * (layer.get_submodule(f"{expert}.score")(hidden).sigmoid() if gate else 1)
    torch.testing.assert_close(layer(hidden), wanted)


def test_shared_experts_start_as_their_donors() -> None:
    experts = (ExpertConfig("text"), ExpertConfig("common", shared=True))
    config = LLMConfig(config=LLAMA, experts=experts, top_k=1, router=ExpertRouterConfig(shared_gate=True))
    model, dense = build_reference(config, seed=1), build_reference(LLMConfig(config=LLAMA), seed=1)
    tensors, prefix = dict(model.named_parameters()), "model.layers.1.mlp"
    for role in ("gate", "up", "down"):
        own = dense.get_parameter(f"{prefix}.{role}_proj.weight")
        assert torch.equal(tensors[f"{prefix}.experts.common.{role}_proj.weight"], own)
    assert tensors[f"{prefix}.experts.common.shared_score.weight"].shape == (1, 16)
    assert f"{prefix}.experts.common.router.weight" not in tensors
    stored = model.config.ffn_experts
    assert (stored["experts"], stored["shared"], stored["shared_gate"]) == (["text"], ["common"], True)
    assert read_experts(stored, 2) == stored
    with pytest.raises(UserError, match="needs experts, layers, top_k, normalize of the right types"):
        read_experts({**stored, "shared": [1]}, 2)
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(2))
    adapters = Adapters((LoraConfig("llm.*.experts.common.*", rank=2),))
    add_adapters(nn.ModuleDict({"llm": model}), "", adapters)
    trained = {name for name, parameter in model.named_parameters() if "common" in name and parameter.requires_grad}
    assert len(trained) == 2 * (3 * 2 + 1), "each of two layers trains two factors of three projections, and a gate"
    assert model(ids, use_cache=False).logits.isfinite().all()


def noise(count: int) -> TokenNoise:
    """Return the noise of `count` tokens, in samples of 10 tokens each."""
    return TokenNoise(torch.arange(count) // 10 + (5 << 40), torch.arange(count) % 10)


def test_jitter_is_uniform_and_differs_between_tokens_channels_layers_and_steps() -> None:
    found = jitter_factors(noise(500), 3, 256, 0.25)
    assert found.min() >= 0.75 and found.max() <= 1.25
    assert found.mean() == pytest.approx(1, abs=2e-3) and found.std() == pytest.approx(0.5 / 12**0.5, rel=0.01)
    counts = found.histc(10, 0.75, 1.25)
    assert (counts / counts.mean() - 1).abs().max() < 0.05
    for others in (found, found.T):
        likeness = torch.corrcoef(others - 1).fill_diagonal_(0)
        assert likeness.abs().max() < 6 / others.shape[1] ** 0.5, "rows must be independent"
    of_layer = jitter_factors(noise(500), 4, 256, 0.25)
    next_step = jitter_factors(TokenNoise(noise(500).samples ^ 1, noise(500).positions), 3, 256, 0.25)
    for other in (of_layer, next_step):
        assert torch.corrcoef(torch.stack([found.flatten(), other.flatten()]))[0, 1].abs() < 0.02


def test_jitter_of_a_token_depends_only_on_its_identity() -> None:
    whole = jitter_factors(noise(40), 1, 16, 0.1)
    assert torch.equal(jitter_factors(noise(40).rows(slice(15, 30)), 1, 16, 0.1), whole[15:30])
    rows = torch.randn(40, 16, requires_grad=True)
    output = jittered_rows(rows, noise(40), 1, 0.1)
    torch.testing.assert_close(output, rows * whole)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), rows)[0], whole)


def test_only_the_router_reads_jittered_values() -> None:
    """Check that jitter changes the weights within its context, and changes nothing if the choice is forced."""
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(2))
    outputs = {}
    for forced in (None, "text"):
        model = build_reference(llm(ExpertRouterConfig(jitter=0.5, forced=forced)), seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts.speech.down" in name:
                    parameter.mul_(-1)  # the experts start as copies, so their weights would not matter
            plain = model(ids, use_cache=False).logits
            with jittered(model, torch.tensor([3, 4]), 7):
                outputs[forced] = model(ids, use_cache=False).logits - plain
            assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert outputs[None].abs().max() > 1e-3 and not outputs["text"].any()


def test_tensors_of_the_router() -> None:
    config: PretrainedConfig = resolve_hf_config(llm(ROUTER))
    shapes, prefix = hf_shapes(config), "model.layers.1.mlp.experts"
    assert shapes[f"{prefix}.null.router.weight"] == (2, 16) and shapes[f"{prefix}.text.router.weight"] == (1, 16)
    assert shapes[f"{prefix}.null.router.score_bias"] == (2,) and shapes[f"{prefix}.text.router.score_bias"] == (1,)
    pieces = local_pieces("decoder.layers.1.mlp.router.score_bias", config, 1, 2)
    assert [str(p.hf_name).split(".")[5] for p in pieces] == ["speech", "text", "null"]
    values = RandomSource(config, 1).read(f"{prefix}.null.router.score_bias", (slice(None),))
    assert values.tolist() == [0, 0], "biases must start at 0"
    model = build_reference(llm(ROUTER), seed=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(shapes) - trained == {f"{prefix}.{e}.router.score_bias" for e in ("speech", "text", "null")}


def test_the_settings_are_stored_in_the_config_and_read_again() -> None:
    config = resolve_hf_config(llm(ROUTER))
    stored = config.to_dict()["ffn_experts"]
    assert stored == {
        **{"experts": ["speech", "text"], "layers": [1], "top_k": 2, "normalize": True},
        **{"null_experts": 2, "bias_rate": 0.01, "jitter": 0.125},
    }
    assert read_experts(stored, 2) == stored
    found = described(config)
    assert found is not None and (found.num_null, found.bias_rate, found.jitter, found.num_choices) == (
        2,
        0.01,
        0.125,
        4,
    )
    plain = resolve_hf_config(llm(ExpertRouterConfig())).ffn_experts
    assert set(plain) == {"experts", "layers", "top_k", "normalize"}, "earlier versions must be able to read it"
    for wrong in ({**stored, "null_experts": True}, {**stored, "bias_rate": "0.01"}, {**stored, "jitters": 0.1}):
        with pytest.raises(UserError, match="ffn_experts = .*: needs experts, layers, top_k, normalize of the right"):
            read_experts(wrong, 2)
    with pytest.raises(UserError, match="null_experts = -1: must be at least 0"):
        read_experts({**stored, "null_experts": -1}, 2)
