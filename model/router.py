"""The router, which chooses the encoder experts of each clip and weights their features.

MoWE-Audio (arXiv 2409.06635, section 2.2) has two gates over the pool of weak encoders (here: encoder experts). The
data-independent gate is a learned vector. The input of the data-dependent gate is the average over time of the features
of the base encoder (here: primary encoder). Each gate computes one feature stream z = Σ_k r[k]·E_k(a) over its top-k
experts. Gating on the instruction follows PaM (arXiv 2502.15178).

Shapes: B clips, F frames, P prompt tokens, D width of the gate's input, G gates, K experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
"""The initial logit offset of an encoder that is added to a trained model. In fp32, e^-30 is negligible."""


@dataclass(frozen=True)
class Routing:
    """The decisions of the router for B clips."""

    probs: Tensor
    """The softmax of each gate's logits, [B, G, K]."""
    chosen: Tensor
    """The top-k experts of each gate, [B, G, K] bool."""
    gates: tuple[str, ...]
    """The names of the G gates."""

    @property
    def weights(self) -> Tensor:
        """The mixing weights [B, G, K]: the unchanged probabilities of the chosen experts, and 0 for other experts."""
        return self.probs * self.chosen

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """Copies of `probs` and `chosen` on the host, made in one transfer. They determine which experts encode each
        clip."""
        probs, chosen = torch.stack([self.probs.detach(), self.chosen.to(self.probs.dtype)]).cpu()
        return probs, chosen.bool()

    @property
    def active(self) -> Tensor:
        """The experts that at least one gate chose for each clip, [B, K] bool on the host. Only these experts run."""
        return self.on_host[1].any(dim=1)

    def with_probs(self, probs: Tensor) -> Routing:
        """Return these decisions with `probs` as another tensor of equal values. The copies on the host are reused."""
        found = replace(self, probs=probs)
        found.__dict__["on_host"] = self.on_host
        return found

    def head(self, num_clips: int) -> Routing:
        """Return the routing of the first `num_clips` clips."""
        return Routing(self.probs[:num_clips], self.chosen[:num_clips], self.gates)


def mean_over_time(features: Ragged) -> Tensor:
    """Return the mean [B, D] of each clip's features [ΣF, D] over time, in fp32."""
    # In bf16, `index_add` would round after every frame, and on a GPU its order of addition is not deterministic.
    return torch.stack([frames.mean(0, dtype=torch.float32) for frames in features.split()])


class Router(nn.Module):
    """The gates that choose among the experts.

    Args:
        config: The router section of the config.
        num_experts: The number K of experts.
        primary_dim: The width of the primary encoder's features, for the input `primary`.
        vocab_size: The size of the tokenizer's vocabulary, for the input `prompt`.
        prompt_dim: The width of the prompt's token embeddings, for the input `prompt`.
    """

    def __init__(
        self, config: RouterConfig, num_experts: int, primary_dim: int, vocab_size: int, prompt_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.steps_to_enter: Tensor
        """The number of steps until the logit of each added encoder has no offset, [K] int64; 0 for all other
        encoders."""
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
            clips: The waveforms [ΣT], which the input `log_mel` reads.
            primary: The primary encoder's features [ΣF, D], which the input `primary` reads; None if there is none.
            prompts: The instruction tokens [ΣP], which the input `prompt` reads.
            noise: Standard normal noise [B, G, K], to be scaled by `noise_std`; None outside training.
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
        """Reduce the offset of added encoders' logits by one step. It must be called after every training step."""
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
    """A learned vector of K logits, the same for every clip."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        # With equal logits, top-k would always choose the first expert.
        self.logits = nn.Parameter(0.1 * torch.randn(num_experts))

    def forward(self, num_clips: int) -> Tensor:
        """Return the logits [B, K] for `num_clips` = B clips."""
        return self.logits.expand(num_clips, -1)
