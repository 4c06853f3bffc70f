"""The description of an encoder family, which suffices to build its encoders and to estimate their cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import FeatureExtractionMixin, PreTrainedConfig, PreTrainedModel

from model.config import EncoderConfig
from model.encoders.base import AudioEncoder
from model.encoders.families import ENCODER_FAMILIES
from model.errors import UserError
from model.lengths import FRAME_SAMPLES, Windowing
from model.table import load_entry


@dataclass(frozen=True)
class ResolvedEncoder:
    """The checked settings from which an encoder is built. The weights are not included."""

    hf_config: PreTrainedConfig
    windowing: Windowing
    length_mode: str
    """One of the family's `length_modes`."""
    do_normalize: bool
    """True if each window is normalized to zero mean and unit variance before it is encoded."""
    frame_samples: int
    """The number of audio samples between two frames of the encoder."""
    extractor: Mapping[str, Any] = field(default_factory=dict)
    """The values of the family's `extractor_fields`."""


def _no_check(_config: EncoderConfig, _hf_config: Any) -> None:
    """Accept every config."""


def _no_extractor_check(_config: EncoderConfig, _extractor: Mapping[str, Any]) -> None:
    """Accept all values."""


def _no_features(_hf_config: Any) -> Mapping[str, Any]:
    """Return nothing, so that a checkpoint's preprocessor_config.json is not checked."""
    return {}


def _no_notes(_resolved: ResolvedEncoder) -> list[str]:
    """Return no notes."""
    return []


def _never(_hf_config: Any) -> bool:
    """Return False, since the encoder expects waveforms without normalization."""
    return False


@dataclass(frozen=True)
class EncoderFamily:
    """The properties that distinguish one encoder family from another.

    A family consists of one instance of this class at the end of the family's file, and one line in `ENCODER_FAMILIES`
    (`model/encoders/families.py`). `docs/extending.md` shows how to add a family.
    """

    config_class: type[PreTrainedConfig] | None
    """The transformers config. It must define `hidden_size` (the width of a feature vector) and `num_hidden_layers`.
    Its `model_type` must equal the `model_type` in the config.json of checkpoints. If it is None, the `model_type` of
    the checkpoint or of the recipe's `config` determines the class."""
    network: Callable[[Any], PreTrainedModel]
    """The class of the network, which is built from a `config_class` and loads checkpoints with `from_pretrained`."""
    wrapper: Callable[[Any, ResolvedEncoder], AudioEncoder]
    """A function that wraps a network in an `AudioEncoder`."""
    windowing: Callable[[EncoderConfig, Any, int], Windowing]
    """A function of the recipe's fields, the transformers config and the length of a window in samples, which returns
    the rule by which the encoder cuts and pads clips. It raises `encoder_error` if the window is impossible."""
    flops: Callable[[Any, int], float] | None
    """A function of the transformers config and the padded length of a window in samples, which estimates the window's
    forward FLOPs. A multiply-add counts as two. Work is divided among ranks by this estimate. None if `flops_of` is
    set."""
    frame_samples: int = FRAME_SAMPLES
    """The number of audio samples between two frames: 320 for 50 Hz, 640 for 25 Hz. `AudioEncoder` brings frames to 50
    Hz."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Config fields that get these values unless the recipe sets them, even if a checkpoint has different values. They
    should include dropout and masking, since a checkpoint's config describes its pre-training."""
    check: Callable[[EncoderConfig, Any], None] = _no_check
    """A function that raises `encoder_error` if the network does not support a setting of the transformers config."""
    length_modes: tuple[str, ...] = ("full",)
    """The valid values of the recipe field `length_mode`."""
    normalizes: Callable[[Any], bool] | None = _never
    """A function that returns the default of `do_normalize` for a transformers config without a checkpoint. If it is
    None, the family has no such option, and setting `do_normalize` is an error."""
    feature_extractor: type[FeatureExtractionMixin] | None = None
    """The transformers class whose preprocessor_config.json specifies whether a checkpoint needs `do_normalize`. If it
    is None, checkpoints have no such file, and `normalizes` determines the value."""
    features: Callable[[Any], Mapping[str, Any]] = _no_features
    """A function that returns the fields and values that preprocessor_config.json must have for a transformers config.
    If there are any, a checkpoint must have this file, because it describes the features that the network was trained
    on."""
    extractor_fields: Mapping[str, Any] = field(default_factory=dict)
    """The fields of preprocessor_config.json that change features and that a recipe can set in `config`, with the
    values that they have without a checkpoint."""
    check_extractor: Callable[[EncoderConfig, Mapping[str, Any]], None] = _no_extractor_check
    """A function that raises `encoder_error` if a value of `extractor_fields`, from a checkpoint or the recipe, is
    invalid."""
    containers: Mapping[str, str] = field(default_factory=dict)
    """Larger models whose checkpoints contain the encoder. For each `model_type`, the value is the field of the larger
    model's config.json that describes the encoder."""
    flops_of: Callable[[ResolvedEncoder], Callable[[int], float]] | None = None
    """A function that returns an estimator of the FLOPs of a padded window, which is based on measurements. None if
    `flops` is used."""
    notes: Callable[[ResolvedEncoder], list[str]] = _no_notes
    """A function that returns notes about an encoder that the user should read before training begins."""
    gathers_per_module: bool = True
    """False if one call may call modules several times or read parameters of child modules. Such an encoder cannot be
    trained with `train.gather_audio_weights: per_module`."""
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions for the names of a checkpoint's tensors, and their replacements. They are needed if the
    checkpoint contains more than the network, or uses different names."""


def family_of(config: EncoderConfig) -> EncoderFamily:
    """Return the encoder family to which `config.family` refers.

    Raises:
        UserError: If no family has this name.
    """
    if config.family not in ENCODER_FAMILIES:
        raise encoder_error(config, f"family = {config.family}", f"choose one of {', '.join(ENCODER_FAMILIES)}")
    family = load_entry(ENCODER_FAMILIES[config.family])
    assert isinstance(family, EncoderFamily), f"the entry of {config.family} in ENCODER_FAMILIES is {family!r}"
    return family


def encoder_error(config: EncoderConfig, what: str, remedy: str) -> UserError:
    """Return the error for an encoder.

    Args:
        config: The encoder.
        what: The problem, with the field and its value.
        remedy: The action that solves the problem.
    """
    return UserError(f"encoder {config.name or config.family!r}: {what}; {remedy}")


def one_line(error: Exception) -> str:
    """Return the message of a library's exception on one line, cut after 300 characters."""
    return " ".join(str(error).split())[:300]
