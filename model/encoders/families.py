"""The encoder families that a recipe can name. It imports nothing, so that recipes are read without PyTorch."""

from __future__ import annotations

ENCODER_FAMILIES: dict[str, object] = {
    "whisper": "model.encoders.whisper:WHISPER",
    "hubert": "model.encoders.hubert:HUBERT",
    "wavlm": "model.encoders.wavlm:WAVLM",
    "wav2vec2": "model.encoders.wav2vec2:WAV2VEC2",
    "data2vec-audio": "model.encoders.data2vec:DATA2VEC_AUDIO",
    "unispeech-sat": "model.encoders.unispeech_sat:UNISPEECH_SAT",
}
"""For each name of `family` in recipes, an `EncoderFamily` or the place of one as `module:NAME`, which is imported at
the first use. Plug-ins add entries."""
