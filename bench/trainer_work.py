"""The model, data, clocks and settings of the variants (arms) of `bench.trainer`."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.loader_corpus import KIT
from model.batch import IGNORE, Sample
from model.config import AdapterConfig, EncoderConfig, LLMConfig, ModelConfig, RouterConfig, RoutingLossConfig
from model.lengths import num_samples
from trainer.engine.optim import OptimConfig

DS_CONFIG = Path(__file__).parent.parent / "ds_configs" / "zero3_cpu.json"
KIT_QUANTILES_SEC = (
    0.16, 0.31, 0.38, 0.43, 0.49, 0.67, 1.48, 1.89, 1.92, 2.07, 2.3, 2.56, 2.79, 3.01, 3.3, 3.83, 4.0, 5.0, 5.0, 5.0,
    12.5,
)  # fmt: skip
"""The durations of the kit's 4,608 training samples at every fifth percentile, from minimum to maximum; used on
machines without the kit."""
VOCAB_SIZE = 4096
PROMPT_TOKENS, ANSWER_TOKENS = 10, (2, 11)
"""The number of tokens before the audio, and the range of the number of tokens in an answer (upper bound exclusive).
Samples of the kit have 16 text tokens on average."""
OPTIM = OptimConfig(lr=1e-4, weight_decay=0.0, schedule="constant")


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model and of the work."""

    width: int = 256
    """The width of every encoder."""
    layers: int = 4
    """The number of layers of every encoder."""
    llm_width: int = 512
    llm_layers: int = 9
    global_batch: int = 32
    """The number of clips per update."""
    updates: int = 2
    """The number of timed updates, which follow one warm-up update."""


TINY = Sizes(width=32, layers=1, llm_width=32, llm_layers=2, global_batch=8, updates=1)
"""Sizes for a test."""


@dataclass(frozen=True)
class Setting:
    """An arm with its settings."""

    kind: str
    """`earshot`, or the order of clips in an arm that uses Trainer: `padded` (random), `grouped` or `balanced`."""
    micro: int = 8
    """The number of clips per micro-batch and rank in the arms that use transformers' Trainer (the peers). For
    `balanced`, it is the mean."""
    persistent: int = 10**6
    """The peer's `stage3_param_persistence_threshold`. Smaller parameters are not partitioned among ranks."""
    tensor: int = 1
    """Earshot's `parallel.tensor`."""
    expert: int = 1
    """Earshot's `parallel.expert`."""
    pack_tokens: int = 512
    """Earshot's `train.llm_tokens_per_microbatch`."""
    recompute_calls: bool = False
    """Earshot's `train.recompute_encoder_calls`."""


class Stopwatch:
    """Clocks on all ranks. An arm starts the clocks after its first update."""

    def __init__(self) -> None:
        self._start_sec = self._start_cpu_sec = 0.0

    def start(self) -> None:
        """Start the clocks.

        Collective: every rank of the world must call it.
        """
        dist.barrier()
        self._start_sec, self._start_cpu_sec = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, Any]:
        """Return the wall time, the CPU time of all ranks, and the largest peak memory of a rank.

        Times are in seconds since `start`. The peak memory is in MiB since the start of the process.

        Collective: every rank of the world must call it.
        """
        cpu_sec = time.process_time() - self._start_cpu_sec
        dist.barrier()
        sec = time.perf_counter() - self._start_sec
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        most, total = torch.tensor([sec, peak_mib]), torch.tensor([cpu_sec])
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
        return {"sec": float(most[0]), "cpu_sec": float(total), "peak_mib": float(most[1])}


def model_config(sizes: Sizes) -> ModelConfig:
    """Return a model with a primary encoder, four encoder experts of the same size, and a Llama.

    By default, the encoders have 20 M parameters in total and the LLM has 31 M, about the same ratio as for five
    encoders the size of Whisper-medium and an LLM with 2 to 3 billion parameters.
    """
    width = sizes.width
    whisper = {
        "d_model": width,
        "encoder_ffn_dim": 4 * width,
        "encoder_attention_heads": 4,
        "encoder_layers": sizes.layers,
    }
    stack = {
        # As in trainer/recipes/kit_cpu.yaml. The seven published convolutions would account for most of the time.
        "conv_dim": [48] * 4,
        "conv_stride": [20, 4, 2, 2],
        "conv_kernel": [40, 8, 4, 4],
        "hidden_size": width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "num_conv_pos_embeddings": 9,
        "num_conv_pos_embedding_groups": 1,
    }
    llm = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": sizes.llm_width,
        "intermediate_size": sizes.llm_width * 11 // 4,
        "num_hidden_layers": sizes.llm_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }

    def encoder(name: str, family: str, config: dict[str, Any]) -> EncoderConfig:
        return EncoderConfig(name, family, config=config, length_mode="trim" if family == "whisper" else "full")

    return ModelConfig(
        primary=encoder("whisper", "whisper", whisper),
        experts=(
            encoder("hubert", "hubert", stack),
            encoder("wavlm", "wavlm", stack),
            encoder("wav2vec2", "wav2vec2", stack),
            encoder("whisper_2", "whisper", whisper),
        ),
        expert_dim=width,
        router=RouterConfig(top_k=1),
        # The routing loss is a function of the global batch, but Trainer computes losses per micro-batch.
        routing_loss=RoutingLossConfig(weight=0.0),
        adapter=AdapterConfig(hidden_size=2 * width),
        llm=LLMConfig(config=llm),
    )


def durations(num: int, seed: int) -> list[float]:
    """Return random durations of the kit's training clips in seconds.

    Without the kit, they are drawn from its quantiles.
    """
    rng, seconds = np.random.default_rng(seed), []
    for path in sorted(KIT.glob("*.jsonl")):
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        seconds += [float(r["duration"]) for r in rows if r["split"] == "train" and isinstance(r["audio"], str)]
    if seconds:
        return rng.choice(seconds, num).tolist()
    at = np.linspace(0, 1, len(KIT_QUANTILES_SEC))
    return np.interp(rng.random(num), at, KIT_QUANTILES_SEC).tolist()


def draw_samples(sizes: Sizes, seed: int = 0) -> list[Sample]:
    """Return the samples of all updates. Each has a clip of noise and random tokens."""
    rate, num = model_config(sizes).adapter.rate, (1 + sizes.updates) * sizes.global_batch
    generator, found = torch.Generator().manual_seed(seed), []
    for number, seconds in enumerate(durations(num, seed)):
        clip = 0.1 * torch.randn(num_samples(seconds), generator=generator)
        audio_tokens = rate.tokens_of_samples(len(clip))
        answer_tokens = int(torch.randint(*ANSWER_TOKENS, (), generator=generator))
        text = torch.randint(1, VOCAB_SIZE, (PROMPT_TOKENS + answer_tokens,), generator=generator)
        ids = torch.cat([text[:PROMPT_TOKENS], torch.zeros(audio_tokens, dtype=torch.int64), text[PROMPT_TOKENS:]])
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[PROMPT_TOKENS : PROMPT_TOKENS + audio_tokens] = True
        labels = torch.full_like(ids, IGNORE)
        labels[-1 - answer_tokens : -1] = text[PROMPT_TOKENS:]
        found.append(Sample(f"{number}", "asr", (clip,), ids, mask, labels, text[:PROMPT_TOKENS]))
    return found
