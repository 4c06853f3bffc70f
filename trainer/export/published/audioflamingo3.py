"""Audio Flamingo 3 (arXiv 2507.08128): Qwen2-Audio's audio tower after further training, a perceptron, and Qwen2.

The shapes and names are those of `AudioFlamingo3ForConditionalGeneration` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import AdapterConfig
from trainer.export.published.architecture import LLM_PREFIXES, Architecture, Audio, require, whisper_encoder
from trainer.export.published.qwen2_audio import QWEN2_AUDIO

_TITLE = "Audio Flamingo 3"


def _audio(audio: Any, config: Mapping[str, Any]) -> Audio:
    require(config, _TITLE, projector_hidden_act="gelu")
    width, bias = config["text_config"]["hidden_size"], bool(config.get("projector_bias", True))
    adapter = AdapterConfig("pooling_perceptron", width, strides=(2,), bias=bias, last_group="drop")
    return whisper_encoder(audio, "whisper_no_norm", "masked"), adapter


AUDIO_FLAMINGO_3 = Architecture(
    title=_TITLE,
    audio=_audio,
    prefixes=(
        ("audio_tower.layer_norm.", "audio.adapter.norm."),
        ("audio_tower.", "audio.primary.encoder."),
        ("multi_modal_projector.linear_1.", "audio.adapter.linear."),
        ("multi_modal_projector.linear_2.", "audio.projector."),
        *LLM_PREFIXES,
    ),
    placeholders=("<sound>",),
    template="{audio}{instruction}",
    chat_template=QWEN2_AUDIO.chat_template,
    audio_model_type="audioflamingo3_encoder",
    max_windows=20,
)
