"""Qwen2-Audio (arXiv 2407.10759): Whisper-large-v3 with frames averaged in pairs, one linear layer, and Qwen2.

The shapes and names are those of `Qwen2AudioForConditionalGeneration` in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import AdapterConfig
from trainer.export.published.architecture import LLM_PREFIXES, Architecture, Audio, whisper_encoder

_CHAT = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that produces the same prompts as `Qwen2AudioProcessor.default_chat_template` for text messages."""


def _audio(audio: Any, _config: Mapping[str, Any]) -> Audio:
    adapter = AdapterConfig("pooling", audio.d_model, strides=(2,), last_group="drop")
    return whisper_encoder(audio, "whisper_no_norm", "masked"), adapter


QWEN2_AUDIO = Architecture(
    title="Qwen2-Audio",
    audio=_audio,
    prefixes=(
        ("audio_tower.layer_norm.", "audio.adapter.norm."),
        ("audio_tower.", "audio.primary.encoder."),
        ("multi_modal_projector.linear.", "audio.projector."),
        *LLM_PREFIXES,
    ),
    placeholders=("<|AUDIO|>",),
    template="Audio 1: <|audio_bos|>{audio}<|audio_eos|>\n{instruction}",
    chat_template=_CHAT,
    audio_model_type="qwen2_audio_encoder",
)
