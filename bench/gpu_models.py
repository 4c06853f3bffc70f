"""The models and samples of `bench.gpu_check`, with real layer shapes for a GPU and small shapes for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.batch import IGNORE, Sample
from model.config import EncoderConfig, LLMConfig, ModelConfig
from model.lengths import TokenRate, num_samples
from trainer import parity_cases
from trainer.scoring.tasks import TASKS

FAMILIES = ("whisper", "hubert", "wavlm")


@dataclass(frozen=True)
class Sizes:
    """The sizes of the models and samples."""

    llm: Mapping[str, Any]
    """The config of the LLM without the number of layers and the vocabulary size."""
    encoders: Mapping[str, Mapping[str, Any]]
    """The config of an encoder's layers, by family."""
    clip_sec: float
    """The length of a clip in seconds. Whisper pads it to 30 s."""
    num_clips: int
    tokens: int
    """The number of tokens in a packed sequence for the measurements of the LLM."""
    rounds: tuple[int, int]
    """The number of warm-up calls, and the number of measured calls."""

    def encoder(self, family: str, layers: int) -> EncoderConfig:
        """Return the config of an encoder with the given number of layers."""
        key = "encoder_layers" if family == "whisper" else "num_hidden_layers"
        config = {**self.encoders[family], key: layers}
        return EncoderConfig(family, family, config=config, length_mode="full")

    def model(self, families: tuple[str, ...], llm_layers: int, encoder_layers: int = 1) -> ModelConfig:
        """Return a model whose first encoder is the primary encoder and whose other encoders are experts."""
        first, *others = (self.encoder(family, encoder_layers) for family in families)
        config = {**self.llm, "num_hidden_layers": llm_layers, "vocab_size": parity_cases.VOCAB_SIZE}
        tiny = parity_cases.tiny_model()
        return replace(
            tiny, primary=first, experts=tuple(others), llm=LLMConfig(config=config), losses={}, ctc_weight=0.3
        )


_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "initializer_range": 0.02}
REAL = Sizes(
    # Llama-3-8B, Whisper-large-v3, HuBERT-large and WavLM-large
    llm={
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    encoders={
        "whisper": {"num_mel_bins": 128, "d_model": 1280, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
        "hubert": {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
            "conv_bias": True,
        },
        "wavlm": {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
        },
    },
    clip_sec=30.0,
    num_clips=4,
    tokens=8192,
    rounds=(3, 5),
)
_CONV = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, **_CONV}
SMALL = Sizes(
    llm={
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    encoders={
        "whisper": {"num_mel_bins": 80, "d_model": 16, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        "hubert": _SMALL,
        "wavlm": _SMALL,
    },
    clip_sec=1.0,
    num_clips=1,
    tokens=128,
    rounds=(1, 1),
)


def audio_sample(sizes: Sizes, index: int, rate: TokenRate) -> Sample:
    """Return a transcription sample with one clip of noise. Clips differ in length by a few percent."""
    generator = torch.Generator().manual_seed(index)
    clip = 0.1 * torch.randn(num_samples(sizes.clip_sec) - 777 * index, generator=generator)
    count = rate.tokens_of_samples(clip.shape[0])
    answer = torch.randint(0, parity_cases.PLACEHOLDER, (12,), generator=generator)
    prompt = torch.arange(3)
    ids = torch.cat([prompt, torch.full((count,), parity_cases.PLACEHOLDER), answer])
    return replace(
        _sample(f"audio-{index}", ids, answer, prompt),
        task="asr",
        clips=(clip,),
        audio_mask=(torch.arange(len(ids)) >= 3) & (torch.arange(len(ids)) < 3 + count),
        is_transcription=True,
    )


def text_sample(index: int, num_tokens: int) -> Sample:
    """Return a sample without audio."""
    ids = torch.randint(0, parity_cases.PLACEHOLDER, (num_tokens,), generator=torch.Generator().manual_seed(index))
    return _sample(f"text-{index}", ids, ids[num_tokens // 2 :], ids[: num_tokens // 2])


def _sample(key: str, ids: torch.Tensor, answer: torch.Tensor, prompt: torch.Tensor) -> Sample:
    rest = len(ids) - len(answer) - 1
    labels = torch.cat([torch.full((rest,), IGNORE), answer, torch.ones(1, dtype=torch.int64)])
    task = next(t.name for t in TASKS.values() if not t.needs_audio)
    return Sample(key, task, (), ids, torch.zeros(len(ids), dtype=torch.bool), labels, prompt)
