"""The biases with which the LLM's routers balance FFN experts without a loss (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

A step counts the tokens that chose each expert, and sums the counts over all ranks. Every rank that holds a router then
makes the same change to the router's biases. The change depends only on the counts of the global batch, so it does not
depend on the topology.

Shapes: L layers with experts, C choices of a router (experts and null experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.llm.experts import Choice, balance
from model.llm.families import mixture_of
from model.llm.megatron_experts import routers_of
from trainer.engine.llm import LLMEngine


class ExpertBiases:
    """The biases of the routers of an LLM, and the counts of a step, from which the changes to the biases are computed.

    Args:
        engine: The engine of the LLM. Its routers must have biases.
    """

    def __init__(self, engine: LLMEngine) -> None:
        mixture = mixture_of(engine.hf_config)
        assert mixture is not None and mixture.bias_rate > 0
        self._engine, self._rate = engine, mixture.bias_rate
        self._index = {layer: index for index, layer in enumerate(mixture.layers)}
        self._routers = routers_of(engine.chunks)
        shape = (len(mixture.layers), mixture.num_choices)
        self.counts = torch.zeros(shape, dtype=torch.float64, device=engine.groups.device)
        """The number of tokens on this rank that chose each expert since the last call of `clear`, [L, C]."""

    def clear(self) -> None:
        """Set the counts to zero. It must be called before a step."""
        self.counts.zero_()

    @torch.no_grad()
    def add(self, layer: int, choice: Choice) -> None:
        """Count the choices of a layer's router for real tokens."""
        self.counts[self._index[layer]] += choice.counts()

    def update(self, totals: Tensor, stage: int) -> None:
        """Change the biases of this rank's routers. Biases of a router that is frozen are not changed.

        Args:
            totals: The sum [L, C] of `counts` over all ranks.
            stage: The index of the stage of training.
        """
        for layer, router in self._routers.items():
            assert router.score_bias is not None
            if not self._engine.settings[id(router.weight)].in_stage(stage).frozen:
                balance(router.score_bias, totals[self._index[layer]], self._rate)
