"""The encoder families that a recipe can name.

This module has no imports, so that recipes can be read without PyTorch.
"""

from __future__ import annotations

ENCODER_FAMILIES: dict[str, object] = {
    "whisper": "model.encoders.whisper:WHISPER",
    "whisper_no_norm": "model.encoders.whisper_no_norm:WHISPER_NO_NORM",
    "hubert": "model.encoders.hubert:HUBERT",
    "wavlm": "model.encoders.wavlm:WAVLM",
    "voxtral": "model.encoders.whisper_offspring:VOXTRAL",
    "qwen2_audio": "model.encoders.whisper_offspring:QWEN2_AUDIO",
    "audioflamingo3": "model.encoders.whisper_offspring:AUDIO_FLAMINGO_3",
    "qwen3_asr": "model.encoders.qwen3_asr:QWEN3_ASR",
    "qwen3_asr_no_norm": "model.encoders.qwen3_asr_no_norm:QWEN3_ASR_NO_NORM",
    "wav2vec2": "model.encoders.wav2vec2:WAV2VEC2",
    "wav2vec2-bert": "model.encoders.wav2vec2_bert:WAV2VEC2_BERT",
    "wav2vec2-conformer": "model.encoders.wav2vec2_conformer:WAV2VEC2_CONFORMER",
    "data2vec-audio": "model.encoders.data2vec:DATA2VEC_AUDIO",
    "unispeech-sat": "model.encoders.unispeech_sat:UNISPEECH_SAT",
    "parakeet": "model.encoders.parakeet:PARAKEET",
    "ast": "model.encoders.spectrogram_transformer:AUDIO_SPECTROGRAM_TRANSFORMER",
    "auto": "model.encoders.auto:AUTO",
}
"""The encoder family for each value of `family` in recipes. An entry is an `EncoderFamily`, or a string `module:NAME`,
which is imported when it is used. Plug-ins can add entries."""
