"""The router: which experts a clip is sent to, and with what weight.

MoWE-Audio (arXiv 2409.06635, section 2.2) has two gates over the pool of weak encoders: a data-independent one (a
learned vector) and a data-dependent one (from the time-average of the base encoder's features). Each gate makes one
feature stream z = Σ_k r[k]·E_k(a) over its top-k experts. Gating on the instruction follows PaM (arXiv 2502.15178).

Shapes: B clips, F frames, P prompt tokens, D width of the gate's input, G gates, K experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Ragged
from model.config import RouterConfig
from model.encoders.log_mel import log_mel
from model.transfer import to_device

NUM_MELS = 80
ENTRY_OFFSET = -30.0
"""Added to the gate logits of an encoder that is new to a trained model: e^-30 is nothing beside the others in fp32."""


@dataclass(frozen=True)
class Routing:
    """What the router decided for B clips: a value, not module state."""

    probs: Tensor
    """[B, G, K] softmax of each gate."""
    chosen: Tensor
    """[B, G, K] bool: the gate's top-k."""
    gates: tuple[str, ...]
    """Name of each of the G gates."""

    @property
    def weights(self) -> Tensor:
        """[B, G, K] mixing weights: the probability of a chosen expert, else 0 (as published, not renormalised)."""
        return self.probs * self.chosen

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """`probs` and `chosen`, read in one go: the host decides by them who encodes what, and reports them."""
        probs, chosen = torch.stack([self.probs.detach(), self.chosen.to(self.probs.dtype)]).cpu()
        return probs, chosen.bool()

    @property
    def active(self) -> Tensor:
        """[B, K] bool, on the host: experts that some gate chose for the clip; only these compute."""
        return self.on_host[1].any(dim=1)

    def head(self, num_clips: int) -> Routing:
        """The routing of the first `num_clips` clips."""
        return Routing(self.probs[:num_clips], self.chosen[:num_clips], self.gates)


def mean_over_time(features: Ragged) -> Tensor:
    """[B, D]: the average of each clip's rows [ΣF, D], in fp32."""
    # Not `index_add`: in bf16 it rounds after every frame, and on a GPU it adds in an order of its own.
    return torch.stack([frames.mean(0, dtype=torch.float32) for frames in features.split()])


class Router(nn.Module):
    """Gates over `num_experts` experts.

    Args:
        config: what the gates read and how they choose.
        num_experts: K.
        primary_dim: width of the primary's features (input `primary`).
        vocab_size: of the tokenizer (input `prompt`).
        prompt_dim: width of the prompt's token embeddings (input `prompt`).
    """

    def __init__(
        self, config: RouterConfig, num_experts: int, primary_dim: int, vocab_size: int, prompt_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.steps_to_enter: Tensor
        """[K] int64: for an encoder that is coming in, the steps until it stands as the others do; else 0."""
        self.register_buffer("steps_to_enter", torch.zeros(num_experts, dtype=torch.int64))
        if "data_independent" in config.gates:
            self.independent = IndependentGate(num_experts)
        if "data_dependent" in config.gates:
            if config.input == "prompt":
                self.prompt_embedding = nn.EmbeddingBag(vocab_size, prompt_dim, mode="mean")
            width = {"primary": primary_dim, "log_mel": NUM_MELS, "prompt": prompt_dim}[config.input]
            self.dependent = nn.Linear(width, num_experts)

    def forward(self, clips: Ragged, primary: Ragged | None, prompts: Ragged, noise: Tensor | None = None) -> Routing:
        """Route B clips.

        Args:
            clips: waveforms [ΣT] (read by input `log_mel`).
            primary: the primary's features [ΣF, D] (read by input `primary`).
            prompts: instruction tokens [ΣP] (read by input `prompt`).
            noise: [B, G, K] standard normal, given in training only; scaled by `noise_std`.
        """
        logits = []
        for gate in self.config.gates:
            if gate == "data_independent":
                logits.append(self.independent(len(clips)))
            else:
                read = self._gate_input(clips, primary, prompts)
                logits.append(self.dependent(read.to(self.dependent.weight.dtype)))
        scores = torch.stack(logits, dim=1).float() / self.config.temperature
        scores = scores + ENTRY_OFFSET / self.config.added_encoder_warmup_steps * self.steps_to_enter
        if noise is not None:
            scores = scores + self.config.noise_std * noise
        probs = scores.softmax(dim=-1)
        top = probs.topk(self.config.top_k, dim=-1).indices
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, top, True)
        return Routing(probs, chosen, self.config.gates)

    @torch.no_grad()
    def advance(self) -> None:
        """To be called after every training step: encoders that are coming in come nearer."""
        self.steps_to_enter.sub_(1).clamp_(min=0)

    def _gate_input(self, clips: Ragged, primary: Ragged | None, prompts: Ragged) -> Tensor:
        if self.config.input == "primary":
            assert primary is not None
            return mean_over_time(primary)
        if self.config.input == "log_mel":
            return mean_over_time(log_mel(clips, NUM_MELS))
        starts = np.cumsum((0, *prompts.lengths[:-1]))
        return self.prompt_embedding(prompts.values, to_device(starts, prompts.values.device))


class IndependentGate(nn.Module):
    """One learned vector of K logits, the same for every clip."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        # Not zero: equal logits would make top-k pick the first expert forever.
        self.logits = nn.Parameter(0.1 * torch.randn(num_experts))

    def forward(self, num_clips: int) -> Tensor:
        """[B, K]"""
        return self.logits.expand(num_clips, -1)
