"""Measurement of parity: the loss and gradients of a topology against those of the single-process model.

Every rank computes the oracle (`model.speech_llm.SpeechLLM` on the whole global batch) and its own distributed part. It
compares every term of the loss and all gradients. Those of ZeRO-3 are gathered over the world. Those of Megatron are
gathered over the data-parallel ranks and compared with the same slices of the oracle's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from model.audio_tower import AudioTower
from model.batch import IGNORE, Batch, Sample
from model.config import AdapterConfig, EncoderConfig, LLMConfig, LoraConfig, ModelConfig, RouterConfig
from model.lengths import TokenRate
from model.llm.experts import smallest_gap
from model.llm.families import mixture_of
from model.llm.names import hf_to_local, local_pieces
from model.llm.reference import resolve_hf_config
from model.llm.stages import Recompute
from model.llm.weights import RandomSource, embedding_rms
from model.lora import Adapters, add_adapters, initial_factor
from model.speech_llm import Losses, SpeechLLM
from trainer.engine.ds_config import Gathering
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.engine.llm_optimizer import Reduction
from trainer.engine.optim import OptimConfig, PartConfig, lr_scale, param_groups, set_rates
from trainer.engine.placement import place
from trainer.engine.stages import StageConfig, stage_at, staged_optim, stages_of
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.groups import Groups
from trainer.parallel.values import all_gather_values
from trainer.parity_llms import EXPERTS, features
from trainer.scoring.tasks import TASKS
from trainer.telemetry.metrics import StepReport
from trainer.training.step import Step

VOCAB_SIZE = 61
PLACEHOLDER = 60
SEED = 3
NUM_LAYERS = 4

OPTIM = OptimConfig(lr=2e-3, weight_decay=0.01, clip_norm=1.0, schedule="cosine", warmup_steps=2)


def drawn_factor(name: str, shape: tuple[int, int]) -> Tensor:
    """Return random values for both factors of an adapter: with B = 0, the gradient of A would be zero."""
    values = initial_factor(f"{name}.random", shape, SEED)
    return 0.3 * values if name.endswith("lora_B") else values


@dataclass(frozen=True)
class Learned:
    """What a comparison trains."""

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


@dataclass(frozen=True)
class Mode:
    """The way in which the LLM's engine computes the same result."""

    family: str | None = None
    """The family of the LLM; None for that of the whole comparison."""
    num_layers: int = NUM_LAYERS
    """The number of layers of the LLM, which decides whether stages are even."""
    recompute: Recompute | None = None
    """What the LLM recomputes; None for everything with a pipeline and nothing without one, as for encoders."""
    overlap: Literal["none", "gradients", "both"] = "none"
    """The exchanges between replicas that overlap with computation: of gradients, or of gradients and weights."""

    @property
    def reduction(self) -> Reduction:
        """How gradients and weights are exchanged. Buckets are so small that the first stage has several of them."""
        overlaps = self.overlap != "none"
        return Reduction(overlaps, self.overlap == "both", bucket_elements=4000 if overlaps else None)

    @property
    def label(self) -> str:
        """The settings that differ from the defaults, as text."""
        layers = f"{self.num_layers} layers" if self.num_layers != NUM_LAYERS else ""
        recompute = f"recompute {self.recompute}" if self.recompute else ""
        overlap = f"overlap {self.overlap}" if self.overlap != "none" else ""
        return ", ".join(filter(None, (self.family, layers, recompute, overlap)))


ADAPTER_KINDS = {
    "convolutions": AdapterConfig(hidden_size=16),
    "stacking": AdapterConfig("stacking", hidden_size=16, strides=(5,), normalize=True),
    "queries": AdapterConfig("queries", 16, strides=(7,), num_queries=2, num_heads=2, normalize=True),
    "pooling": AdapterConfig("pooling", 32, strides=(2,), last_group="drop"),
    "pooling_perceptron": AdapterConfig("pooling_perceptron", 16, strides=(3,)),
    "swiglu": AdapterConfig("swiglu", 16, strides=(4,), bias=False),
    "swiglu_post_norm": AdapterConfig("swiglu_post_norm", 16, strides=(4,), bias=False),
}
"""The adapter of each kind in `tiny_model`. The last group of frames of most clips is not full."""
ADDING = ("pooling_perceptron", "swiglu", "swiglu_post_norm")
"""The kinds of adapters with which `tiny_model` adds the experts' features to those of the primary encoder."""


STAGED = Learned(
    staged_optim(
        replace(OPTIM, parts=(PartConfig("audio.primary.*", frozen=True),)),
        (
            StageConfig(name="connector", steps=3, train=("connector",), lr=4e-3, schedule="linear"),
            StageConfig(name="all", steps=3, parts=(PartConfig("llm.*", lr=1e-3, weight_decay=0.2),)),
            StageConfig(name="encoders", steps=2, train=("connector", "encoders"), schedule="constant"),
            StageConfig(name="adapters", steps=3, train=("lora", "audio.projector.*")),
        ),
    ),
    Adapters((LoraConfig("llm.*.[qk]_proj", rank=2), LoraConfig("audio.primary.*.q_proj", rank=2)), drawn_factor),
)
"""Stages in which parts begin to learn, stop, and begin again."""


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
        ctc_vocabulary="tokens" if adapter == "convolutions" else "bytes",
        ctc_outputs=1 if adapter == "convolutions" else 2,
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
        is_transcription=num_clips == 1,
    )


def make_conversation(index: int, num_clips: int, rate: TokenRate, seed: int) -> Sample:
    """Return a sample with two answers and `num_clips` clips in turn 2; every other sample has a clip in turn 1."""
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
        kind: One of mixed, text_only, rank_without_audio, fewer_samples_than_ranks, one_expert and conversations.
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


@dataclass(frozen=True)
class Difference:
    """The relative differences between a topology and the oracle."""

    loss: float
    """The largest difference of the loss or of one of its terms. The difference of a term is divided by the
    term, or by a hundredth of the loss if that is larger."""
    gradient: float
    """The largest difference of a gradient. Each is divided by the largest entry of the parameter's gradient, or by a
    hundredth of the model's largest gradient if that is larger."""
    worst: str
    """The parameter with the largest difference of its gradient."""
    gap: float | None = None
    """The smallest difference between the scores of the last chosen and the first other expert of a token in the LLM.
    Below about 1e-5, rounding may change the choice. None if the LLM has no experts."""


def draw_projection(tower: AudioTower) -> None:
    """Give the projection of added features random weights: with its zeros, experts would have no gradient.

    With `swiglu` it keeps its zeros: the experts' gradients in fp32 would differ from those in fp64 by more than 1e-5,
    even in one process. `swiglu_post_norm` has the same parts in another order.
    """
    if tower.stream_projection is not None and tower.config.adapter.kind != "swiglu":
        weight = tower.stream_projection.weight
        with torch.no_grad():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(SEED)))


def build_oracle(config: ModelConfig, learned: Learned = ALL_WEIGHTS) -> SpeechLLM:
    """Return the single-process model. Parameters that are not trained require no gradient."""
    oracle = SpeechLLM(config, VOCAB_SIZE, SEED).train()
    draw_projection(oracle.audio)
    add_adapters(oracle, "", learned.adapters)
    param_groups(learned.optim, [(n, p, p.dim()) for n, p in oracle.named_parameters()])
    return oracle


def build_step(
    config: ModelConfig,
    groups: Groups,
    ds_config: dict[str, Any],
    num_steps: int,
    dtype: torch.dtype = torch.float32,
    batch_sec: float = 1.5,
    pack_tokens: int = 48,
    pack_multiple: int | None = None,
    learned: Learned = ALL_WEIGHTS,
    gathering: Gathering = "per_update",
    recompute_calls: bool = False,
    mode: Mode = Mode(),
) -> Step:
    """Return the distributed model with the oracle's initial weights.

    Collective: every rank of the world must call it.
    """
    optim = learned.optim
    hf_config = resolve_hf_config(config.llm)
    source = RandomSource(hf_config, SEED)
    recompute = groups.topology.pp > 1  # so that both ways are compared
    llm_recompute = mode.recompute or ("full" if recompute else "none")
    llm = LLMEngine(hf_config, source, optim, groups, dtype, llm_recompute, learned.adapters, mode.reduction)
    torch.manual_seed(SEED)
    held = place(config, groups.topology.ep).held_by(groups.rank)
    tower = AudioTower(config, hf_config.hidden_size, VOCAB_SIZE, held, embedding_rms(source, hf_config))
    draw_projection(tower)
    add_adapters(tower, "audio.", learned.adapters)
    tower.set_recompute(recompute)
    audio = AudioEngine(
        tower.train(), optim, ds_config, groups, batch_sec, gathering=gathering, recompute_calls=recompute_calls
    )
    return Step(
        config,
        optim,
        audio,
        llm,
        groups,
        num_steps=num_steps,
        tokens_per_microbatch=pack_tokens,
        pack_multiple_tokens=pack_multiple,
        seed=SEED,
    )


@contextmanager
def favoured(step: Step, expert: int | None) -> Iterator[None]:
    """Let every gate choose one expert for every clip; None leaves the choice to the router."""
    drawn = step.router_noise
    strong = 1e3 * torch.eye(len(step.model.experts))[expert] if expert is not None else 0.0

    def noise(number: int, batch: Batch) -> Tensor | None:
        found = drawn(number, batch)
        return None if found is None else found + strong

    step.router_noise = noise  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        step.router_noise = drawn  # type: ignore[method-assign]


def compare(step: Step, oracle: SpeechLLM, samples: list[list[Sample]], number: int = 0) -> Difference:
    """Compare one step of the distributed and the single-process model, without an update.

    Collective: every rank of the world must call it.
    """
    rank = step.groups.rank
    report = step.forward_backward(number, Batch(tuple(samples[rank])))
    step.timer.take()
    whole = Batch(tuple(s for one in samples for s in one))
    oracle.zero_grad(set_to_none=True)
    losses = oracle(whole, step.router_noise(number, whole))
    losses.total.backward()
    reference = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}
    _check_learned(step, oracle)
    # 1e-5 of this is 1e-7 of the model's largest gradient, the last place of fp32, which depends on the order of sums.
    floor = 1e-2 * max(float(g.abs().max()) for g in reference.values())
    worst = (0.0, "")
    for name, mine, wanted in (*_audio_gradients(step, reference), *_llm_gradients(step, reference)):
        scale = max(float(wanted.abs().max()), floor)
        worst = max(worst, (float((mine.cpu() - wanted).abs().max()) / scale, name))
    gradient, name = max(all_gather_values(worst, step.groups.world))
    step.audio.discard()
    mixture = mixture_of(step.llm.hf_config)
    gap = None if mixture is None else smallest_gap(losses.choices, mixture.top_k)
    return Difference(_loss_difference(report, losses), gradient, name, gap)


def _loss_difference(report: StepReport, losses: Losses) -> float:
    """Return the largest relative difference of the loss and its terms; infinity if the terms have other names."""
    total = float(losses.total)
    if set(report.losses) != {term.name for term in losses.terms}:
        return float("inf")
    found = [abs(report.loss - total) / abs(total)]
    for term in losses.terms:
        wanted = float(losses[term.name])
        found.append(abs(report.losses[term.name] - wanted) / max(abs(wanted), 1e-2 * abs(total)))
    return max(found)


def _check_learned(step: Step, oracle: SpeechLLM) -> None:
    """Check that exactly the parameters that the oracle trains have a gradient here."""
    wanted = {n: p.requires_grad for n, p in oracle.named_parameters()}
    for name, parameter in step.audio.named_parameters():
        assert parameter.requires_grad == wanted[name], name
    for name, parameter in step.llm.parameters():
        pieces = local_pieces(name, step.llm.hf_config, *step.llm.split(name))
        for piece in pieces:
            learns = piece.hf_name is None or wanted[f"llm.{piece.hf_name}"]
            assert hasattr(parameter, "main_grad") == learns or piece.hf_name is None, (name, piece)


def _audio_gradients(step: Step, reference: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    return [(n, safe_get_full_grad(p), reference[n]) for n, p in step.audio.named_parameters() if p.requires_grad]


def _llm_gradients(step: Step, reference: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    engine = step.llm
    _gather_gradients(engine)

    def read(name: str, index: tuple[slice, ...]) -> Tensor:
        return reference["llm." + name][index]

    found = []
    for name, parameter in engine.parameters():
        if not parameter.requires_grad:
            continue
        wanted = hf_to_local(name, read, engine.hf_config, *engine.split(name))
        found.append((f"llm.{name}", parameter.main_grad, wanted))  # type: ignore[attr-defined]
    return found


def gradients_of(step: Step) -> dict[str, Tensor]:
    """Return all gradients of a step without tensor and pipeline parallelism, by name in this trainer.

    Collective: every rank of the world must call it.
    """
    _gather_gradients(step.llm)
    found = {n: safe_get_full_grad(p) for n, p in step.audio.named_parameters() if p.requires_grad}
    return found | {f"llm.{n}": p.main_grad for n, p in step.llm.parameters() if p.requires_grad}  # type: ignore[attr-defined]


def _gather_gradients(engine: LLMEngine) -> None:
    """Complete the gradient buffers, of which the distributed optimizer sums only this rank's own part.

    Collective: every rank of the world must call it.
    """
    from megatron.core import parallel_state

    with megatron_calls():
        dense, experts = (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_group(),
        )
        models: list[Any] = engine.models
        copies = [(buffer, dense) for model in models for buffer in model.buffers]
        copies += [(buffer, experts) for model in models for buffer in model.expert_parallel_buffers]
        for buffer, group in copies:
            for bucket in buffer.buckets:
                parts = bucket.grad_data.chunk(dist.get_world_size(group))
                mine = parts[dist.get_rank(group)].clone()
                dist.all_gather(list(parts), mine, group=group)


def loss_curves(step: Step, oracle: SpeechLLM, num_steps: int) -> tuple[float, float]:
    """Train both models, and return the largest relative difference of their losses and of their gradient norms.

    Collective: every rank of the world must call it.
    """
    named = [(n, p, p.dim()) for n, p in oracle.named_parameters()]
    optim = step.optim
    stages = stages_of(optim, step.num_steps)
    learns = {name: parameter.requires_grad for name, parameter, _ in named}
    groups = param_groups(optim, named)
    worst_loss, worst_norm, world, rate = 0.0, 0.0, step.groups.topology.world, step.model.adapter.rate
    for number in range(num_steps):
        samples = make_samples("mixed", world, rate, seed=number % 4)
        report = step(number, Batch(tuple(samples[step.groups.rank])))
        whole = Batch(tuple(s for one in samples for s in one))
        index = stage_at(optim, number, step.num_steps)
        stage = stages[index]
        if number == stage.start:
            for name, parameter, dims in named:
                parameter.requires_grad_(learns[name] and not stage.setting(name, dims).frozen)
            optimizer = torch.optim.AdamW(
                [dict(group) for group in groups], lr=optim.lr, betas=optim.betas, eps=optim.eps
            )
        set_rates(optimizer.param_groups, index, lr_scale(stage.optim, number - stage.start, stage.steps))
        optimizer.zero_grad()
        loss = oracle(whole, step.router_noise(number, whole)).total
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(oracle.parameters(), optim.clip_norm))
        optimizer.step()
        worst_loss = max(worst_loss, abs(report.loss - float(loss)) / abs(float(loss)))
        worst_norm = max(worst_norm, abs(report.grad_norm - norm) / norm)
    return worst_loss, worst_norm
