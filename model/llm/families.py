"""The LLM families, and the properties that distinguish them in Megatron-core and in Hugging Face checkpoints.

All families are decoders with RMSNorms, rotary position embeddings and gated feed-forward networks. They differ in
their additional tensors, in their tensor names, and in the features that `model.llm.features` describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.errors import UserError
from model.llm.features import Activation, Norms, Scales, gemma2, gemma3, granite, ministral3, plain
from model.llm.mixture import Mixture, described, gpt_oss, mixtral, qwen2_moe, qwen3_moe

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
"""The names of the modules of transformers' Llama, by role. Names within a layer are relative to `layer`, in which
`{n}` stands for the layer's number. If several roles name the same module, they share one tensor, which contains their
rows in the order of the roles. Families with norms after attention and after the feed-forward network have the roles
`attention_output_norm` and `mlp_output_norm`. In families with attention sinks, the role `sinks` names the module that
has a parameter `sinks`. Families with linear attention have the roles of `QWEN3_5_MODULES` that begin with `delta`."""

REQUIRED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
"""The fields of the Hugging Face config for which the Megatron model supports only one value, and this value."""


@dataclass(frozen=True)
class LLMFamily:
    """The properties that distinguish one LLM family from another.

    Each family is an entry in `LLM_FAMILIES`. `docs/extending.md` shows how to add a family.
    """

    qkv_bias: bool = False
    """True if the query, key and value projections have biases."""
    output_bias: bool = False
    """True if the attention output projection has a bias."""
    sinks: bool = False
    """True if every head has an attention sink, a learned score that takes part in the softmax but has no value."""
    gated_attention: bool = False
    """True if the query projection also has rows for a gate by which the attention output is multiplied. The rows of
    each head's gate follow the rows of its query."""
    qk_norm: bool = False
    """True if every query and key head is normalized by an RMSNorm with learned weights."""
    all_heads_norm: bool = False
    """True if one RMSNorm normalizes all query heads together, and another one normalizes all key heads together. It
    cannot be combined with `qk_norm`."""
    norms: Norms = "before"
    """The positions of the RMSNorms in a layer."""
    norms_from_zero: bool = False
    """True if norms multiply by 1 + weight, so that their weights are initialized to 0."""
    activation: Activation = "silu"
    """The activation function of the gate in the feed-forward network."""
    rotates_in_fp32: bool = False
    """True if queries and keys are rotated in fp32 even in half precision, as in transformers' OLMo 2."""
    partial_rotary: bool = False
    """True if the config may restrict the rotary embedding to a part of each head (`partial_rotary_factor`)."""
    scales: Callable[[PretrainedConfig], Scales] = plain
    """The function that reads the scaling factors from a config."""
    required: Mapping[str, Any] = field(default_factory=lambda: dict(REQUIRED))
    """The fields of the Hugging Face config for which only one value is supported, and this value. Fields that the
    config lacks are ignored."""
    modules: Mapping[str, str] = field(default_factory=lambda: dict(LLAMA_MODULES))
    """The names of the modules in the checkpoint, by the roles of `LLAMA_MODULES`."""
    experts: Callable[[PretrainedConfig], Mixture | None] | None = None
    """The function that reads the experts from a config; None if the family has no experts. For a family with experts,
    `modules` also has the roles `router`, `expert_gate`, `expert_up` and `expert_down`. Their names begin with the
    same parent module. For a family with shared experts, it also has the roles `shared_gate`, `shared_up` and
    `shared_down`, and `shared_score` if `Mixture.shared_gate` is true. `{e}` stands for the name of the expert."""
    stacks_experts: bool = False
    """True if published checkpoints store the experts of a layer in the tensors that `model.llm.stacked` describes."""


MIXTRAL_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{e}.w1",
    "expert_up": "block_sparse_moe.experts.{e}.w3",
    "expert_down": "block_sparse_moe.experts.{e}.w2",
}
QWEN3_MOE_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
}
QWEN2_MOE_MODULES: dict[str, str] = {
    **QWEN3_MOE_MODULES,
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_score": "mlp.shared_expert_gate",
}
GPT_OSS_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    "sinks": "self_attn",
    "router": "mlp.router",
    "expert_gate": "mlp.experts.{e}.gate_proj",
    "expert_up": "mlp.experts.{e}.up_proj",
    "expert_down": "mlp.experts.{e}.down_proj",
}
QWEN3_5_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    "delta": "linear_attn",
    "delta_inputs": "linear_attn.in_proj_qkv",
    "delta_gate": "linear_attn.in_proj_z",
    "delta_rate": "linear_attn.in_proj_b",
    "delta_decay": "linear_attn.in_proj_a",
    "delta_convolution": "linear_attn.conv1d",
    "delta_norm": "linear_attn.norm",
    "delta_output": "linear_attn.out_proj",
}
PHI3_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    **dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}
GEMMA3_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
OLMO2_MODULES: dict[str, str] = {
    **LLAMA_MODULES,
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_GEMMA2_REQUIRED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0,
    "use_bidirectional_attention": False,
}
_GEMMA3_REQUIRED = {**_GEMMA2_REQUIRED, "attn_logit_softcapping": None}  # transformers' Gemma 3 ignores this field.
_EXPERTS_REQUIRED = {**REQUIRED, "output_router_logits": False, "router_jitter_noise": 0.0}

LLM_FAMILIES: dict[str, LLMFamily] = {
    "llama": LLMFamily(),
    "mistral": LLMFamily(),
    "qwen2": LLMFamily(qkv_bias=True),
    "qwen3": LLMFamily(qk_norm=True),
    "granite": LLMFamily(scales=granite),
    "smollm3": LLMFamily(),
    "phi3": LLMFamily(
        required={**REQUIRED, "resid_pdrop": 0, "embd_pdrop": 0}, modules=PHI3_MODULES, partial_rotary=True
    ),
    "gemma2": LLMFamily(
        norms="around",
        norms_from_zero=True,
        activation="gelu_tanh",
        required=_GEMMA2_REQUIRED,
        modules=GEMMA3_MODULES,
        scales=gemma2,
    ),
    "gemma3_text": LLMFamily(
        qk_norm=True,
        norms="around",
        norms_from_zero=True,
        activation="gelu_tanh",
        required=_GEMMA3_REQUIRED,
        modules=GEMMA3_MODULES,
        scales=gemma3,
    ),
    "ministral3": LLMFamily(scales=ministral3),
    "olmo2": LLMFamily(all_heads_norm=True, norms="after", rotates_in_fp32=True, modules=OLMO2_MODULES),
    "olmo3": LLMFamily(all_heads_norm=True, norms="after", rotates_in_fp32=True, modules=OLMO2_MODULES),
    "qwen3_5_text": LLMFamily(
        gated_attention=True, qk_norm=True, norms_from_zero=True, partial_rotary=True, modules=QWEN3_5_MODULES
    ),
    "mixtral": LLMFamily(required=_EXPERTS_REQUIRED, modules=MIXTRAL_MODULES, experts=mixtral),
    "qwen2_moe": LLMFamily(
        qkv_bias=True,
        required={**_EXPERTS_REQUIRED, "qkv_bias": True},
        modules=QWEN2_MOE_MODULES,
        experts=qwen2_moe,
    ),
    "qwen3_moe": LLMFamily(qk_norm=True, required=_EXPERTS_REQUIRED, modules=QWEN3_MOE_MODULES, experts=qwen3_moe),
    "gpt_oss": LLMFamily(
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        required={**_EXPERTS_REQUIRED, "attention_bias": True},
        modules=GPT_OSS_MODULES,
        experts=gpt_oss,
        stacks_experts=True,
    ),
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
    """Return the family of a Hugging Face config. Its `model_type` must be in `LLM_FAMILIES`."""
    return LLM_FAMILIES[hf_config.model_type]


def mixture_of(hf_config: PretrainedConfig) -> Mixture | None:
    """Return the description of an LLM's FFN experts; None if it has no experts."""
    experts = family_of(hf_config).experts
    return described(hf_config) if experts is None else experts(hf_config)


def is_fused(hf_config: PretrainedConfig) -> bool:
    """Return whether the checkpoint stores the gate and up projections as one tensor."""
    modules = family_of(hf_config).modules
    return modules["gate"] == modules["up"]


def modules_of(hf_config: PretrainedConfig) -> Mapping[str, str]:
    """Return the names of an LLM's modules in checkpoints, including those of its experts, by role.

    An expert that was added to a dense LLM is stored under its own name, in the module that holds the projections of
    dense layers. Its row of the router is stored as a separate matrix, so that no tensor depends on the order of the
    experts.
    """
    modules = family_of(hf_config).modules
    if described(hf_config) is None:
        return modules
    inserted = {}
    for role in ("gate", "up", "down"):
        root, _, leaf = modules[role].rpartition(".")
        inserted[f"expert_{role}"] = inserted[f"shared_{role}"] = f"{root}.experts.{{e}}.{leaf}"
    root = modules["gate"].rpartition(".")[0]
    inserted |= {role: f"{root}.experts.{{e}}.{role}" for role in ("router", "shared_score")}
    return {**modules, **inserted}
