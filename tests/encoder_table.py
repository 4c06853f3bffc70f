"""The table of encoder families. Each case has a tiny model and computes a clip's features with transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    LasrEncoder,
    LasrFeatureExtractor,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    SeamlessM4TFeatureExtractor,
    SEWForCTC,
    UniSpeechForCTC,
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperFeatureExtractor,
)

from model.config import EncoderConfig, ModelConfig
from tests.encoder_references import (
    of_chunks,
    of_lasr,
    of_mel,
    of_parakeet,
    of_patches,
    of_repeated_chunks,
    of_tower,
    of_waveform,
)
from trainer.parity_cases import tiny_model

WINDOW_SEC = 2.0


@dataclass(frozen=True)
class Case:
    """One variant of an encoder family."""

    family: str
    config: Mapping[str, Any]
    """Fields of the family's transformers config."""
    published: Callable[[dict[str, Any]], Any]
    """A function that builds, from `config`, a model of the transformers class in which checkpoints are published. The
    model may contain more than the encoder."""
    extractor: Callable[[], Any]
    """A function that returns transformers' feature extractor."""
    reference: Callable[[Any, Any, Tensor], Tensor]
    """A function that computes the features [E, D] of one clip from the published model and the extractor."""
    window_sec: float = WINDOW_SEC
    frame_samples: int = 320

    def encoder(self, name: str = "ear", **fields: Any) -> EncoderConfig:
        """Return the recipe's config for the encoder, with random weights unless `fields` say otherwise."""
        values = {"config": dict(self.config), "window_sec": self.window_sec, **fields}
        return EncoderConfig(name, self.family, **values)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
STACK: dict[str, Any] = {
    **SMALL,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
LARGE: dict[str, Any] = {**STACK, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
CTC: dict[str, Any] = {"vocab_size": 8, "pad_token_id": 0}


def ctc(model: Any, config: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a builder of a CTC model. Fine-tuned checkpoints are published in this form."""
    return lambda fields: model(config(**fields, **CTC))


BERT = ctc(Wav2Vec2BertForCTC, Wav2Vec2BertConfig)


def bert(positions: str | None) -> Case:
    """Return the case of wav2vec2-BERT with one kind of position embedding.

    The maximum learned distances are small, so that the test clips also contain larger distances, which are clamped.
    """
    fields = {"left_max_position_embeddings": 8, "right_max_position_embeddings": 3, "conv_depthwise_kernel_size": 5}
    fields |= {"feature_projection_input_dim": 80, "position_embeddings_type": positions}
    config = {**SMALL, **fields}
    extractor = partial(SeamlessM4TFeatureExtractor, feature_size=40, num_mel_bins=40)
    return Case("wav2vec2-bert", config, BERT, extractor, of_mel("wav2vec2_bert"))


def normalizing(do_normalize: bool) -> Callable[[], Any]:
    """Return a builder of the extractor for models that read waveforms."""
    return lambda: Wav2Vec2FeatureExtractor(do_normalize=do_normalize)


WAV2VEC2 = ctc(Wav2Vec2ForCTC, Wav2Vec2Config)
UNISPEECH = ctc(UniSpeechSatForCTC, UniSpeechSatConfig)
DATA2VEC = ctc(Data2VecAudioForCTC, Data2VecAudioConfig)
POSITIONS = {**STACK, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7}
TOWER: dict[str, Any] = {"num_mel_bins": 80, "max_source_positions": 100}
QWEN: dict[str, Any] = {
    **TOWER,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
}
QWEN3: dict[str, Any] = {
    **{key: QWEN[key] for key in QWEN if key != "max_source_positions"},
    "downsample_hidden_size": 8,
    "output_dim": 16,
    "n_window_infer": 200,
}
LLM: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}


def tower(model: Any, config: Any) -> Callable[[dict[str, Any]], Any]:
    """Return a builder of a speech LLM whose audio tower has the fields of the case."""
    return lambda fields: model(config(audio_config=fields, text_config=LLM))


def fast_conformer(fields: dict[str, Any]) -> Any:
    """Return a Parakeet in its published form, which is a CTC model."""
    return ParakeetForCTC(ParakeetCTCConfig(encoder_config=fields, **CTC))


PARAKEET: dict[str, Any] = {**SMALL, "subsampling_conv_channels": 8, "num_mel_bins": 40, "conv_kernel_size": 5}
SPECTROGRAM: dict[str, Any] = {**SMALL, "num_mel_bins": 40, "max_length": 200}
SOUNDS = partial(ASTFeatureExtractor, num_mel_bins=40, max_length=200, mean=-3.5, std=3.0)
CONFORMER: dict[str, Any] = {
    **SMALL,
    "conv_dim": [16] * 7,
    "conv_depthwise_kernel_size": 5,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}
FAIRSEQ = ctc(Wav2Vec2ConformerForCTC, Wav2Vec2ConformerConfig)


def automatic(model: Any, fields: Mapping[str, Any], extractor: Any, reference: Any) -> Case:
    """Return a case of the family `auto`. `reference` must return features at 50 Hz."""
    config = {**fields, "model_type": model.config_class.model_type, "extractor": extractor.to_dict()}

    def published(given: dict[str, Any]) -> Any:
        own = {k: v for k, v in given.items() if k not in ("model_type", "extractor")}
        return model(model.config_class(**own))

    return Case("auto", config, published, lambda: extractor, reference)


SQUEEZED = {**STACK, "conv_dim": [16] * 13}
AUTOMATIC = {
    "auto_sew": automatic(
        SEWForCTC, {**SQUEEZED, **CTC}, Wav2Vec2FeatureExtractor(return_attention_mask=True), of_waveform("sew")
    ),
    "auto_unispeech": automatic(
        UniSpeechForCTC,
        {**LARGE, **CTC},
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
        of_waveform("unispeech"),
    ),
    "auto_lasr": automatic(
        LasrEncoder,
        {**SMALL, "subsampling_conv_channels": 8, "num_mel_bins": 40, "conv_kernel_size": 8},
        LasrFeatureExtractor(feature_size=40),
        of_lasr,
    ),
}
MEL = partial(WhisperFeatureExtractor, feature_size=80, chunk_length=2)
CASES: dict[str, Case] = {
    **AUTOMATIC,
    "voxtral": Case(
        "voxtral", {**SMALL, **TOWER}, tower(VoxtralForConditionalGeneration, VoxtralConfig), MEL, of_tower
    ),
    "qwen2_audio": Case(
        "qwen2_audio",
        QWEN,
        tower(Qwen2AudioForConditionalGeneration, Qwen2AudioConfig),
        MEL,
        of_tower,
        frame_samples=640,
    ),
    "audioflamingo3": Case(
        "audioflamingo3",
        {**SMALL, **TOWER},
        tower(AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Config),
        MEL,
        of_tower,
        frame_samples=640,
    ),
    "qwen3_asr": Case(
        "qwen3_asr",
        QWEN3,
        tower(Qwen3ASRForConditionalGeneration, Qwen3ASRConfig),
        partial(Qwen3ASRFeatureExtractor, feature_size=80),
        of_chunks,
    ),
    "qwen3_asr_no_norm": Case(
        "qwen3_asr_no_norm",
        QWEN3,
        tower(Qwen3ASRForConditionalGeneration, Qwen3ASRConfig),
        partial(Qwen3ASRFeatureExtractor, feature_size=80),
        of_repeated_chunks,
    ),
    "wav2vec2_base": Case("wav2vec2", STACK, WAV2VEC2, normalizing(False), of_waveform("wav2vec2")),
    "wav2vec2_large": Case("wav2vec2", LARGE, WAV2VEC2, normalizing(True), of_waveform("wav2vec2")),
    "wav2vec2_mixed": Case(
        "wav2vec2",
        {**STACK, "do_stable_layer_norm": True},
        WAV2VEC2,
        normalizing(True),
        of_waveform("wav2vec2"),
    ),
    "unispeech_sat_base": Case("unispeech-sat", STACK, UNISPEECH, normalizing(False), of_waveform("unispeech_sat")),
    "unispeech_sat_large": Case("unispeech-sat", LARGE, UNISPEECH, normalizing(True), of_waveform("unispeech_sat")),
    "wav2vec2_bert": bert("relative_key"),
    "wav2vec2_bert_relative": bert("relative"),
    "wav2vec2_bert_rotary": bert("rotary"),
    "wav2vec2_conformer": Case(
        "wav2vec2-conformer", CONFORMER, FAIRSEQ, normalizing(True), of_waveform("wav2vec2_conformer")
    ),
    "wav2vec2_conformer_rotary": Case(
        "wav2vec2-conformer",
        {**CONFORMER, "position_embeddings_type": "rotary"},
        FAIRSEQ,
        normalizing(True),
        of_waveform("wav2vec2_conformer"),
    ),
    "parakeet": Case(
        "parakeet",
        PARAKEET,
        fast_conformer,
        partial(ParakeetFeatureExtractor, feature_size=40),
        of_parakeet,
        window_sec=2.0,
        frame_samples=1280,
    ),
    "ast": Case(
        "ast",
        SPECTROGRAM,
        lambda fields: ASTForAudioClassification(ASTConfig(**fields)),
        SOUNDS,
        of_patches,
        frame_samples=1600,
    ),
    "data2vec": Case("data2vec-audio", POSITIONS, DATA2VEC, normalizing(True), of_waveform("data2vec_audio")),
}


def clip(samples: int, seed: int = 0) -> Tensor:
    """Return noise with an offset and a growing tone, so that a test notices if a norm includes padding."""
    noise = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    return noise + 0.05 + 0.2 * torch.sin(torch.arange(samples) * 0.05) * (torch.arange(samples) / 20_000)


def perturb(module: torch.nn.Module) -> None:
    """Change weights and running statistics at random, so that no zero bias or unit gain hides a mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_positions" not in name:
                parameter += (0.05 if parameter.dim() > 1 else 0.1) * torch.randn(parameter.shape, generator=generator)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
            if name.endswith("running_var"):
                buffer += 0.5 * torch.rand(buffer.shape, generator=generator)


def model_of(names: Sequence[str]) -> ModelConfig:
    """Return the tiny model with the encoders of these cases as its experts. Every expert encodes every clip."""
    model = tiny_model()
    experts = tuple(CASES[name].encoder(name) for name in names)
    return replace(model, experts=experts, router=replace(model.router, top_k=len(experts)))


def one_per_family() -> list[str]:
    """Return the name of the first case of each family."""
    return list({case.family: name for name, case in reversed(CASES.items())}.values())[::-1]
