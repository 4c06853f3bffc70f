"""Tests of the checks of recipes for LLMs with FFN experts, which are made before any rank starts."""

from __future__ import annotations

import pytest

from model.errors import UserError
from trainer.config.checks import check_recipe
from trainer.config.load import dump, load_recipe, parse_stored_recipe

MIXTRAL = "model.llm.config={model_type: mixtral, vocab_size: 256, hidden_size: 32, intermediate_size: 64, \
num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 6, num_experts_per_tok: 2, \
max_position_embeddings: 1024}"
GPT_OSS = MIXTRAL.replace("mixtral", "gpt_oss")
QWEN2_MOE = (
    (MIXTRAL[:-1] + ", moe_intermediate_size: 32, shared_expert_intermediate_size: 45}")
    .replace("num_local_experts", "num_experts")
    .replace("mixtral", "qwen2_moe")
)
EXPERTS = "model.llm.experts=[{name: speech, from: runs/speech}, {name: text}]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.ffn_expert=2"], r"parallel.ffn_expert = 2: the LLM \(llama\) has no experts; set it to 1"),
        (
            [MIXTRAL, "parallel={num_ranks: 4, ffn_expert: 4}"],
            "parallel.ffn_expert = 4: must divide the 6 experts of a layer of the LLM; .*ffn_expert_tensor=1: 1, 2",
        ),
        (
            [MIXTRAL, "parallel={num_ranks: 2, context: 2}"],
            "parallel.context = 2: must be 1 for an LLM with experts",
        ),
        (
            [GPT_OSS, "parallel={num_ranks: 2, context: 2}"],
            "parallel.context = 2: must be 1 for an LLM with experts",
        ),
        (
            [MIXTRAL, "parallel={num_ranks: 4, tensor: 2, ffn_expert_tensor: 1}"],
            "parallel.ffn_expert_tensor = 1: must be 2 for tensor=2 and ffn_expert=1",
        ),
        (
            ["model.losses={expert_balance: {weight: 0.1}}"],
            r"model.losses.expert_balance: the LLM \(llama\) has no experts; remove the entry",
        ),
        ([MIXTRAL, EXPERTS], r"model.llm.experts: the LLM \(mixtral\) has experts already"),
        (["model.llm.top_k=1"], "moe_layers, top_k and router have no effect, because model.llm.experts is empty"),
        (
            [EXPERTS, "model.llm.top_k=1"],
            "top_k = 1: .* the routers would not be trained; set model.llm.router",
        ),
        ([EXPERTS, "model.llm.top_k=3"], r"model.llm.top_k = 3: must be within 1\.\.2"),
        (
            [EXPERTS, "model.llm.top_k=4", "model.llm.router={null_experts: 1}"],
            r"model.llm.top_k = 4: must be within 1\.\.3",
        ),
        ([EXPERTS, "model.llm.router={null_experts: -1}"], "router.null_experts = -1: must be at least 0"),
        ([EXPERTS, "model.llm.router={bias_rate: 1.5}"], r"router.bias_rate = 1.5: must be at least 0 and below 1"),
        (["model.llm.router={bias_rate: 0.001}"], "moe_layers, top_k and router have no effect"),
        (["model.llm.experts=[{name: 'null'}]"], "name = 'null': null experts have this name; choose another one"),
        ([EXPERTS, "model.llm.moe_layers=[1, 2]"], r"moe_layers = \(1, 2\): use all, .* numbers within 0\.\.1"),
        ([EXPERTS, "model.llm.router={forced: sound}"], "forced = sound: must be one of speech, text, or null"),
        ([EXPERTS, "model.llm.router={temperature: 0.1}"], "model.llm.router.temperature: unknown key; known keys are"),
        ([EXPERTS, "model.llm.router={jitter: 1}"], r"router.jitter = 1.0: must be at least 0 and below 1"),
        ([MIXTRAL[:-1] + ", router_jitter_noise: 0.1}"], "router_jitter_noise = 0.1: only 0.0 is supported"),
        ([MIXTRAL.replace("mixtral", "olmoe")], "model_type = olmoe: supported families are"),
        (["model.llm.experts=[{name: a, shared: true}]"], "all experts are shared; set shared: false for those that"),
        (
            [EXPERTS, "model.llm.router={shared_gate: true}"],
            "shared_gate = true: no expert is shared; set shared: true",
        ),
        (
            [EXPERTS.replace("}]", ", shared: true}]"), "model.llm.top_k=2"],
            r"model.llm.top_k = 2: must be within 1\.\.1",
        ),
        (
            [QWEN2_MOE, "parallel={num_ranks: 2, tensor: 2}"],
            "parallel.tensor = 2: .* and 45 feed-forward channels; possible .*: 1",
        ),
        (
            [MIXTRAL.replace("layers: 2", "layers: 4"), "parallel={num_ranks: 2, pipeline: 2, virtual_stages: 2}"],
            "parallel.virtual_stages = 2: must be 1 for an LLM with experts",
        ),
        (["model.llm.experts=[{name: a.b}]"], "name = 'a.b': use letters, digits"),
        (["model.llm.experts=[{name: a}, {name: a}]"], "the names a, a must be unique"),
        (["model.llm.experts=[{name: a, form: x}]"], r"experts\[0\].form: unknown key; did you mean from\?"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe("debug", overrides))


def test_experts_survive_a_stored_recipe_and_adapters_name_them() -> None:
    lora = "lora=[{pattern: 'llm.*.experts.speech.*', rank: 2}]"
    recipe = load_recipe("debug", [EXPERTS, "model.llm.moe_layers=second_half", "parallel.ffn_expert=2", lora])
    check_recipe(recipe)
    assert [(e.name, e.from_) for e in recipe.model.llm.experts] == [("speech", "runs/speech"), ("text", "base")]
    stored = dump(recipe)
    assert "from: runs/speech" in stored and parse_stored_recipe(stored, "here") == recipe
