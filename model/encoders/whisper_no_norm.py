"""Whisper's encoder without its last LayerNorm, which Qwen2-Audio and Audio Flamingo 3 apply after their pooling."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import WhisperConfig

from model.encoders.whisper import WHISPER, RaggedWhisperEncoder


class UnnormedWhisperEncoder(RaggedWhisperEncoder):
    """A `RaggedWhisperEncoder` without the norm of the output."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__(config)
        self.layer_norm = nn.Identity()  # type: ignore[assignment]


WHISPER_NO_NORM = replace(WHISPER, network=UnnormedWhisperEncoder)
