"""The router losses of an LLM with experts. One balances the experts, and the other limits the router's scores.

Both losses are averaged over the layers with experts. Each is computed from sums over samples or tokens, so it does not
depend on how samples are divided into micro-batches and among ranks. Other definitions do depend on this: Megatron-core
multiplies averages over a micro-batch, and transformers multiplies averages over the batch and all layers.

Shapes: n tokens, S samples, E experts (including null experts), k chosen experts per token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.llm.experts import Choice
from model.losses.base import Loss


@dataclass(frozen=True)
class RoutedTokens:
    """The choices of one layer's router for tokens of S samples. Other ranks may hold other tokens of these samples."""

    choice: Choice
    """The choices for the n tokens on this rank."""
    samples: Tensor
    """The index [n] int64 of each token's sample, from 0 to S - 1."""
    lengths: Tensor
    """The number of tokens [S] of each sample, including those on other ranks."""
    reduce: Callable[[Tensor], Tensor]
    """A function that sums a tensor over the ranks that hold tokens of these samples. The sum has no gradient."""


class RouterLoss(Loss):
    """A loss that is computed from the choices of the LLM's routers."""

    @abstractmethod
    def sum(self, tokens: RoutedTokens, config: ModelConfig) -> Tensor:
        """Return this rank's contribution to the sum for one layer, as an fp32 scalar with a gradient.

        Collective: every rank that holds tokens of these samples must call it, because it may call `tokens.reduce`.
        """


class ExpertBalance(RouterLoss):
    """The mean over samples of E/k · Σᵢ fᵢ·Pᵢ. The loss is 1 if every expert is chosen equally often.

    fᵢ is the fraction of the sample's tokens that choose expert i, and Pᵢ is the mean probability of expert i over
    these tokens. The loss is that of Switch Transformer (arXiv 2101.03961), but is computed per sample, as in
    DeepSeek-V3 (arXiv 2412.19437).
    """

    name = "expert_balance"

    def count(self, batch: Batch, config: ModelConfig) -> int:
        """Return the number of samples."""
        return len(batch.samples)

    def sum(self, tokens: RoutedTokens, config: ModelConfig) -> Tensor:
        """Return this rank's contribution to the sum over samples."""
        choice = tokens.choice
        num_experts, top_k = choice.logits.shape[1], choice.experts.shape[1]
        none = choice.logits.new_zeros(len(tokens.lengths), num_experts)
        chosen = torch.zeros_like(choice.logits).scatter(1, choice.experts, 1.0)
        frequencies = tokens.reduce(none.index_add(0, tokens.samples, chosen)) / tokens.lengths[:, None]
        probabilities = none.index_add(0, tokens.samples, choice.logits.softmax(-1)) / tokens.lengths[:, None]
        return num_experts / top_k * (frequencies * probabilities).sum()


class RouterZ(RouterLoss):
    """The mean over tokens of the squared log-sum-exp of the router's scores (ST-MoE, arXiv 2202.08906)."""

    name = "router_z"

    def count(self, batch: Batch, config: ModelConfig) -> int:
        """Return the number of tokens that the LLM reads."""
        return sum(sample.num_tokens for sample in batch.samples)

    def sum(self, tokens: RoutedTokens, config: ModelConfig) -> Tensor:
        """Return this rank's contribution to the sum over tokens."""
        return tokens.choice.logits.logsumexp(-1).square().sum()
