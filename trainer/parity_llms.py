"""Fields of the Hugging Face configs of the tiny LLMs with which parity is measured, one for each family."""

from __future__ import annotations

from typing import Any

_FEATURES: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 1.7,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "logits_scaling": 1.3,
    },
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True, "pad_token_id": None},
    "phi3": {
        "pad_token_id": None,
        "sliding_window": 5,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.1, 1.4],
            "long_factor": [2.0, 4.0],
        },
        "original_max_position_embeddings": 128,
    },
    "gemma2": {
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 3.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    },
    "gemma3_text": {
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 3.0,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "tie_word_embeddings": True,
    },
    "ministral3": {
        "head_dim": 8,
        "pad_token_id": None,
        "sliding_window": 6,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "qwen3_5_text": {
        "head_dim": 16,
        # The norm of a head with small outputs amplifies rounding errors, unless this number bounds the amplification.
        "rms_norm_eps": 1e-2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 12,
        "layer_types": ["linear_attention", "full_attention"] * 4,
    },
    "olmo2": {"pad_token_id": None},
    "olmo3": {
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
}
"""The config fields of families with operations that Llama lacks. Sliding windows are shorter than most samples."""

FEATURED = tuple(_FEATURES)
"""The families without FFN experts that have operations that Llama lacks."""


def features(family: str, num_layers: int) -> dict[str, Any]:
    """Return the config fields of a family that differ from Llama's, for a model with `hidden_size` 32 and 4 heads.

    Args:
        family: The family. The result is empty if it is not one of `FEATURED`.
        num_layers: The number of layers, at most 8.
    """
    fields = dict(_FEATURES.get(family, {}))
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:num_layers]
    return fields


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [2],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "swiglu_limit": 0.05,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "mixture": {
        "model_type": "llama",
        "ffn_experts": {"experts": ["d", "b", "c", "a"], "layers": [1, 3], "top_k": 2, "normalize": True},
    },
    "mixture_balanced": {
        "model_type": "llama",
        "ffn_experts": {
            "experts": ["d", "b", "c", "a"],
            "layers": [1, 3],
            "top_k": 3,
            "normalize": True,
            "null_experts": 2,
            "bias_rate": 0.02,
            "jitter": 0.2,
            "shared": ["s", "r"],
        },
    },
    "mixture_qwen3_5": {
        "model_type": "qwen3_5_text",
        **features("qwen3_5_text", 4),
        "ffn_experts": {"experts": ["d", "b", "c", "a"], "layers": [0, 1], "top_k": 2, "normalize": True},
    },
}
"""The config fields of families with FFN experts. One layer of the Qwen2-MoE and of the Qwen3-MoE has no experts. The
gates of GPT-OSS are bounded so tightly that some values are clamped. `mixture` is a Llama in which the recipe adds
experts to every second layer. `mixture_balanced` also has shared experts, null experts, jitter, and biases that change
so much per step that they affect which experts are chosen. In `mixture_qwen3_5`, one layer with experts has
linear attention."""
MIXTURES = tuple(name for name, fields in EXPERTS.items() if "ffn_experts" in fields)
"""The entries of `EXPERTS` in which the recipe adds experts to a dense LLM."""
