"""The encoder families that a recipe can name. It imports nothing, so that recipes are read without PyTorch."""

from __future__ import annotations

ENCODER_FAMILIES: dict[str, object] = {
    "whisper": "model.encoders.whisper:WHISPER",
    "hubert": "model.encoders.hubert:HUBERT",
    "wavlm": "model.encoders.wavlm:WAVLM",
}
"""For each name of `family` in recipes, an `EncoderFamily` or the place of one as `module:NAME`, which is imported at
the first use. Plug-ins add entries."""
