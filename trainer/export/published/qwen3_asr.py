"""Qwen3-ASR: the audio encoder of Qwen3-Omni (arXiv 2509.17765) on chunks of 1 s, a perceptron, and Qwen3.

The shapes and names are those of `Qwen3ASRForConditionalGeneration` in transformers, such as in Qwen3-ASR-1.7B-hf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import AdapterConfig, EncoderConfig
from trainer.export.published.architecture import Architecture, Audio, unsupported

_TITLE = "Qwen3-ASR"
_LONGEST_SEC = 1200.0
"""The length of the longest clip. The encoder reads a clip as one window."""


def _audio(audio: Any, config: Mapping[str, Any]) -> Audio:
    width = config["text_config"]["hidden_size"]
    if audio.activation_function != "gelu":
        raise unsupported(_TITLE, f"activation_function = {audio.activation_function!r}", "only 'gelu' is supported")
    if audio.output_dim != width:
        raise unsupported(_TITLE, f"audio_config.output_dim = {audio.output_dim}", f"the LLM's hidden_size is {width}")
    keys: tuple[str, ...] = (
        "num_mel_bins",
        "d_model",
        "encoder_layers",
        "encoder_attention_heads",
        "encoder_ffn_dim",
        "activation_function",
        "n_window",
        "n_window_infer",
        "downsample_hidden_size",
        "max_position_embeddings",
    )
    fields = {key: getattr(audio, key) for key in keys}
    encoder = EncoderConfig("qwen3_asr", "qwen3_asr_no_norm", config=fields, window_sec=_LONGEST_SEC)
    # A chunk of 2 · n_window mel frames has n_window frames of 20 ms, which the encoder joins in groups of four.
    adapter = AdapterConfig("pooling_perceptron", audio.d_model, strides=(4,), block_frames=audio.n_window)
    return encoder, adapter


QWEN3_ASR = Architecture(
    title=_TITLE,
    audio=_audio,
    prefixes=(
        ("model.audio_tower.ln_post.", "audio.adapter.norm."),
        ("model.audio_tower.", "audio.primary.encoder."),
        ("model.multi_modal_projector.linear_1.", "audio.adapter.linear."),
        ("model.multi_modal_projector.linear_2.", "audio.projector."),
        ("model.language_model.", "llm.model."),
        ("lm_head.", "llm.lm_head."),
    ),
    placeholders=("<|audio_pad|>",),
    template="<|audio_start|>{audio}<|audio_end|>{instruction}",
    audio_model_type="qwen3_asr_encoder",
    is_named_as_in_transformers=True,
    min_audio_sec=0.5,
)
