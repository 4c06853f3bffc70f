"""LLM features beyond the plain decoder layer, such as attention windows, linear attention and scaling factors.

All features are read from the Hugging Face config. `LLMFamily.scales` is the function that reads a family's scales.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from model.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Norms = Literal["before", "after", "around"]
"""The positions of the RMSNorms in a layer: before attention and before the feed-forward network (Llama), after both
(OLMo 2, arXiv 2501.00656, section 3.2), or before and after both (Gemma 3)."""

Activation = Literal["silu", "gelu_tanh"]
"""The activation function of the gate in the feed-forward network."""

SINK_CHANNELS = 8
"""The number of channels that are added to each query and key in attention with sinks. GPU kernels need a multiple of
8."""


@dataclass(frozen=True)
class AttentionLayer:
    """The properties of attention that may differ between the layers of an LLM."""

    window: int | None = None
    """The number of tokens to which a token attends, including itself; None for all previous tokens of its segment."""
    rope: str | None = ""
    """The key of the layer's parameters in `rope_parameters`; an empty string if all layers have the same parameters,
    and None if the layer has no rotary embedding."""
    is_linear: bool = False
    """True if the layer has a gated delta network (`model.llm.delta_net`) in place of attention."""


LINEAR = AttentionLayer(rope=None, is_linear=True)


@dataclass(frozen=True)
class DeltaSizes:
    """The sizes of an LLM's gated delta networks, before they are divided among tensor-parallel ranks."""

    key_heads: int
    """The number of query heads, which is also the number of key heads."""
    value_heads: int
    """The number of value heads, a multiple of `key_heads`."""
    key_width: int
    """The width of a query head or a key head."""
    value_width: int
    """The width of a value head."""
    kernel: int
    """The number of tokens that the convolution combines."""

    @property
    def keys(self) -> int:
        """The total number of channels in all key heads."""
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        """The total number of channels in all value heads."""
        return self.value_heads * self.value_width


def delta_sizes(hf_config: PretrainedConfig) -> DeltaSizes:
    """Return the sizes of an LLM's gated delta networks.

    Raises:
        UserError: If the value heads cannot be divided among the key heads.
    """
    keys, values = hf_config.linear_num_key_heads, hf_config.linear_num_value_heads
    if values % keys:
        raise UserError(
            f"model.llm.config.linear_num_value_heads = {values}: must be a multiple of linear_num_key_heads = {keys}"
        )
    widths = hf_config.linear_key_head_dim, hf_config.linear_value_head_dim
    return DeltaSizes(keys, values, *widths, hf_config.linear_conv_kernel_dim)


def has_linear_layers(hf_config: PretrainedConfig) -> bool:
    """Return whether any layer of an LLM has a gated delta network in place of attention."""
    return any(layer.is_linear for layer in attention_layers(hf_config))


@dataclass(frozen=True)
class Scales:
    """The factors by which some LLM families multiply embeddings, scores or logits."""

    tokens: float = 1.0
    """The factor for token embeddings. Audio embeddings are not multiplied."""
    inputs: float = 1.0
    """The factor for all inputs of the first layer, both token embeddings and audio embeddings."""
    branches: float = 1.0
    """The factor for the outputs of attention and of the feed-forward network, before they are added to the
    residual stream."""
    softmax: float | None = None
    """The factor for attention scores; None for 1/√D."""
    scores_cap: float | None = None
    """The bound c of attention scores; None for no bound. Each score is replaced by c · tanh(score / c)."""
    logits: float = 1.0
    """The number by which logits are divided."""
    logits_cap: float | None = None
    """The bound c of logits; None for no bound. Each logit is replaced by c · tanh(logit / c)."""
    long_queries: tuple[float, int] | None = None
    """(β, n): the query at position p is multiplied by 1 + β log(1 + ⌊p / n⌋), as in Llama 4; None for no factor."""


def plain(_hf_config: PretrainedConfig) -> Scales:
    """Return the default scales, for a family without scaling factors."""
    return Scales()


def granite(hf_config: PretrainedConfig) -> Scales:
    """Return the scales of a Granite model, as in transformers' `modeling_granite.py`."""
    return Scales(
        inputs=float(hf_config.embedding_multiplier),
        branches=float(hf_config.residual_multiplier),
        softmax=float(hf_config.attention_multiplier),
        logits=float(hf_config.logits_scaling),
    )


def gemma3(hf_config: PretrainedConfig) -> Scales:
    """Return the scales of a Gemma 3 model, as in transformers' `modeling_gemma3.py`."""
    return Scales(
        tokens=hf_config.hidden_size**0.5,
        softmax=hf_config.query_pre_attn_scalar**-0.5,
        logits_cap=hf_config.final_logit_softcapping,
    )


def gemma2(hf_config: PretrainedConfig) -> Scales:
    """Return the scales of a Gemma 2 model, as in transformers' `modeling_gemma2.py`."""
    return replace(gemma3(hf_config), scores_cap=hf_config.attn_logit_softcapping)


def ministral3(hf_config: PretrainedConfig) -> Scales:
    """Return the scales of a Ministral 3 model, as in transformers' `modeling_ministral3.py`.

    Raises:
        UserError: If `rope_parameters` lacks the parameters that scale queries. transformers also fails without them.
    """
    rope = hf_config.rope_parameters
    keys = ("llama_4_scaling_beta", "original_max_position_embeddings")
    for key in keys:
        if rope.get(key) is None:
            raise UserError(
                f"model.llm.config.rope_parameters.{key} is missing: ministral3 scales queries by it; set it "
                "(llama_4_scaling_beta = 0 disables the scaling)"
            )
    return Scales(long_queries=(float(rope[keys[0]]), int(rope[keys[1]])))


def rope_sets(hf_config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the parameters of the LLM's rotary embeddings by `AttentionLayer.rope`."""
    rope = hf_config.rope_parameters
    if any(isinstance(value, dict) for value in rope.values()):
        used = {layer.rope for layer in attention_layers(hf_config)}
        return {key: rope[key] for key in rope if key in used}
    return {"": rope}


def attention_layers(hf_config: PretrainedConfig) -> tuple[AttentionLayer, ...]:
    """Return the attention properties of each layer.

    A window that is at least as long as the maximum sequence length is ignored.

    Raises:
        UserError: If a layer is of an unknown type, or the config describes fewer layers than the LLM has.
    """
    count = hf_config.num_hidden_layers
    # transformers keeps fields that a config class does not declare, but models ignore these fields.
    declared = {field.name for field in fields(type(hf_config))}  # type: ignore[arg-type]
    window = hf_config.sliding_window if "sliding_window" in declared else None
    if window is not None and window >= hf_config.max_position_embeddings:
        window = None
    types = hf_config.layer_types if "layer_types" in declared else ["sliding_attention"] * count
    rotates = (hf_config.no_rope_layers if "no_rope_layers" in declared else None) or [1] * count
    for key, values in (("layer_types", types), ("no_rope_layers", rotates)):
        if len(values) < count:
            raise UserError(f"model.llm.config.{key}: has {len(values)} entries, but num_hidden_layers is {count}")
    by_type = any(isinstance(value, dict) for value in hf_config.rope_parameters.values())
    layers = []
    kinds = (
        "full_attention",
        "sliding_attention",
        *(("linear_attention",) if "linear_num_key_heads" in declared else ()),
    )
    for kind, rotated in zip(types[:count], rotates[:count], strict=True):
        if kind not in kinds:
            raise UserError(f"model.llm.config.layer_types = {kind}: must be one of {', '.join(kinds)}")
        if kind == "linear_attention":
            layers.append(LINEAR)
            continue
        rope = kind if by_type else ""
        layers.append(AttentionLayer(window if kind == "sliding_attention" else None, rope if rotated else None))
    return tuple(layers)
