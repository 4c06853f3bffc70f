"""The `config.json` of an exported model, which contains the Hugging Face configs of the LLM and of all encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from model.config import FORMER_GATES, AdapterConfig, EncoderConfig, ModelConfig, RouterConfig
from model.encoders.family import family_of
from model.encoders.hf_config import resolve


class EarshotConfig(PretrainedConfig):
    """The config of `model.hub.modeling.EarshotForCausalLM`.

    Args:
        text_config: The LLM's config.
        audio: The fields of `model.config.ModelConfig` without the LLM. Encoders have no `weights`.
        vocab_size: The vocabulary size of the tokenizer. The LLM's embedding may have more rows.
    """

    model_type = "earshot"

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        audio: dict[str, Any] | None = None,
        vocab_size: int = 0,
        **kwargs: Any,
    ) -> None:
        text = text_config if text_config is not None else {"model_type": "llama"}
        self.text_config = text if isinstance(text, PretrainedConfig) else AutoConfig.for_model(**text)
        self.audio = audio if audio is not None else {}
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


def describe(config: ModelConfig, hf_config: PretrainedConfig, vocab_size: int) -> dict[str, Any]:
    """Return the arguments of `EarshotConfig` that describe a model.

    The result contains the complete configs of pre-trained encoders. Settings that only training needs (the weights of
    the loss terms, and the CTC head unless the LLM reads its probabilities) are omitted.

    Args:
        config: The recipe's model.
        hf_config: The LLM's config.
        vocab_size: The vocabulary size of the tokenizer.

    Raises:
        UserError: If the config of an encoder cannot be read.
    """
    audio = {
        "primary": None if config.primary is None else self_contained(config.primary),
        "experts": [self_contained(e) for e in config.experts],
        "expert_dim": config.expert_dim,
        "router": dataclasses.asdict(config.router),
        "adapter": dataclasses.asdict(config.adapter),
        **feedback_fields(config),
    }
    return {"text_config": hf_config.to_dict(), "audio": audio, "vocab_size": vocab_size}


FEEDBACK_KEYS = ("ctc_feedback", "ctc_weight", "ctc_vocabulary", "ctc_outputs")
"""The fields of `ModelConfig` that a description contains only if the LLM reads the probabilities of the CTC head."""

PIECES = "ctc_pieces"
"""The field of `ModelConfig` that a description contains only if the LLM reads the probabilities of pieces."""


def feedback_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that describe the CTC head; empty if the LLM does not read its probabilities."""
    if not config.ctc_feedback:
        return {}
    keys = (*FEEDBACK_KEYS, PIECES) if config.ctc_vocabulary == "pieces" else FEEDBACK_KEYS
    return {key: getattr(config, key) for key in keys}


def audio_config(tree: Mapping[str, Any]) -> ModelConfig:
    """Return the `ModelConfig` that `EarshotConfig.audio` describes. Its LLM is not set."""
    router, adapter = rename_former_keys(tree)["router"], tree["adapter"]
    return ModelConfig(
        primary=None if tree["primary"] is None else EncoderConfig(**tree["primary"]),
        experts=tuple(EncoderConfig(**e) for e in tree["experts"]),
        expert_dim=tree["expert_dim"],
        router=RouterConfig(**{**router, "gates": tuple(router["gates"])}),
        adapter=AdapterConfig(**{**adapter, "strides": tuple(adapter["strides"])}),
        **{key: tree[key] for key in (*FEEDBACK_KEYS, PIECES) if key in tree},
    )


def rename_former_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `EarshotConfig.audio` with the current names of keys and gates. Earlier versions wrote different names."""
    router = tree["router"]
    if isinstance(router, Mapping):
        router = dict(router)
        if "entry_steps" in router:
            router["added_encoder_warmup_steps"] = router.pop("entry_steps")
        if isinstance(router.get("gates"), list | tuple):
            router["gates"] = [FORMER_GATES.get(g, g) if isinstance(g, str) else g for g in router["gates"]]
    return {**tree, "router": router}


def self_contained(config: EncoderConfig) -> dict[str, Any]:
    """Return the fields of an encoder without `weights`, and with its complete transformers config."""
    found = resolve(config)
    own = {f.name for f in dataclasses.fields(type(found.hf_config))}
    own -= {f.name for f in dataclasses.fields(PretrainedConfig)}
    values = {key: value for key, value in found.hf_config.to_dict().items() if key in own}
    values |= found.extractor
    if family_of(config).config_class is None:
        values["model_type"] = found.hf_config.model_type
    if family_of(config).normalizes is not None:
        values["do_normalize"] = found.do_normalize
    return {**dataclasses.asdict(config), "weights": None, "config": values}
