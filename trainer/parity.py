"""Comparison of the loss and gradients of a topology with those of the single-process model.

Every rank computes the oracle (`model.speech_llm.SpeechLLM` on the whole global batch) and its own distributed part. It
compares every term of the loss and all gradients. The gradients of ZeRO-3 are gathered over the world. The gradients of
Megatron are gathered over the data-parallel ranks and compared with the same slices of the oracle's gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from model.audio_tower import AudioTower
from model.batch import Batch, Sample
from model.config import ModelConfig
from model.llm.experts import balance_experts, smallest_gap
from model.llm.families import mixture_of
from model.llm.mixture import SCORE_BIAS
from model.llm.names import hf_to_local, local_pieces
from model.llm.reference import resolve_hf_config
from model.llm.stages import Recompute
from model.llm.weights import RandomSource, embedding_rms
from model.lora import add_adapters
from model.losses.base import AudioLoss
from model.speech_llm import Losses, SpeechLLM
from trainer.engine.ds_config import Gathering
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.engine.llm_optimizer import Reduction
from trainer.engine.optim import lr_scale, param_groups, set_rates
from trainer.engine.placement import place
from trainer.engine.stages import stage_at, stages_of
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.groups import Groups
from trainer.parallel.values import all_gather_values
from trainer.parity_cases import (
    ALL_WEIGHTS,
    NUM_LAYERS,
    SEED,
    VOCAB_SIZE,
    BiasedSource,
    Learned,
    drawn_biases,
    make_samples,
)
from trainer.telemetry.metrics import StepReport
from trainer.training.router_noise import jitter_ids, sample_digest
from trainer.training.step import Step


@dataclass(frozen=True)
class Mode:
    """The LLM of a comparison, and settings of its engine that must not change the result."""

    family: str | None = None
    """The family of the LLM; None for the family of the whole comparison."""
    num_layers: int = NUM_LAYERS
    """The number of layers of the LLM. Pipeline stages are uneven if they cannot all have the same number of layers."""
    recompute: Recompute | None = None
    """The activations that the LLM recomputes; None for all with pipeline parallelism, and for none without it."""
    overlap: Literal["none", "gradients", "both"] = "none"
    """The exchanges between replicas that overlap with computation: of gradients, or of gradients and weights."""

    @property
    def reduction(self) -> Reduction:
        """The settings for the exchange between replicas. Buckets are so small that the first stage has several."""
        overlaps = self.overlap != "none"
        return Reduction(overlaps, self.overlap == "both", bucket_elements=4000 if overlaps else None)

    @property
    def label(self) -> str:
        """The settings that differ from the defaults, as text."""
        layers = f"{self.num_layers} layers" if self.num_layers != NUM_LAYERS else ""
        recompute = f"recompute {self.recompute}" if self.recompute else ""
        overlap = f"overlap {self.overlap}" if self.overlap != "none" else ""
        return ", ".join(filter(None, (self.family, layers, recompute, overlap)))


@dataclass(frozen=True)
class Difference:
    """The relative differences between a topology and the oracle."""

    loss: float
    """The largest difference in the loss or in one of its terms. The difference in a term is divided by the term, or by
    a hundredth of the loss if that is larger."""
    gradient: float
    """The largest difference in a gradient. Each is divided by the largest entry of the parameter's gradient, or by a
    hundredth of the model's largest gradient if that is larger."""
    worst: str
    """The parameter whose gradient has the largest difference."""
    gap: float | None = None
    """The smallest difference, over all tokens, between the scores of the last chosen FFN expert and of the best expert
    that was not chosen. Below about 1e-5, rounding may change the choice. It is None if the LLM has no FFN experts."""


def draw_projection(tower: AudioTower) -> None:
    """Draw random weights for the projection of added features.

    With its initial zeros, no gradient would reach experts. With the adapter `swiglu`, the projection keeps its
    zeros. Otherwise, the experts' gradients in fp32 would differ from those in fp64 by more than 1e-5, even in one
    process. `swiglu_post_norm` has the same parts in a different order, so its experts are still compared.
    """
    if tower.stream_projection is not None and tower.config.adapter.kind != "swiglu":
        weight = tower.stream_projection.weight
        with torch.no_grad():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(SEED)))


def build_oracle(config: ModelConfig, learned: Learned = ALL_WEIGHTS) -> SpeechLLM:
    """Return the single-process model. Parameters that are not trained require no gradient."""
    oracle = SpeechLLM(config, VOCAB_SIZE, SEED).train()
    draw_projection(oracle.audio)
    for name, parameter in oracle.named_parameters():
        if name.endswith(SCORE_BIAS):
            parameter.data.copy_(drawn_biases(name.removeprefix("llm."), len(parameter)))
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
    source = BiasedSource(RandomSource(hf_config, SEED))
    recompute = groups.topology.pp > 1  # so that topologies cover both settings
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
    """Make every gate choose one encoder expert for every clip.

    Args:
        step: The step, whose router noise is changed within the context.
        expert: The index of the expert; None leaves the choice to the router.
    """
    drawn = step.router_noise
    strong = 1e3 * torch.eye(len(step.model.experts))[expert] if expert is not None else 0.0

    def noise(number: int, batch: Batch) -> Tensor | None:
        found = drawn(number, batch)
        return None if found is None else found + strong

    step.router_noise = noise
    try:
        yield
    finally:
        step.router_noise = drawn


def compare(step: Step, oracle: SpeechLLM, samples: list[list[Sample]], number: int = 0) -> Difference:
    """Compare one step of the distributed and the single-process model, without an update.

    Collective: every rank of the world must call it.
    """
    rank = step.groups.rank
    report = step.forward_backward(number, Batch(tuple(samples[rank])))
    step.timer.take()
    whole = Batch(tuple(s for one in samples for s in one))
    oracle.zero_grad(set_to_none=True)
    losses = oracle(whole, step.router_noise(number, whole), _jitter(step, number, whole))
    losses.total.backward()
    reference = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}
    _check_learned(step, oracle)
    # 1e-5 of this floor is 1e-7 of the model's largest gradient, which is about the rounding error of sums in fp32.
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
    """Return the largest relative difference in the loss and its terms; infinity if the terms have different names."""
    total = float(losses.total)
    if set(report.losses) != {term.name for term in losses.terms}:
        return float("inf")
    found = [abs(report.loss - total) / abs(total)]
    for term in losses.terms:
        wanted = float(losses[term.name])
        found.append(abs(report.losses[term.name] - wanted) / max(abs(wanted), 1e-2 * abs(total)))
    return max(found)


def _check_learned(step: Step, oracle: SpeechLLM) -> None:
    """Check that the engines train the same parameters as the oracle."""
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
    """Return all gradients by the parameter's name. The topology must have neither tensor nor pipeline parallelism.

    Collective: every rank of the world must call it.
    """
    _gather_gradients(step.llm)
    found = {n: safe_get_full_grad(p) for n, p in step.audio.named_parameters() if p.requires_grad}
    return found | {f"llm.{n}": p.main_grad for n, p in step.llm.parameters() if p.requires_grad}  # type: ignore[attr-defined]


def _gather_gradients(engine: LLMEngine) -> None:
    """Fill the gradient buffers. The distributed optimizer has summed only this rank's part of each buffer.

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


def _jitter(step: Step, number: int, batch: Batch) -> Tensor | None:
    """Return the identities of samples in a step, from which the routers' jitter is computed; None without jitter."""
    if step.routing is None or not step.routing.mixture.jitter:
        return None
    digests = np.array([sample_digest(sample.key) for sample in batch.samples], dtype=np.int64)
    return torch.from_numpy(jitter_ids(step.seed, number, digests))


def _bias_difference(step: Step, oracle: SpeechLLM) -> float:
    """Return the largest difference in a bias that balances experts on this rank; 0 if there are no such biases."""
    wanted = dict(oracle.named_parameters())
    found = [0.0]
    for name, parameter in step.llm.parameters():
        if name.endswith(SCORE_BIAS):
            own = hf_to_local(name, lambda hf_name, index: wanted["llm." + hf_name][index], step.llm.hf_config, 0, 1)
            found.append(float((parameter - own).abs().max()))
    return max(found)


def loss_curves(step: Step, oracle: SpeechLLM, num_steps: int) -> tuple[float, float]:
    """Train both models, and return the largest relative differences in their losses and in their gradient norms.

    A difference between biases that balance experts counts as a difference in losses.

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
        losses = oracle(whole, step.router_noise(number, whole), _jitter(step, number, whole))
        loss = losses.total if stage.runs_llm else _audio_total(losses, step)
        loss.backward()
        for _, parameter, _ in named:  # As in the engines, parameters that no sample uses have a gradient of zero.
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(torch.nn.utils.clip_grad_norm_(oracle.parameters(), optim.clip_norm))
        optimizer.step()
        if stage.runs_llm:
            balance_experts(oracle.llm, losses.choices)
        worst_loss = max(worst_loss, abs(report.loss - float(loss)) / abs(float(loss)), _bias_difference(step, oracle))
        worst_norm = max(worst_norm, abs(report.grad_norm - norm) / norm)
    of_ranks = all_gather_values((worst_loss, worst_norm), step.groups.world)  # Stages hold different biases.
    return max(loss for loss, _ in of_ranks), max(norm for _, norm in of_ranks)


def _audio_total(losses: Losses, step: Step) -> Tensor:
    """Return the weighted sum of the losses of the audio side, which is minimized in stages that do not run the LLM."""
    names = {loss.name for loss in step.losses if isinstance(loss, AudioLoss)}
    return replace(losses, terms=tuple(t for t in losses.terms if t.name in names)).total
