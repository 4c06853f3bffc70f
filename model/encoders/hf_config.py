"""From a recipe's `EncoderConfig` to a checked transformers config. Reads small JSON files only, never weights."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    HubertConfig,
    PreTrainedConfig,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
)

from model.config import EncoderConfig
from model.errors import UserError
from model.lengths import FRAME_SAMPLES, SAMPLE_RATE

CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    "whisper": WhisperConfig,
    "hubert": HubertConfig,
    "wavlm": WavLMConfig,
}

# Applied to checkpoints too: theirs describe pre-training. Dropout comes back where the recipe's `config` names it.
_DETERMINISTIC: dict[str, dict[str, Any]] = {
    "whisper": {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "apply_spec_augment": False,
    },
    "conv_stack": {
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": False,
    },
}


@dataclass(frozen=True)
class ResolvedEncoder:
    """All that is needed to build an encoder, apart from its weights."""

    hf_config: PreTrainedConfig
    window_samples: int
    do_normalize: bool
    """Bring each window to zero mean and unit variance first."""


def resolve(config: EncoderConfig) -> ResolvedEncoder:
    """Read the checkpoint's config (if any), apply the recipe's overrides and check the result.

    `config.config` takes the fields of the family's transformers config, and `do_normalize`. HuBERT's and WavLM's
    otherwise comes from the checkpoint's preprocessor_config.json; without a checkpoint its default is that of the
    published models (fairseq, torchaudio's pipelines): true for the layer-norm stacks (large), false for the
    group-norm stacks (base). Whisper's default is false, as `WhisperFeatureExtractor`'s. All dropouts default to 0,
    with a checkpoint too.

    Raises:
        UserError: unknown or illegal field, unreadable checkpoint, wrong family, impossible window.
    """
    if config.family not in CONFIG_CLASSES:
        raise encoder_error(config, f"family = {config.family}", f"choose one of {', '.join(CONFIG_CLASSES)}")
    overrides = dict(config.config)
    do_normalize = overrides.pop("do_normalize", None)
    if do_normalize is not None and not isinstance(do_normalize, bool):
        raise encoder_error(config, f"config.do_normalize = {do_normalize!r}", "give true or false")
    hf_config = _hf_config(config, overrides)
    if config.family == "whisper":
        return ResolvedEncoder(hf_config, _whisper_window(config, hf_config), bool(do_normalize))
    _check_conv_stack(config, hf_config)
    if do_normalize is None:
        do_normalize = _do_normalize(config, hf_config)
    return ResolvedEncoder(hf_config, _window_samples(config), do_normalize)


def _hf_config(config: EncoderConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    cls = CONFIG_CLASSES[config.family]
    legal = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    legal.add("do_normalize")
    for key in overrides:
        if key not in legal:
            near = difflib.get_close_matches(key, legal, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use a field of transformers' {cls.__name__}"
            raise encoder_error(config, f"config.{key} is unknown", remedy)
    for key in ("layerdrop", "encoder_layerdrop"):
        if overrides.get(key):
            raise encoder_error(
                config, f"config.{key} = {overrides[key]}", "must be 0: all ranks run every layer together"
            )
    if overrides.get("apply_spec_augment"):
        raise encoder_error(config, "config.apply_spec_augment = true", "not supported here: leave it out")
    stored = {} if config.weights is None else _stored_config(config, config.weights)
    defaults = _DETERMINISTIC["whisper" if config.family == "whisper" else "conv_stack"]
    try:
        return cls.from_dict({**stored, **defaults, **overrides})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise encoder_error(config, f"config: {one_line(error)}", f"correct the field of {cls.__name__}") from error


def _stored_config(config: EncoderConfig, weights: str) -> dict[str, Any]:
    try:
        stored, _ = PreTrainedConfig.get_config_dict(weights)
    except (OSError, ValueError) as error:
        raise encoder_error(
            config,
            f"weights = {config.weights}: cannot read config.json ({one_line(error)})",
            "give a directory saved by save_pretrained, or a hub id that this machine can reach",
        ) from error
    if not stored:
        raise encoder_error(
            config,
            f"weights = {config.weights}: no config.json there",
            "give a directory saved by save_pretrained, or a hub id that this machine can reach",
        )
    if stored.get("model_type") != config.family:
        found = stored.get("model_type")
        raise encoder_error(
            config, f"weights = {config.weights} hold a {found} model", f"set family = {found} or other weights"
        )
    return stored


def _do_normalize(config: EncoderConfig, hf_config: PreTrainedConfig) -> bool:
    if config.weights is None:
        return bool(hf_config.feat_extract_norm == "layer")
    try:
        stored, _ = Wav2Vec2FeatureExtractor.get_feature_extractor_dict(config.weights)
    except (OSError, ValueError) as error:
        raise encoder_error(
            config,
            f"weights = {config.weights}: cannot read preprocessor_config.json ({one_line(error)})",
            "add the file, or set config.do_normalize to what the checkpoint was trained with",
        ) from error
    return bool(stored.get("do_normalize", True))  # Wav2Vec2FeatureExtractor's own default


def _check_conv_stack(config: EncoderConfig, hf_config: PreTrainedConfig) -> None:
    hop = math.prod(hf_config.conv_stride)
    if hop != FRAME_SAMPLES:
        raise encoder_error(
            config, f"config.conv_stride multiplies to {hop}", f"must be {FRAME_SAMPLES} (20 ms frames)"
        )
    if hf_config.feat_extract_norm not in ("group", "layer"):
        raise encoder_error(config, f"config.feat_extract_norm = {hf_config.feat_extract_norm}", "give group or layer")
    for key in ("add_adapter", "conv_pos_batch_norm"):
        if getattr(hf_config, key, False):
            why = "it changes the frame rate" if key == "add_adapter" else "it mixes the clips of a batch"
            raise encoder_error(config, f"config.{key} = true", f"not supported ({why}): use another checkpoint")


def _window_samples(config: EncoderConfig) -> int:
    samples = config.window_sec * SAMPLE_RATE
    if samples < FRAME_SAMPLES or abs(samples / FRAME_SAMPLES - round(samples / FRAME_SAMPLES)) > 1e-6:
        raise encoder_error(
            config, f"window_sec = {config.window_sec}", "must be a positive multiple of 0.02 s (one frame)"
        )
    return round(samples / FRAME_SAMPLES) * FRAME_SAMPLES


def _whisper_window(config: EncoderConfig, hf_config: PreTrainedConfig) -> int:
    if config.length_mode not in ("full", "trim"):
        raise encoder_error(config, f"length_mode = {config.length_mode}", "give full or trim")
    samples = _window_samples(config)
    capacity = hf_config.max_source_positions * FRAME_SAMPLES
    longest = f"{capacity / SAMPLE_RATE:g} s ({hf_config.max_source_positions} positions)"
    if samples > capacity:
        raise encoder_error(config, f"window_sec = {config.window_sec}", f"must not exceed {longest}")
    if config.length_mode == "full" and samples != capacity:
        raise encoder_error(config, f"window_sec = {config.window_sec}", f"must equal {longest} in length_mode full")
    return samples


def encoder_error(config: EncoderConfig, what: str, remedy: str) -> UserError:
    """The one line that a user reads: which encoder, what is wrong, what to do."""
    return UserError(f"encoder {config.name or config.family!r}: {what}; {remedy}")


def one_line(error: Exception) -> str:
    """The message of a library's exception, fit for one line."""
    return " ".join(str(error).split())[:300]
