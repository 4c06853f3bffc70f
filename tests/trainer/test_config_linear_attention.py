"""Tests of the checks of recipes for LLMs with linear attention, which are made before any rank starts."""

from __future__ import annotations

import pytest

from model.errors import UserError
from trainer.config.checks import check_recipe
from trainer.config.load import load_recipe

LLM = "model.llm.config={model_type: qwen3_5_text, vocab_size: 256, hidden_size: 32, intermediate_size: 64, \
num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 4, head_dim: 8, linear_num_key_heads: 2, \
linear_num_value_heads: 4, linear_key_head_dim: 8, linear_value_head_dim: 8, max_position_embeddings: 1024}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [LLM, "parallel={num_ranks: 2, context: 2}"],
            r"parallel.context = 2: the only legal value for an LLM with linear attention \(qwen3_5_text\) is 1",
        ),
        (
            [LLM, "parallel={num_ranks: 4, tensor: 4}"],
            "parallel.tensor = 4: must divide the 2 key heads of the LLM's linear attention; .*pipeline=1: 1, 2$",
        ),
        (
            [LLM.replace("value_heads: 4, linear_key", "value_heads: 3, linear_key")],
            "linear_num_value_heads = 3: must be a multiple of linear_num_key_heads = 2",
        ),
        ([LLM.replace("key_head_dim: 8", "key_head_dim: 0")], "linear_key_head_dim = 0: must be at least 1"),
        (
            ["model.llm.config={model_type: olmo3, num_hidden_layers: 1, layer_types: [linear_attention]}"],
            "layer_types = linear_attention: must be one of full_attention, sliding_attention",
        ),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(load_recipe("debug", overrides))


def test_what_is_accepted() -> None:
    check_recipe(load_recipe("debug", [LLM, "parallel={num_ranks: 4, tensor: 2, pipeline: 2}"]))
