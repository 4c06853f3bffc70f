"""The published architectures that `earshot import-model` reads. This module has no slow imports."""

from __future__ import annotations

PUBLISHED: dict[str, object] = {
    "qwen2_audio": "trainer.export.published.qwen2_audio:QWEN2_AUDIO",
    "ultravox": "trainer.export.published.ultravox:ULTRAVOX",
    "voxtral": "trainer.export.published.voxtral:VOXTRAL",
    "qwen3_asr": "trainer.export.published.qwen3_asr:QWEN3_ASR",
    "audioflamingo3": "trainer.export.published.audioflamingo3:AUDIO_FLAMINGO_3",
}
"""`model_type` in config.json → the architecture. An entry is an `Architecture` or a string `module:NAME`, which
is imported when it is first used. A new architecture needs one new file and one line in this table."""
