"""A complete training step without DeepSpeed and Megatron's optimizers, for a device on which these cannot run.

All other parts are those of a training run: the audio tower, dispatch, exchanges, Megatron's model and schedule, the
losses and the report.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.audio_tower import AudioTower
from model.config import ModelConfig
from model.llm.megatron import build_megatron
from model.llm.reference import resolve_hf_config
from model.llm.weights import RandomSource, load_megatron
from tests.pretended_device import DEVICE, put
from trainer import parity_cases
from trainer.engine.encoders import AudioEngine
from trainer.engine.llm import LLMEngine
from trainer.parallel.cpu import megatron_calls
from trainer.parallel.dispatch import CALL_COST_SAMPLES
from trainer.parallel.groups import Groups
from trainer.training.step import Step


def _grad_square(parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.stack([p.grad.double().square().sum() for p in parameters if p.grad is not None]).sum()


class _BareWeights:
    """The weights of a plain module. In contrast to ZeRO-3, every rank always holds all of them."""

    calls_are_collective = False

    def __init__(self, tower: AudioTower) -> None:
        self.forward = tower

    def before_features_return(self) -> None:
        """Do nothing, because a single rank has nothing to reduce."""


class BareAudio(AudioEngine):
    """A replacement for `AudioEngine` that uses a plain module instead of ZeRO-3."""

    def __init__(self, tower: AudioTower, groups: Groups, batch_samples: int) -> None:
        self.groups, self.tower = groups, tower
        self.engine: Any = tower
        self._weights: Any = _BareWeights(tower)
        self._dispatch = self._build_dispatch(batch_samples, debug_plan=False, recompute_calls=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def grad_norm_sq(self) -> Tensor:
        return _grad_square(list(self.tower.parameters()))

    def step(self, clip_coef: float, norm: float, lr_scale: float, stage: int = 0) -> None:
        self.discard()

    def discard(self) -> None:
        self.tower.zero_grad()


class BareLLM(LLMEngine):
    """A replacement for `LLMEngine` without data parallelism or an optimizer."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        self.hf_config, self.groups, self.dtype = resolve_hf_config(config.llm), groups, torch.float32
        source = RandomSource(self.hf_config, parity_cases.SEED)
        self.chunks = build_megatron(self.hf_config, tp_size=1, pp_size=1, first_stage=True, last_stage=True)
        load_megatron(self.chunks, source, self.hf_config, tp_rank=0, tp_size=1)
        self.models, self.optimizer = self.chunks, None

    def grad_norm_sq(self) -> Tensor:
        return _grad_square(list(self.chunks[0].parameters()))

    def step(self, clip_coef: float, lr_scale: float, stage: int = 0) -> None:
        self.chunks[0].zero_grad()


def build_step(model: ModelConfig, groups: Groups, on_device: bool) -> Step:
    """Return the training step of a single rank, on the CPU or on the pretended device.

    With `on_device`, the caller must be within the context of a `PretendedDevice`.
    """
    with megatron_calls():
        llm = BareLLM(model, groups)
    torch.manual_seed(parity_cases.SEED)
    tower = AudioTower(model, llm.hf_config.hidden_size, parity_cases.VOCAB_SIZE).train()
    if on_device:
        groups = replace(groups, device=DEVICE)
        CALL_COST_SAMPLES[DEVICE.type] = CALL_COST_SAMPLES["cpu"]  # gives the same encoder calls
        put(tower)
        put(llm.chunks[0])
    llm.groups = groups
    audio = BareAudio(tower, groups, batch_samples=24000)
    return Step(
        model, parity_cases.OPTIM, audio, llm, groups, num_steps=10, tokens_per_microbatch=48, seed=parity_cases.SEED
    )
