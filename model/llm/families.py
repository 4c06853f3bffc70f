"""The LLM families: what distinguishes them in Megatron-core and in Hugging Face's checkpoints.

All families are decoders of the same kind: RMSNorm before attention and before a gated feed-forward network, and rotary
positions. A family differs in the tensors that it adds and in names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LLAMA_MODULES: dict[str, str] = {
    "embedding": "model.embed_tokens",
    "layer": "model.layers.{n}",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm",
    "output": "lm_head",
}
"""The modules of an LLM by their role, as transformers' Llama names them. Those of a layer are relative to `layer`, in
which `{n}` stands for the layer's number."""

REQUIRED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
"""Fields of the Hugging Face config with the only value that the Megatron model computes."""


@dataclass(frozen=True)
class LLMFamily:
    """Everything that distinguishes one LLM family from another.

    A family is one entry of `LLM_FAMILIES`. `docs/extending.md` shows how to add one.
    """

    qkv_bias: bool = False
    """True if the projections of queries, keys and values have biases."""
    qk_norm: bool = False
    """True if every query and key head is normalized by an RMSNorm with learned weights."""
    required: Mapping[str, Any] = field(default_factory=lambda: dict(REQUIRED))
    """Fields of the Hugging Face config, if it has them, and the only value that is supported."""
    modules: Mapping[str, str] = field(default_factory=lambda: dict(LLAMA_MODULES))
    """The names of the modules in the checkpoint, by the roles of `LLAMA_MODULES`."""


LLM_FAMILIES: dict[str, LLMFamily] = {
    "llama": LLMFamily(),
    "mistral": LLMFamily(),
    "qwen2": LLMFamily(qkv_bias=True),
    "qwen3": LLMFamily(qk_norm=True),
}
"""The families by the `model_type` of their Hugging Face config. Plug-ins add entries when they are imported."""


def check_family(model_type: object) -> None:
    """Check that a family is known.

    Raises:
        UserError: If no family has this `model_type`.
    """
    if model_type not in LLM_FAMILIES:
        raise UserError(f"model.llm.config.model_type = {model_type}: supported families are {', '.join(LLM_FAMILIES)}")


def family_of(hf_config: PretrainedConfig) -> LLMFamily:
    """Return the family of a Hugging Face config, whose `model_type` must be known."""
    return LLM_FAMILIES[hf_config.model_type]
