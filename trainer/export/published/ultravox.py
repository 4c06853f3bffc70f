"""Ultravox (fixie-ai/ultravox): Whisper on unpadded clips, stacks of eight frames, and SwiGLU.

Published folders contain the projector. They contain the encoder and the LLM only if these were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import AdapterConfig
from trainer.export.published.architecture import LLM_PREFIXES, Architecture, Audio, require, whisper_encoder

_TITLE = "Ultravox"


def _audio(audio: Any, config: Mapping[str, Any]) -> Audio:
    require(config, _TITLE, projector_act="swiglu", audio_latency_block_size=None)
    require(
        {"model_type": "whisper", **(config.get("audio_config") or {})}, f"{_TITLE}: audio_config", model_type="whisper"
    )
    width, frames = config.get("hidden_size", 4096), config.get("stack_factor", 8)
    # Up to version 0.4.1, the second norm follows the projector, and config.json does not have this key.
    kind = "swiglu" if config.get("projector_ln_mid", False) else "swiglu_post_norm"
    return whisper_encoder(audio, length_mode="trim"), AdapterConfig(kind, width, strides=(frames,), bias=False)


ULTRAVOX = Architecture(
    title=_TITLE,
    audio=_audio,
    prefixes=(
        ("audio_tower.", "audio.primary.encoder."),
        ("multi_modal_projector.ln_pre.", "audio.adapter.norm."),
        ("multi_modal_projector.linear_1.", "audio.adapter.linear."),
        ("multi_modal_projector.ln_mid.", "audio.adapter.mid_norm."),
        ("multi_modal_projector.linear_2.", "audio.projector."),
        ("multi_modal_projector.ln_post.", "audio.output_norm."),
        *LLM_PREFIXES,
    ),
    # The original has no special token for audio. The second and third entries are unused tokens of Llama 3 and Qwen.
    placeholders=("<|audio|>", "<|reserved_special_token_0|>", "<|object_ref_start|>"),
    template="{instruction}\n{audio}",
)
