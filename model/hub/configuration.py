"""`config.json` of an exported model: the LLM's Hugging Face config and the audio side's, nothing left to look up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from model.config import FORMER_GATES, AdapterConfig, EncoderConfig, ModelConfig, RouterConfig
from model.encoders.hf_config import resolve


class EarshotConfig(PretrainedConfig):
    """Config of `model.hub.modeling.EarshotForCausalLM`.

    Args:
        text_config: of the LLM (llama, mistral, qwen2 or qwen3).
        audio: fields of `model.config.ModelConfig` without the LLM; encoders without `weights`.
        vocab_size: of the tokenizer; the LLM may have more rows.
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
    """The arguments of `EarshotConfig` that mean `config`: the configs of pre-trained encoders are written out, and
    what only training needs (CTC head, weights of the loss) is left out.

    Raises:
        UserError: an encoder's config cannot be read.
    """
    audio = {
        "primary": None if config.primary is None else _self_contained(config.primary),
        "experts": [_self_contained(e) for e in config.experts],
        "expert_dim": config.expert_dim,
        "router": dataclasses.asdict(config.router),
        "adapter": dataclasses.asdict(config.adapter),
    }
    return {"text_config": hf_config.to_dict(), "audio": audio, "vocab_size": vocab_size}


def audio_config(tree: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` that `EarshotConfig.audio` means (its LLM is not set)."""
    router, adapter = dict(tree["router"]), tree["adapter"]
    if "entry_steps" in router:  # an export of an earlier version
        router["added_encoder_warmup_steps"] = router.pop("entry_steps")
    gates = tuple(FORMER_GATES.get(gate, gate) for gate in router["gates"])
    return ModelConfig(
        primary=None if tree["primary"] is None else EncoderConfig(**tree["primary"]),
        experts=tuple(EncoderConfig(**e) for e in tree["experts"]),
        expert_dim=tree["expert_dim"],
        router=RouterConfig(**{**router, "gates": gates}),
        adapter=AdapterConfig(**{**adapter, "strides": tuple(adapter["strides"])}),
    )


def _self_contained(config: EncoderConfig) -> dict[str, Any]:
    """The encoder without its `weights`, every field of its transformers config written out."""
    found = resolve(config)
    own = {f.name for f in dataclasses.fields(type(found.hf_config))}
    own -= {f.name for f in dataclasses.fields(PretrainedConfig)}
    values = {key: value for key, value in found.hf_config.to_dict().items() if key in own}
    values["do_normalize"] = found.do_normalize
    return {**dataclasses.asdict(config), "weights": None, "config": values}
