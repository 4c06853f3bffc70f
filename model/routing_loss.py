"""L_MoWE: rewards confident and diverse use of the experts.

MoWE-Audio (arXiv 2409.06635, section 2.3) adds 0.1·L_MoWE to the next-token loss. The paper's exact terms could not be
verified, so these are ours, each with its weight in the recipe, over the N clips of the *global* batch:

    sample_entropy       mean over clips of H(p_dependent)     low: each clip is routed with confidence
    batch_entropy      − H(mean over clips of p_dependent)     low: the batch as a whole uses all experts
    independent_entropy  H(p_independent)                      low: the data-independent gate settles

Entropies are in nats. A batch without audio has no routing loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import RoutingLossConfig
from model.router import Routing


def entropy(probs: Tensor) -> Tensor:
    """H in nats over the last dimension."""
    return torch.special.entr(probs).sum(-1)


@dataclass(frozen=True)
class RoutingSums:
    """Sums over clips from which L_MoWE follows; sums of ranks add up, which makes the loss one of the global batch."""

    probs: Tensor
    """[K] Σ p_dependent"""
    sample_entropy: Tensor
    """Σ H(p_dependent)"""
    independent_entropy: Tensor
    """Σ H(p_independent): the same for every clip, summed so that each rank carries its share"""
    num_clips: int

    @staticmethod
    def of(routing: Routing) -> RoutingSums:
        """The sums of one rank's clips."""
        by_gate = dict(zip(routing.gates, routing.probs.unbind(1), strict=True))
        none = routing.probs.new_zeros(0, routing.probs.shape[-1])
        dependent, independent = by_gate.get("data_dependent", none), by_gate.get("data_independent", none)
        return RoutingSums(
            dependent.sum(0), entropy(dependent).sum(), entropy(independent).sum(), routing.probs.shape[0]
        )


def routing_loss(config: RoutingLossConfig, local: RoutingSums, total: RoutingSums | None = None) -> Tensor:
    """The unweighted L_MoWE of the global batch, as a scalar.

    Args:
        config: weight of each term (`config.weight` is applied by the caller).
        local: sums over this rank's clips; carries the gradient.
        total: sums over all ranks, detached. None: `local` is everything. The value is that of the global batch on
            every rank; the gradient with respect to this rank's clips is exact, so gradients of ranks add up.
    """
    total = local if total is None else total
    if total.num_clips == 0:
        return local.probs.sum() * 0.0

    def joined(mine: Tensor, everyones: Tensor) -> Tensor:
        return (mine + (everyones - mine).detach()) / total.num_clips

    terms = config.sample_entropy * joined(local.sample_entropy, total.sample_entropy)
    terms = terms - config.batch_entropy * entropy(joined(local.probs, total.probs))
    return terms + config.independent_entropy * joined(local.independent_entropy, total.independent_entropy)
