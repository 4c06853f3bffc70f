"""Tests of reading LLMs saved by transformers, including LLMs in multimodal models as docs/llms.md describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from model.config import LLMConfig
from model.llm.families import LLM_FAMILIES
from model.llm.reference import build_reference, resolve_hf_config
from trainer.parity_cases import tiny_model
from trainer.parity_llms import EXPERTS

DENSE = [family for family in LLM_FAMILIES if family not in EXPERTS]
PAGE = Path(__file__).parents[2] / "docs" / "llms.md"
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


@torch.no_grad()
@pytest.mark.parametrize("family", DENSE)
def test_a_folder_of_transformers_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    saved = AutoModelForCausalLM.from_config(resolve_hf_config(tiny_model(family).llm)).eval()
    for parameter in saved.parameters():  # without this, norms would be all 0 or 1
        parameter.add_(0.1 * torch.randn_like(parameter))
    saved.save_pretrained(tmp_path)
    read = build_reference(LLMConfig(weights=str(tmp_path))).eval()
    ids = torch.randint(2, 60, (2, 20))
    assert torch.equal(read(input_ids=ids).logits, saved(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "family", "vision"),
    [
        ("gemma3", "gemma3_text", {"model_type": "siglip_vision_model"}),
        ("mistral3", "ministral3", {"model_type": "pixtral", "head_dim": 8}),
        (
            "qwen3_5",
            "qwen3_5_text",
            {"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32},
        ),
    ],
)
def test_the_documented_way_to_take_an_llm_out_of_a_multimodal_model(
    kind: str, family: str, vision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    text = {**tiny_model(family).llm.config, "final_logit_softcapping": None}
    text = resolve_hf_config(LLMConfig(config=text if kind == "gemma3" else tiny_model(family).llm.config)).to_dict()
    sizes = {"mm_tokens_per_image": 4} if kind == "gemma3" else {}
    vision = vision if kind == "qwen3_5" else {**VISION, **vision}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **sizes)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text(encoding="utf-8").partition("## Extract the LLM from a multimodal model")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    exec(found[1].replace("google/gemma-3-4b-it", "whole"), {})
    read = build_reference(LLMConfig(weights="gemma-3-4b-text")).eval()
    ids = torch.randint(2, 50, (1, 20))
    assert torch.equal(read(input_ids=ids).logits, whole(input_ids=ids).logits)
