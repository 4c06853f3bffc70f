"""The published architectures that `earshot import-model` reads. This module imports nothing slow."""

from __future__ import annotations

PUBLISHED: dict[str, object] = {
    "qwen2_audio": "trainer.export.published.qwen2_audio:QWEN2_AUDIO",
    "ultravox": "trainer.export.published.ultravox:ULTRAVOX",
    "voxtral": "trainer.export.published.voxtral:VOXTRAL",
    "audioflamingo3": "trainer.export.published.audioflamingo3:AUDIO_FLAMINGO_3",
}
"""The architectures by the `model_type` of their config.json: an `Architecture`, or its place as `module:NAME`, which
is imported at the first use. A new one is one file and one line here."""
