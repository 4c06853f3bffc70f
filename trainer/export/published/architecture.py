"""The description of a published architecture: the conversion of its config, tensor names and prompt to earshot's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model.config import AdapterConfig, EncoderConfig
from model.errors import UserError
from model.lengths import FRAME_SAMPLES, SAMPLE_RATE

Audio = tuple[EncoderConfig, AdapterConfig]
"""The primary encoder and the adapter."""


@dataclass(frozen=True)
class Architecture:
    """The properties that distinguish one published architecture from another.

    To add an architecture, create one value of this class in a separate file, and add one line to `PUBLISHED`.
    """

    title: str
    """The name of the architecture in messages."""
    audio: Callable[[Any, Mapping[str, Any]], Audio]
    """A function that returns the encoder and the adapter, given the audio tower's transformers config and the content
    of config.json. It raises the error of `unsupported` if the model computes something that earshot does not."""
    prefixes: tuple[tuple[str, str], ...]
    """Pairs of a prefix of published tensor names and the prefix of earshot's names; the first match applies."""
    placeholders: tuple[str, ...]
    """The tokens that may stand for audio. The first one that the tokenizer has is used."""
    template: str
    """The prompt of samples with audio, with `{audio}` and `{instruction}`."""
    text_template: str = "{instruction}"
    """The prompt of samples without audio."""
    as_chat: bool = True
    """True if prompts are wrapped in the chat template."""
    chat_template: str | None = None
    """The chat template of models whose folder has none. If it is None and `as_chat` is true, the folder must have
    one."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """The special tokens, such as `eos_token`, for a tokenizer whose files do not specify them."""
    audio_model_type: str = "whisper"
    """The `model_type` of the audio tower's config, which is used if `audio_config` in config.json has none."""
    pads_clips: bool = False
    """True if clips shorter than a window of the encoder are padded with silence to a whole window."""
    is_named_as_in_transformers: bool = False
    """True if published tensors have the names of transformers 5's modules; False if they have the earlier names."""
    min_audio_sec: float = 0.0
    """The length in seconds to which shorter clips are padded with silence. It is ignored if `pads_clips` is true."""
    max_windows: int = 1
    """The maximum length of a clip that the original model accepts, in windows of the encoder."""

    def own_name(self, name: str) -> str | None:
        """Return earshot's name of a published tensor, or None if earshot does not have this tensor."""
        if not self.is_named_as_in_transformers:
            name = _as_published(name)
        for published, own in self.prefixes:
            if name.startswith(published):
                return own + name.removeprefix(published)
        return None

    def published_name(self, name: str) -> str | None:
        """Return the published name of a tensor of earshot, or None if there is none.

        This is the inverse of `own_name`.
        """
        for published, own in self.prefixes:
            candidate = published + name.removeprefix(own)
            if name.startswith(own) and self.own_name(candidate) == name:
                return candidate
        return None


LLM_PREFIXES = (("language_model.", "llm."),)
"""The prefix of the LLM's tensors in most architectures."""


def whisper_encoder(
    audio: Any, family: str = "whisper", length_mode: str = "full", name: str = "whisper"
) -> EncoderConfig:
    """Return the encoder of a model whose audio tower is Whisper's.

    Args:
        audio: The transformers config of the tower.
        family: The encoder family.
        length_mode: The padding of windows; see `EncoderConfig.length_mode`.
        name: The name of the encoder.
    """
    keys = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    config = {key: getattr(audio, key) for key in (*keys, "max_source_positions", "activation_function")}
    seconds = audio.max_source_positions * FRAME_SAMPLES / SAMPLE_RATE
    return EncoderConfig(name, family, config=config, length_mode=length_mode, window_sec=seconds)  # type: ignore[arg-type]


def require(config: Mapping[str, Any], title: str, **wanted: Any) -> None:
    """Check fields of config.json.

    Args:
        config: The content of config.json.
        title: The name of the architecture.
        wanted: The only supported value of each field. An absent field is accepted.

    Raises:
        UserError: If a field has a different value.
    """
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise unsupported(title, f"{key} = {config[key]!r}", f"only {value!r} is supported")


def unsupported(title: str, what: str, remedy: str) -> UserError:
    """Return the error for a model that computes something that earshot does not."""
    return UserError(f"config.json: {title}: {what}; {remedy}")


def _as_published(name: str) -> str:
    """Return a tensor's name in published checkpoints, given this name or its name in the modules of transformers 5."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return name.removeprefix("model.")
