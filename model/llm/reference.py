"""The LLM in transformers: its config, its weights and the single-process model."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model.config import LLMConfig
from model.errors import UserError
from model.llm.donors import MixtureSource
from model.llm.experts import place_experts
from model.llm.families import check_family, family_of, is_fused, mixture_of, modules_of
from model.llm.features import delta_sizes, has_linear_layers, rope_sets
from model.llm.mixture import BASE, FIELD, describe_experts, read_experts
from model.llm.names import hf_shapes
from model.llm.rotary import ROPE_TYPES
from model.llm.stacked import StackedSource
from model.llm.weights import RandomSource, SafetensorsSource, WeightSource, check_source, local_directory

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
# Keys that transformers reads from a config although the config classes of some families do not declare them.
_OTHER_KEYS = (
    "model_type",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "architectures",
    "transformers_version",
)


def resolve_hf_config(config: LLMConfig) -> PretrainedConfig:
    """Return the Hugging Face config that the recipe's section `model.llm` describes.

    Raises:
        UserError: If the config is invalid, the family or a key is unknown, or the Megatron model lacks a required
            feature.
    """
    if config.weights is None:
        hf_config = _make_config(config.config)
        _complete(hf_config, config)
        return hf_config
    try:
        hf_config = _load_config(config)
        _complete(hf_config, config)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - an arbitrary config file can cause any exception
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(
            f"model.llm.weights = {config.weights}: config.json is not a usable model config ({reason}); use other "
            "weights"
        ) from error
    return hf_config


def dense_config(hf_config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of the config without the experts that a recipe added to a dense LLM."""
    dense = copy.deepcopy(hf_config)
    if hasattr(dense, FIELD):
        delattr(dense, FIELD)
    return dense


def _add_experts(hf_config: PretrainedConfig, config: LLMConfig) -> None:
    if mixture_of(hf_config) is not None:
        raise UserError(
            f"model.llm.experts: the LLM ({hf_config.model_type}) has experts already; use a dense LLM, or remove "
            "the key"
        )
    if is_fused(hf_config) or family_of(hf_config).activation != "silu":
        raise UserError(
            f"model.llm.experts: not supported for {hf_config.model_type}, whose feed-forward network is not three "
            "projections with SiLU; use another LLM, or remove the key"
        )
    layers = hf_config.num_hidden_layers
    setattr(hf_config, FIELD, describe_experts(config.experts, config.moe_layers, config.top_k, config.router, layers))


def _complete(hf_config: PretrainedConfig, config: LLMConfig) -> None:
    """Add the FFN experts of the recipe to a config, and check the config."""
    if (given := getattr(hf_config, FIELD, None)) is not None:
        setattr(hf_config, FIELD, read_experts(given, hf_config.num_hidden_layers))
    if config.experts:
        _add_experts(hf_config, config)
    _check_features(hf_config)


def weight_source(
    config: LLMConfig,
    hf_config: PretrainedConfig,
    seed: int | None,
    donors: Mapping[str, WeightSource] | None = None,
) -> WeightSource:
    """Return the weights that the recipe's section `model.llm` describes.

    Args:
        config: The section.
        hf_config: The LLM.
        seed: The seed of random weights. It is required without a checkpoint, and for the routers of `config.experts`.
        donors: The initial weights of each expert by its name, except for experts whose `from` is `base`.

    Raises:
        UserError: If the checkpoint cannot be read or does not fit `hf_config`.
    """
    own = dense_config(hf_config) if config.experts else hf_config
    source: WeightSource
    if config.weights is None:
        assert seed is not None, "random weights need a seed"
        source = RandomSource(own, seed)
    else:
        source = SafetensorsSource(local_directory(config.weights))
        if family_of(own).stacks_experts:
            source = StackedSource(source, own)
        check_source(source, own)
    if not config.experts:
        return source
    assert seed is not None, "random routers need a seed"
    given = {e.name: source if e.from_ == BASE else (donors or {})[e.name] for e in config.experts}
    return MixtureSource(source, given, RandomSource(hf_config, seed), hf_config)


@torch.no_grad()
def build_reference(config: LLMConfig, seed: int | None = None) -> PreTrainedModel:
    """Build the transformers model in fp32 with the same weights as the Megatron model.

    Raises:
        UserError: If `resolve_hf_config` or `weight_source` raises it, or if the tensors that the `LLMFamily` describes
            differ from those of the model.
    """
    hf_config = resolve_hf_config(config)
    source = weight_source(config, hf_config, seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        hf_config, dtype=torch.float32, attn_implementation=_attention_of(hf_config)
    )
    # Otherwise, the embedding of the token `pad_token_id` would not be trained. Megatron trains all embeddings.
    model.get_input_embeddings().padding_idx = None  # type: ignore[assignment]
    if (mixture := mixture_of(hf_config)) is not None:
        place_experts(model, mixture, modules_of(hf_config))
    parameters = dict(model.named_parameters())
    _check_shapes(hf_config, {n: tuple(p.shape) for n, p in parameters.items()})
    for name, parameter in parameters.items():
        parameter.copy_(source.read(name, (slice(None),) * parameter.dim()))
    return model


def _attention_of(hf_config: PretrainedConfig) -> str:
    """Return the name in transformers of an attention function for an LLM. SDPA supports neither sinks nor bounded
    scores."""
    family = family_of(hf_config)
    return "eager" if family.sinks or family.scales(hf_config).scores_cap is not None else "sdpa"


def _check_shapes(hf_config: PretrainedConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Check that the family describes the tensors of transformers' model. The family of a plug-in may be wrong."""
    wrong = sorted(dict(found.items() ^ hf_shapes(hf_config).items()))
    if wrong:
        raise UserError(
            f"model.llm.config.model_type = {hf_config.model_type}: its LLMFamily does not describe the tensors of "
            f"transformers' model: {wrong[0]} is missing, superfluous or has another shape; correct the family"
        )


def _load_config(config: LLMConfig) -> PretrainedConfig:
    assert config.weights is not None
    directory = local_directory(config.weights)
    try:
        hf_config: PretrainedConfig = AutoConfig.from_pretrained(str(directory))
    except (StrictDataclassError, OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'}: not a usable model config ({_first_line(error)})") from error
    check_family(hf_config.model_type)
    _check_precision(hf_config, directory)
    overrides = {k: v for k, v in config.config.items() if k != "model_type"}
    if config.config.get("model_type", hf_config.model_type) != hf_config.model_type:
        raise UserError(
            f"model.llm.config.model_type = {config.config['model_type']}: the type of the weights is "
            f"{hf_config.model_type}; remove the key"
        )
    if not overrides:
        return hf_config
    _check_keys(type(hf_config), overrides)
    # `to_dict` lists a key that has two names, such as num_experts, under only one of them.
    listed = type(hf_config).attribute_map
    return _construct({**hf_config.to_dict(), **{listed.get(k, k): v for k, v in overrides.items()}})


def _check_precision(hf_config: PretrainedConfig, directory: Path) -> None:
    """Check that weights are not quantized."""
    found: Any = getattr(hf_config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", found)
    raise UserError(
        f"{directory}: the weights are quantized ({method}); write them in bf16 to another folder, as in docs/llms.md, "
        "section Dequantize, and use that folder"
    )


def _make_config(values: dict[str, Any]) -> PretrainedConfig:
    check_family(values.get("model_type"))
    _check_keys(CONFIG_MAPPING[values["model_type"]], values)
    return _construct(values)


def _construct(values: dict[str, Any]) -> PretrainedConfig:
    for key in _SIZES:
        if isinstance(value := values.get(key), int) and value < 1:
            raise UserError(f"model.llm.config.{key} = {value}: must be at least 1")
    arguments = {k: v for k, v in values.items() if k != "model_type"}
    try:
        hf_config: PretrainedConfig = AutoConfig.for_model(values["model_type"], **arguments)
    except (StrictDataclassError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"model.llm.config: not a valid {values['model_type']} config ({_first_line(error)})"
        ) from error
    return hf_config


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_keys(config_class: type, values: dict[str, Any]) -> None:
    other_names: dict[str, str] = getattr(config_class, "attribute_map", {})
    known = {f.name for f in dataclasses.fields(config_class)}
    known |= {FIELD, *_OTHER_KEYS, *other_names, *other_names.values()}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see the family's config in transformers"
            raise UserError(f"model.llm.config.{key}: unknown key; {hint}")


def _check_features(hf_config: PretrainedConfig) -> None:
    """Check that the Megatron model supports every feature that the config uses."""
    where = "model.llm.config"
    check_family(hf_config.model_type)
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % groups:
        raise UserError(f"{where}.num_key_value_heads = {groups}: must divide num_attention_heads = {heads}")
    _check_rotary(hf_config)
    mixture = mixture_of(hf_config)
    if mixture is not None and not 1 <= mixture.top_k <= len(mixture.experts):
        raise UserError(
            f"{where}.num_experts_per_tok = {mixture.top_k}: must be within 1..{len(mixture.experts)}, the number of "
            "experts of a layer"
        )
    for key, value in family_of(hf_config).required.items():
        if (getattr(hf_config, key, value) or value) != value:
            raise UserError(f"{where}.{key} = {getattr(hf_config, key)}: only {value} is supported")


def _check_rotary(hf_config: PretrainedConfig) -> None:
    """Check the types of layers, attention windows, rotary embeddings and scales of a config."""
    family = family_of(hf_config)
    for key, rope in rope_sets(hf_config).items():
        where = f"model.llm.config.rope_parameters{'.' * bool(key)}{key}"
        if rope.get("rope_type", "default") not in ROPE_TYPES:
            raise UserError(f"{where}.rope_type = {rope['rope_type']}: must be one of {', '.join(ROPE_TYPES)}")
        share = rope.get("partial_rotary_factor", 1.0)
        if share != 1.0 and not family.partial_rotary:
            raise UserError(f"{where}.partial_rotary_factor = {share}: only 1.0 is supported for this family")
    if has_linear_layers(hf_config):
        delta_sizes(hf_config)
    family.scales(hf_config)
