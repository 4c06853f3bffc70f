"""The description of a model in a checkpoint's state.json. Only its known fields are used.

Anyone who can write to a checkpoint can change its description, and the users of an export execute the code in the
export's folder. Values that refer to code, such as `auto_map`, are therefore never copied from the description; earshot
generates them itself. From the description, it takes only config fields that the families declare, and checks their
types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import EncoderConfig, ModelConfig
from model.encoders.hf_config import resolve
from model.errors import UserError
from model.hub.configuration import FEEDBACK_KEYS, PIECES, feedback_fields, rename_former_keys
from model.llm.families import check_family
from model.llm.mixture import FIELD, read_experts
from model.llm.names import hf_shapes
from trainer.config.convert import from_tree

_KEYS = ("text_config", "audio", "vocab_size")
_AUDIO_KEYS = ("primary", "experts", "expert_dim", "router", "adapter")
_MAX_LAYERS = 10_000
"""The maximum number of LLM layers. transformers creates a list of this length before it checks the config."""
_REMEDY = "the file was damaged or changed; restore it, or use another checkpoint or export"


@dataclass(frozen=True)
class Description:
    """A model, described by values whose names and types have been checked."""

    text_config: Mapping[str, Any]
    """The fields of the LLM's transformers config, and its `model_type`."""
    audio: ModelConfig
    """The config of the audio modules. The field `llm` is not set."""
    vocab_size: int
    """The vocabulary size of the tokenizer."""
    llm_shapes: Mapping[str, tuple[int, ...]]
    """The shape of every tensor of the LLM, by its Hugging Face name."""

    def tree(self, kept: tuple[int, ...] | None = None) -> dict[str, Any]:
        """Return the arguments of `EarshotConfig`.

        Args:
            kept: The indices of the encoder experts to describe; None for all.
        """
        audio = {key: getattr(self.audio, key) for key in _AUDIO_KEYS}
        plain = {key: dataclasses.asdict(v) if hasattr(v, "__dataclass_fields__") else v for key, v in audio.items()}
        experts = [self.audio.experts[i] for i in (range(len(self.audio.experts)) if kept is None else kept)]
        plain["experts"] = [dataclasses.asdict(e) for e in experts]
        if experts:
            plain["router"]["top_k"] = min(plain["router"]["top_k"], len(experts))
        plain |= feedback_fields(self.audio)
        return {"text_config": dict(self.text_config), "audio": plain, "vocab_size": self.vocab_size}


def read_description(tree: object, where: str) -> Description:
    """Check and return a description that this or an earlier version wrote with `model.hub.configuration.describe`.

    Args:
        tree: The parsed JSON, which is not trusted.
        where: The file that contains the description, for error messages.

    Raises:
        UserError: If a key is missing or unknown, or a value does not have the type of its field.
    """
    try:
        return _read(tree)
    except UserError as error:
        raise UserError(f"{where}: model: {error}; {_REMEDY}") from None


def _read(tree: object) -> Description:
    whole = _mapping(tree, _KEYS, "the description")
    given = whole["audio"]
    keys: tuple[str, ...] = _AUDIO_KEYS
    if isinstance(given, Mapping) and "ctc_feedback" in given:
        keys += FEEDBACK_KEYS + ((PIECES,) if PIECES in given else ())
    audio = _mapping(given, keys, "audio")
    found = from_tree(ModelConfig, rename_former_keys(audio), "audio")
    for encoder in found.encoders:
        _check_encoder(encoder)
    vocab_size = whole["vocab_size"]
    if type(vocab_size) is not int or vocab_size < 1:
        raise UserError(f"vocab_size = {vocab_size!r} is not a positive integer")
    text_config, shapes = _text_config(whole["text_config"])
    return Description(text_config, found, vocab_size, shapes)


def _mapping(tree: object, keys: tuple[str, ...], what: str) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping) or set(tree) != set(keys):
        found = ", ".join(sorted(tree)) if isinstance(tree, Mapping) else repr(tree)[:80]
        raise UserError(f"{what} must have exactly the keys {', '.join(keys)}, not {found[:200]}")
    return tree


def _check_encoder(encoder: EncoderConfig) -> None:
    if encoder.weights is not None:
        raise UserError(f"encoder {encoder.name!r} has weights = {encoder.weights!r}, but a checkpoint must have null")
    resolve(encoder)


def _text_config(tree: object) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the fields that the config class of the LLM's family declares, and the shapes of the LLM's tensors.

    All other fields are dropped. The export writes fields that every config has, such as `architectures`. Fields that
    the class does not declare, such as those for attention hooks, quantization or remote code, do not change the
    network.
    """
    from transformers import AutoConfig, PretrainedConfig

    if not isinstance(tree, Mapping):
        raise UserError(f"text_config = {repr(tree)[:80]} is not a mapping")
    kind = tree.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"text_config.model_type = {repr(kind)[:80]} is not a string")
    check_family(kind)
    cls = type(AutoConfig.for_model(kind))
    own = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(PretrainedConfig)}
    other_names = set(getattr(cls, "attribute_map", {}).values())  # such as num_local_experts for num_experts
    values = {key: value for key, value in tree.items() if key in own | other_names}
    if type(tree.get("head_dim")) is int:  # Some classes read this field without declaring it.
        values["head_dim"] = tree["head_dim"]
    layers = values.get("num_hidden_layers")
    if type(layers) is not int or not 1 <= layers <= _MAX_LAYERS:
        raise UserError(f"text_config.num_hidden_layers = {repr(layers)[:80]} is not a number from 1 to {_MAX_LAYERS}")
    if FIELD in tree:
        values[FIELD] = read_experts(tree[FIELD], layers)
    try:
        shapes = hf_shapes(cls(**values))
    except Exception as error:  # noqa: BLE001 - transformers raises many kinds of errors for invalid values
        raise UserError(f"text_config: {' '.join(str(error).split())[:200]}") from None
    return {"model_type": kind, **values}, shapes
