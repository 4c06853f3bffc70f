"""Tests of the changes that `earshot plan --explain` recommends."""

from __future__ import annotations

import re

import pytest

from trainer.config.checks import check_recipe
from trainer.config.load import load_recipe
from trainer.plan.remedies import memory_remedy, remedy

PARTS = (
    "computing the LLM",
    "recomputing the LLM's activations",
    "tensor-parallel collectives",
    "sending tokens to experts",
    "gathering keys and values",
    "the pipeline's bubble",
    "transfers between stages",
    "gradients and weights over replicas",
    "computing the encoders",
    "ZeRO-3's collectives",
    "exchanging clips and embeddings",
    "updating the weights",
)
ALL_OFF = ["train.recompute_llm=full", "train.recompute_encoders=true", "train.gather_audio_weights=per_module"]
ALL_ON = [
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "train.recompute_encoders=false",
    "train.recompute_encoder_calls=false",
]


@pytest.mark.parametrize("overrides", [ALL_OFF, ALL_ON, ["train.recompute_encoder_calls=true"]])
def test_every_recommended_value_is_legal_and_new(overrides: list[str]) -> None:
    recipe = load_recipe("mowe_8b", overrides)
    for part in PARTS:
        text = remedy(part, recipe)
        # Keys that are joined by "and" must be changed together.
        for option in re.split(r", | or ", text):
            keys = re.findall(r"[a-z_]+\.[a-z_]+=[a-z0-9_]+", option)
            if keys:
                changed = load_recipe("mowe_8b", [*overrides, *keys])
                check_recipe(changed)
                assert changed != recipe, (part, option)


def test_what_the_recipe_already_does_is_not_recommended() -> None:
    off, on = load_recipe("mowe_8b", ALL_OFF), load_recipe("mowe_8b", ALL_ON)
    assert "overlap_grad_reduce=true and parallel.overlap_param_gather=true" in remedy(PARTS[7], load_recipe("debug"))
    assert "overlap" not in remedy(PARTS[7], on)
    assert remedy("computing the encoders", on) == "more ranks"
    assert remedy("computing the encoders", off).startswith("train.recompute_encoders=false if there is enough memory")
    assert "gather_audio_weights" in remedy("ZeRO-3's collectives", off)
    assert "gather_audio_weights" not in remedy("ZeRO-3's collectives", on)
    assert remedy("exchanging clips and embeddings", on) == "nothing in the recipe changes it much"
    whole = load_recipe("mowe_70b")  # every virtual stage has only one layer already
    assert "virtual_stages" not in remedy("the pipeline's bubble", whole)
    assert "virtual_stages" in remedy("the pipeline's bubble", load_recipe("mowe_70b", ["parallel.virtual_stages=2"]))


@pytest.mark.parametrize(
    ("overrides", "part", "whole", "expected"),
    [
        (
            ["train.recompute_encoder_calls=false"],
            "encoder activations",
            True,
            "train.recompute_encoder_calls=true, or train.recompute_encoders=true, or more ranks",
        ),
        (
            ["train.recompute_encoder_calls=true", "train.recompute_encoders=true"],
            "encoder activations",
            True,
            "a smaller train.encoder_batch_sec, or more ranks",
        ),
        (
            ["train.recompute_llm=full"],
            "LLM activations",
            True,
            "a smaller train.llm_tokens_per_microbatch, or a larger parallel.context for long samples",
        ),
        ([], "buffers", True, "train.gather_audio_weights=per_module"),
        ([], "buffers", False, "a smaller reduce_bucket_size or stage3_max_reuse_distance in train.deepspeed"),
        ([], "states", True, "a larger parallel.tensor or parallel.pipeline, or more ranks"),
    ],
)
def test_a_plan_that_does_not_fit_names_only_what_the_recipe_does_not_do(
    overrides: list[str], part: str, whole: bool, expected: str
) -> None:
    assert memory_remedy(part, load_recipe("mowe_8b", overrides), whole) == expected
