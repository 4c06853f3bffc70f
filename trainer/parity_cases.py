"""The cases that are compared with the single-process model: a tiny model with all parts, its samples and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from model.batch import IGNORE, Sample
from model.config import AdapterConfig, EncoderConfig, LLMConfig, LoraConfig, ModelConfig, RouterConfig
from model.lengths import TokenRate
from model.llm.mixture import SCORE_BIAS
from model.llm.names import Index
from model.llm.weights import WeightSource
from model.lora import Adapters, initial_factor
from trainer.engine.optim import OptimConfig, PartConfig
from trainer.engine.stages import StageConfig, staged_optim
from trainer.parity_llms import EXPERTS, features
from trainer.scoring.tasks import TASKS

VOCAB_SIZE = 61
PLACEHOLDER = 60
SEED = 3
NUM_LAYERS = 4

DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_force_ds_cpu_optimizer": False,
    # No parameter stays gathered after its use, so that every gather is tested.
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
    },
}
"""The DeepSpeed settings of a comparison that names no file."""
OPTIM = OptimConfig(lr=2e-3, weight_decay=0.01, clip_norm=1.0, schedule="cosine", warmup_steps=2)


def drawn_factor(name: str, shape: tuple[int, int]) -> Tensor:
    """Return random initial values for factor A or B of a low-rank adapter. With B = 0, A would have no gradient."""
    values = initial_factor(f"{name}.random", shape, SEED)
    return 0.3 * values if name.endswith("lora_B") else values


def drawn_biases(name: str, num_rows: int) -> Tensor:
    """Return random biases [num_rows] that balance experts.

    If they started at zero, as usual, they would not change which experts are chosen.
    """
    return 0.05 * initial_factor(f"{name}.random", (num_rows, 1), SEED)[:, 0]


class BiasedSource:
    """The weights of `source`, in which the biases that balance experts have the values of `drawn_biases`."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.shape, self.where = source.shape, source.where

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`."""
        if not name.endswith(SCORE_BIAS):
            return self._source.read(name, index)
        shape = self.shape(name)
        assert shape is not None, name
        return drawn_biases(name, *shape)[index]


@dataclass(frozen=True)
class Learned:
    """The optimizer settings and low-rank adapters of a comparison, which determine the trained parameters."""

    optim: OptimConfig = OPTIM
    adapters: Adapters = Adapters()


ALL_WEIGHTS = Learned()


def without(learned: Learned, patterns: Sequence[str]) -> Learned:
    """Return `learned` with the parameters that match one of `patterns` frozen."""
    parts = (*learned.optim.parts, *(PartConfig(pattern, frozen=True) for pattern in patterns))
    return replace(learned, optim=replace(learned.optim, parts=parts))


ADAPTERS = Learned(
    replace(
        OPTIM,
        parts=(
            PartConfig("llm.model.embed_tokens*", frozen=True),
            PartConfig("llm.*norm*", frozen=True),
            PartConfig("audio.primary.*", frozen=True),
            PartConfig("audio.experts.hubert.encoder.*", frozen=True),
        ),
    ),
    Adapters(
        (
            LoraConfig("llm.model.layers.[012].*", rank=4, alpha=8),
            LoraConfig("llm.model.layers.[012].self_attn.k_proj", rank=2, alpha=3),
            LoraConfig("llm.model.layers.2.mlp.*", rank=3, alpha=3, train_base=True),
            LoraConfig("llm.model.layers.3.self_attn.[qv]_proj", rank=5),
            LoraConfig("llm.model.layers.3.mlp.up_proj", rank=2),
            LoraConfig("audio.primary.*.[qv]_proj", rank=3),
            LoraConfig("audio.experts.*.encoder.*", rank=2, alpha=3),
        ),
        drawn_factor,
    ),
)
"""Adapters of unequal ranks, on some projections of fused layers only, over frozen and trainable weights."""


ADAPTER_KINDS = {
    "convolutions": AdapterConfig(hidden_size=16),
    "stacked_convolutions": AdapterConfig("stacked_convolutions", 16, strides=(3, 2), normalize=True),
    "stacking": AdapterConfig("stacking", hidden_size=16, strides=(5,), normalize=True),
    "queries": AdapterConfig("queries", 16, strides=(7,), num_queries=2, num_heads=2, normalize=True),
    "pooling": AdapterConfig("pooling", 32, strides=(2,), last_group="drop"),
    "pooling_perceptron": AdapterConfig("pooling_perceptron", 16, strides=(3,)),
    "swiglu": AdapterConfig("swiglu", 16, strides=(4,), bias=False),
    "swiglu_post_norm": AdapterConfig("swiglu_post_norm", 16, strides=(4,), bias=False),
}
"""The adapters of `tiny_model` by kind. For most clips, the last group of frames is not full."""
CTC_SYMBOLS: Mapping[str, Literal["tokens", "pieces"]] = {
    "convolutions": "tokens",
    "queries": "pieces",
    "stacked_convolutions": "pieces",
}
"""The symbols of the CTC head of `tiny_model` by kind of adapter; bytes with other kinds."""
NUM_PIECES = 11
ADDING = ("pooling_perceptron", "swiglu", "swiglu_post_norm")
"""The kinds of adapters with which `tiny_model` adds the experts' features to those of the primary encoder."""


STAGED = Learned(
    staged_optim(
        replace(OPTIM, parts=(PartConfig("audio.primary.*", frozen=True),)),
        (
            StageConfig(name="connector", steps=3, train=("connector",), lr=4e-3, schedule="linear"),
            StageConfig(name="speech", steps=2, train=("connector", "encoders"), llm=False),
            StageConfig(name="all", steps=3, parts=(PartConfig("llm.*", lr=1e-3, weight_decay=0.2),)),
            StageConfig(name="encoders", steps=2, train=("connector", "encoders"), schedule="constant"),
            StageConfig(name="adapters", steps=3, train=("lora", "audio.projector.*")),
        ),
    ),
    Adapters((LoraConfig("llm.*.[qk]_proj", rank=2), LoraConfig("audio.primary.*.q_proj", rank=2)), drawn_factor),
)
"""Stages in which parts of the model are trained, then frozen, and then trained again."""


def tiny_model(llm_family: str = "llama", adapter: str = "convolutions", num_layers: int = NUM_LAYERS) -> ModelConfig:
    """Return a tiny model with all parts: a primary encoder, three unequal experts, both gates and all losses.

    Args:
        llm_family: The family of the LLM.
        adapter: The kind of the adapter.
        num_layers: The number of layers of the LLM.
    """
    conv = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, **conv}
    whisper = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    primary = EncoderConfig("whisper", "whisper", config=whisper, length_mode="trim")
    llm = {
        "model_type": llm_family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.06,
        "tie_word_embeddings": llm_family == "qwen2",
        **EXPERTS.get(llm_family, {}),
        **features(llm_family, num_layers),
    }
    losses = {"distillation": {"weight": 0.7, "temperature": 1.5}}
    if adapter != "convolutions":
        losses["next_token"] = {"length_exponent": 0.5}
    if llm_family in EXPERTS:
        losses |= {"expert_balance": {"weight": 0.5}, "router_z": {"weight": 0.2}}
    return ModelConfig(
        primary=primary if adapter != "pooling" else replace(primary, family="whisper_no_norm", length_mode="masked"),
        experts=(
            EncoderConfig("hubert", "hubert", config=small),
            EncoderConfig("wavlm", "wavlm", config=small | {"num_hidden_layers": 1}),
            EncoderConfig(
                "whisper_tiny",
                "whisper",
                config=whisper | {"encoder_layers": 1, "do_normalize": True},
                length_mode="trim",
            ),
        ),
        expert_dim=8,
        router=RouterConfig(noise_std=0.1, join="add" if adapter in ADDING else "concatenate"),
        adapter=ADAPTER_KINDS[adapter],
        llm=LLMConfig(config=llm),
        ctc_weight=0.3,
        ctc_vocabulary=CTC_SYMBOLS.get(adapter, "bytes"),
        ctc_pieces=NUM_PIECES,
        ctc_outputs=1 if adapter == "convolutions" else 2,
        ctc_feedback=adapter in ("stacking", "queries", "stacked_convolutions"),
        losses=losses,
    )


def make_sample(index: int, num_clips: int, rate: TokenRate, seed: int) -> Sample:
    """Return a sample with `num_clips` clips of 0.12 to 1 s of noise, random tokens around them, and an answer."""
    generator = torch.Generator().manual_seed(1000 * seed + index)

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    clips = tuple(0.1 * torch.randn(n, generator=generator) for n in integers(2000, 16000, num_clips))
    prompt = integers(0, PLACEHOLDER, 2 + index % 5)
    kind = (num_clips > 0, num_clips == 1)
    ids, mask = list(prompt), [False] * len(prompt)
    for clip in clips:
        audio_tokens = rate.tokens_of_samples(clip.shape[0])
        ids += [PLACEHOLDER] * audio_tokens + integers(0, PLACEHOLDER, 2)
        mask += [True] * audio_tokens + [False] * 2
    answer = integers(0, PLACEHOLDER, 2 + index % 6)
    labels = [IGNORE] * (len(ids) - 1) + answer + [1]
    return Sample(
        key=f"sample-{seed}-{index}",
        task=next(t.name for t in TASKS.values() if (t.needs_audio, t.is_transcription) == kind),
        clips=clips,
        token_ids=torch.tensor(ids + answer),
        audio_mask=torch.tensor(mask + [False] * len(answer)),
        labels=torch.tensor(labels),
        prompt_ids=torch.tensor(prompt),
        answer_text="".join(chr(65 + token % 26) for token in answer),
        pieces=torch.tensor([token % NUM_PIECES for token in answer]),
        is_transcription=num_clips == 1,
    )


def make_conversation(index: int, num_clips: int, rate: TokenRate, seed: int) -> Sample:
    """Return a sample with two turns: the first has `index % 2` clips, and the second has `num_clips` clips."""
    first, second = (make_sample(2 * index + turn, n, rate, seed) for turn, n in enumerate((index % 2, num_clips)))
    return replace(
        second,
        key=f"conversation-{seed}-{index}",
        task=next(t.name for t in TASKS.values() if t.needs_audio and not t.is_transcription),
        clips=(*first.clips, *second.clips),
        token_ids=torch.cat([first.token_ids, second.token_ids]),
        audio_mask=torch.cat([first.audio_mask, second.audio_mask]),
        labels=torch.cat([first.labels, second.labels]),
        clip_prompt_ids=tuple(turn.prompt_ids for turn in (first, second) for _ in turn.clips),
        is_transcription=False,
    )


def make_samples(kind: str, world: int, rate: TokenRate, seed: int = 0) -> list[list[Sample]]:
    """Return the samples of every rank.

    Args:
        kind: `mixed`, `text_only`, `rank_without_audio`, `fewer_samples_than_ranks`, `one_expert` or `conversations`.
        world: The number of ranks.
        rate: The adapter's rule for the number of audio tokens.
        seed: The seed of the samples.
    """
    clips_of: Mapping[str, Callable[[int, int], int]] = {
        "mixed": lambda rank, i: (1, 0, 2)[(rank + i) % 3],
        "text_only": lambda rank, i: 0,
        "rank_without_audio": lambda rank, i: 0 if rank == 0 else 1 + i % 2,
        "fewer_samples_than_ranks": lambda rank, i: 1,
        "one_expert": lambda rank, i: 1 + i % 2,
        "conversations": lambda rank, i: 1 + i % 2,
    }
    make = make_conversation if kind == "conversations" else make_sample
    num = 1 if kind == "fewer_samples_than_ranks" else max(3, 8 // world)
    ranks = range(1) if kind == "fewer_samples_than_ranks" else range(world)
    made = {r: [make(num * r + i, clips_of[kind](r, i), rate, seed) for i in range(num)] for r in ranks}
    return [made.get(rank, []) for rank in range(world)]
