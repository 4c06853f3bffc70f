"""Voxtral (arXiv 2507.13264): Whisper-large-v3 on whole 30 s windows, stacks of four frames, a perceptron, and Llama.

The shapes and names are those of `VoxtralForConditionalGeneration` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import AdapterConfig
from trainer.export.published.architecture import (
    LLM_PREFIXES,
    Architecture,
    Audio,
    require,
    unsupported,
    whisper_encoder,
)

_TITLE = "Voxtral"


def _audio(audio: Any, config: Mapping[str, Any]) -> Audio:
    require(config, _TITLE, projector_hidden_act="gelu")
    frames, rest = divmod(audio.encoder_ffn_dim, audio.d_model)
    if rest:
        what = f"audio_config.intermediate_size = {audio.encoder_ffn_dim}"
        raise unsupported(_TITLE, what, f"it must be a multiple of hidden_size = {audio.d_model}")
    adapter = AdapterConfig("stacking", config["text_config"]["hidden_size"], strides=(frames,), bias=False)
    return whisper_encoder(audio), adapter


VOXTRAL = Architecture(
    title=_TITLE,
    audio=_audio,
    prefixes=(
        ("audio_tower.", "audio.primary.encoder."),
        ("multi_modal_projector.linear_1.", "audio.adapter.linear."),
        ("multi_modal_projector.linear_2.", "audio.projector."),
        *LLM_PREFIXES,
    ),
    placeholders=("[AUDIO]",),
    template="[INST][BEGIN_AUDIO]{audio}{instruction}[/INST]",
    text_template="[INST]{instruction}[/INST]",
    as_chat=False,
    # A folder that has only Mistral's tekken.json does not specify these tokens.
    special_tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    audio_model_type="voxtral_encoder",
    pads_clips=True,
)
