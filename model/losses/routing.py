"""The routing loss L_MoWE, which rewards confident and diverse choices of the encoder experts.

MoWE-Audio (arXiv 2409.06635, section 2.3) adds 0.1·L_MoWE to the next-token loss. We could not verify the exact terms
of the paper, so the terms below may differ from them. Each has a weight in the recipe (`model.routing_loss`) and is
computed over the N clips of the *global* batch:

    sample_entropy       mean over clips of H(p_dependent)     low if the gate is confident for each clip
    batch_entropy      − H(mean over clips of p_dependent)     low if the batch as a whole uses all experts
    independent_entropy  H(p_independent)                      low if the data-independent gate is confident

Entropies are in nats. A batch without audio has no routing loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.audio_output import AudioOutput
from model.batch import Batch, Ragged
from model.config import ModelConfig, RoutingLossConfig
from model.losses.base import AudioLoss, Reduce, alone
from model.router import Routing


class RoutingLoss(AudioLoss):
    """The loss L_MoWE, computed as N·L_MoWE (`sum`) divided by the number of clips N (`count`).

    The loss is reported for every model with encoder experts, even if its weight is 0.
    """

    name = "routing"
    options = {}

    def weight(self, config: ModelConfig) -> float:
        """Return `model.routing_loss.weight`."""
        return config.routing_loss.weight

    def is_active(self, config: ModelConfig) -> bool:
        """Return whether the model has encoder experts."""
        return bool(config.experts)

    def count(self, batch: Batch, config: ModelConfig) -> int:
        """Return the number of clips."""
        return len(batch.clips)

    def sum(self, audio: AudioOutput, targets: Ragged | None, config: ModelConfig, reduce: Reduce) -> Tensor:
        """Return this rank's contribution to N·L_MoWE."""
        assert audio.routing is not None
        return routing_sum(config.routing_loss, audio.routing, reduce)


def entropy(probs: Tensor) -> Tensor:
    """Return the entropy over the last dimension, in nats."""
    return torch.special.entr(probs).sum(-1)


def routing_sum(config: RoutingLossConfig, routing: Routing, reduce: Reduce = alone) -> Tensor:
    """Return this rank's contribution to N·L_MoWE, where N is the number of clips in the global batch.

    Collective: every rank of the world must call it, because it calls `reduce`.

    The batch entropy is not linear in the clips, so the ranks' values are constructed such that they sum to N·L_MoWE of
    the global batch. The gradient of a rank's value is the gradient of N·L_MoWE with respect to this rank's clips, so
    the gradients also sum to the correct total.

    Args:
        config: The weights of the terms. The caller applies `config.weight`.
        routing: The router's decisions for this rank's clips.
        reduce: A function that returns the sum over ranks.
    """
    num_local, _, num_experts = routing.probs.shape
    by_gate = dict(zip(routing.gates, routing.probs.unbind(1), strict=True))
    none = routing.probs.new_zeros(0, num_experts)
    dependent, independent = by_gate.get("data_dependent", none), by_gate.get("data_independent", none)
    # The independent gate is the same for every clip. Its entropy is summed over the local clips, so that each rank is
    # weighted by its number of clips.
    local = torch.cat(
        [
            dependent.sum(0),
            entropy(dependent).sum()[None],
            entropy(independent).sum()[None],
            routing.probs.new_full((1,), num_local),
        ]
    )
    sums = reduce(local.detach().clone())
    num_clips = sums[-1].clamp(min=1)
    probs, (sample, own, _) = ((local + (sums - local).detach()) / num_clips).split([num_experts, 3])
    value = config.sample_entropy * sample - config.batch_entropy * entropy(probs) + config.independent_entropy * own
    return num_clips * (value - value.detach()) + num_local * value.detach()
