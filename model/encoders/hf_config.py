"""Build and check the transformers config that a recipe's `EncoderConfig` describes. No weights are read."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, FeatureExtractionMixin, PreTrainedConfig

from model.config import EncoderConfig
from model.encoders.families import ENCODER_FAMILIES
from model.encoders.family import EncoderFamily, ResolvedEncoder, encoder_error, family_of, one_line
from model.lengths import FRAME_SAMPLES, SAMPLE_RATE

WHOLE_EXTRACTOR = "extractor"
"""A key in `extractor_fields` whose value is the whole content of preprocessor_config.json."""


def resolve(config: EncoderConfig) -> ResolvedEncoder:
    """Read the checkpoint's config, if there is one, apply the recipe's overrides and check the result.

    `config.config` contains fields of the family's transformers config, and optionally `do_normalize`. If the recipe
    does not set `do_normalize`, it is taken from the checkpoint's preprocessor_config.json, or from the family's
    default if there is no checkpoint. All dropout rates default to 0, even with a checkpoint.

    Raises:
        UserError: If a field is unknown or invalid, the checkpoint cannot be read or is of a different family, or
            `window_sec` is invalid.
    """
    family = family_of(config)
    overrides = dict(config.config)
    do_normalize = overrides.pop("do_normalize", None) if family.normalizes is not None else None
    if do_normalize is not None and not isinstance(do_normalize, bool):
        raise encoder_error(config, f"config.do_normalize = {do_normalize!r}", "set it to true or false")
    given = {key: overrides.pop(key) for key in family.extractor_fields if key in overrides}
    hf_config = _hf_config(config, family, overrides)
    if config.length_mode not in family.length_modes:
        raise encoder_error(config, f"length_mode = {config.length_mode}", f"use {' or '.join(family.length_modes)}")
    family.check(config, hf_config)
    extractor = {**_extractor(config, family, hf_config), **given}
    family.check_extractor(config, extractor)
    return ResolvedEncoder(
        hf_config,
        family.windowing(config, hf_config, _window_samples(config, family)),
        config.length_mode,
        _do_normalize(config, family, hf_config) if do_normalize is None else do_normalize,
        family.frame_samples,
        extractor,
    )


def _hf_config(config: EncoderConfig, family: EncoderFamily, overrides: dict[str, Any]) -> PreTrainedConfig:
    stored = {} if config.weights is None else _stored_config(config, family, config.weights)
    cls = family.config_class or _config_class(config, overrides.pop("model_type", stored.get("model_type")))
    legal = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    legal |= {*family.extractor_fields, *(("do_normalize",) if family.normalizes is not None else ())}
    for key in overrides:
        if key not in legal:
            near = difflib.get_close_matches(key, legal, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use a field of transformers' {cls.__name__}"
            raise encoder_error(config, f"config.{key} is unknown", remedy)
    for key in overrides:
        if key.endswith("layerdrop") and overrides[key]:
            raise encoder_error(
                config, f"config.{key} = {overrides[key]}", "must be 0: all ranks run every layer together"
            )
    if overrides.get("apply_spec_augment"):
        raise encoder_error(config, "config.apply_spec_augment = true", "not supported: remove the key")
    defaults = family.defaults if family.config_class is not None else without_dropout(cls)
    try:
        found = cls.from_dict({**stored, **defaults, **overrides})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise encoder_error(config, f"config: {one_line(error)}", f"correct the field of {cls.__name__}") from error
    # The file is not trusted, so it must not choose the code that computes attention.
    found._attn_implementation = None
    return found


def _config_class(config: EncoderConfig, model_type: object) -> type[PreTrainedConfig]:
    """Return transformers' config class for a `model_type`.

    Raises:
        UserError: If transformers has no class for it.
    """
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        remedy = "set weights, or set config.model_type to that of an audio encoder in transformers"
        raise encoder_error(config, f"model_type = {model_type} is unknown to transformers", remedy)
    found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def without_dropout(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the values that disable dropout, LayerDrop and SpecAugment, by the fields of a config class."""
    names = {f.name for f in dataclasses.fields(cls)}
    dropped = (n for n in names if "dropout" in n or n.endswith("layerdrop") or n == "drop_path_rate")
    switches = {"apply_spec_augment": False} if "apply_spec_augment" in names else {}
    return {**dict.fromkeys(dropped, 0.0), **switches}


def _stored_config(config: EncoderConfig, family: EncoderFamily, weights: str) -> dict[str, Any]:
    try:
        stored, _ = PreTrainedConfig.get_config_dict(weights)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise encoder_error(
            config,
            f"weights = {config.weights}: cannot read config.json ({one_line(error)})",
            "use a directory saved by save_pretrained, or a hub id that this machine can reach",
        ) from error
    if not stored or not isinstance(stored, dict):
        raise encoder_error(
            config,
            f"weights = {config.weights}: there is no config.json",
            "use a directory saved by save_pretrained, or a hub id that this machine can reach",
        )
    found = stored.get("model_type")
    container = family.containers.get(str(found))
    if container is not None:
        inner = stored.get(container)
        stored = inner if isinstance(inner, dict) else {}
        found = stored.get("model_type", getattr(family.config_class, "model_type", None))
    if family.config_class is not None and found != family.config_class.model_type:
        remedy = f"set family = {found}, or use other weights" if found in ENCODER_FAMILIES else "use other weights"
        raise encoder_error(config, f"weights = {config.weights} hold a {found} model", remedy)
    return stored


def _do_normalize(config: EncoderConfig, family: EncoderFamily, hf_config: PreTrainedConfig) -> bool:
    if family.normalizes is None:
        return False
    if config.weights is None or family.feature_extractor is None:
        return family.normalizes(hf_config)
    remedy = "add the file, or set config.do_normalize to what the checkpoint was trained with"
    stored = _stored_extractor(config, family.feature_extractor, remedy)
    extractor: Any = family.feature_extractor()
    return bool(stored.get("do_normalize", extractor.do_normalize))


def _extractor(config: EncoderConfig, family: EncoderFamily, hf_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the values of the family's `extractor_fields`, after checking the fields that `EncoderFamily.features`
    prescribes.

    Raises:
        UserError: If the checkpoint's preprocessor_config.json is missing or describes different features.
    """
    wanted = family.features(hf_config)
    if config.weights is None or family.feature_extractor is None or not (wanted or family.extractor_fields):
        return dict(family.extractor_fields)
    stored = _stored_extractor(config, family.feature_extractor, "add the file, which says how features are computed")
    for key, value in wanted.items():
        if stored.get(key, value) != value:
            what = f"weights = {config.weights}: preprocessor_config.json has {key} = {stored[key]}"
            raise encoder_error(config, what, f"only {value} is supported: use another checkpoint")
    if WHOLE_EXTRACTOR in family.extractor_fields:
        return {WHOLE_EXTRACTOR: stored}
    return {key: stored.get(key, value) for key, value in family.extractor_fields.items()}


def _stored_extractor(config: EncoderConfig, cls: type[FeatureExtractionMixin], remedy: str) -> dict[str, Any]:
    try:
        stored, _ = cls.get_feature_extractor_dict(str(config.weights))
    except (OSError, ValueError) as error:
        what = f"weights = {config.weights}: cannot read preprocessor_config.json ({one_line(error)})"
        raise encoder_error(config, what, remedy) from error
    return dict(stored)


def _window_samples(config: EncoderConfig, family: EncoderFamily) -> int:
    """Return the length of a window in samples.

    Raises:
        UserError: If `window_sec` is not a positive whole number of frames, both at the encoder's own frame rate and at
            50 Hz.
    """
    unit = math.lcm(FRAME_SAMPLES, family.frame_samples)
    units = config.window_sec * SAMPLE_RATE / unit
    if units < 1 or abs(units - round(units)) > 1e-6:
        step = f"{unit / SAMPLE_RATE:g} s" + (" (one frame)" if unit == family.frame_samples else "")
        raise encoder_error(config, f"window_sec = {config.window_sec}", f"must be a positive multiple of {step}")
    return round(units) * unit
