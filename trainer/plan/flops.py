"""Floating-point operations of a step; a multiply-add counts as two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.llm.delta_rule import CHUNK_TOKENS
from model.llm.features import attention_layers, delta_sizes
from model.llm.names import head_dim
from trainer.config.schema import Recipe
from trainer.plan.layer_time import bounds_scores
from trainer.plan.sizes import PartSizes, SizedModel
from trainer.plan.workload import EncoderWork, Workload


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one step, over the whole global batch."""

    llm: float
    """The FLOPs of the LLM, without recomputation."""
    encoders: float
    """The FLOPs of all encoders, without recomputation."""
    recomputed: float
    """The additional FLOPs of activation checkpointing."""
    masked_attention: float = 0.0
    """The FLOPs that causal attention saves. NVIDIA's definition of MFU includes them."""

    @property
    def model(self) -> float:
        """The model FLOPs, which are the FLOPs of the LLM and the encoders without recomputation."""
        return self.llm + self.encoders


def step_flops(
    recipe: Recipe, model: SizedModel, parts: PartSizes, workload: Workload, work: Sequence[EncoderWork]
) -> Flops:
    """Return the FLOPs of a step.

    The forward pass takes 2 FLOPs per weight and token (Kaplan et al. 2020, arXiv 2001.08361). The backward pass takes
    the same number for the gradients of the inputs, and the same number again for the gradients of trainable weights.
    Frozen encoders have no backward pass. Causal attention within each segment is added. Norms and activation functions
    are not counted.
    """
    llm_forward = llm_forward_flops(model, workload)
    masked = causal_attention_flops(model, workload)
    llm = llm_forward * (2 + parts.llm.learned / parts.llm.total)
    encoders = recomputed = 0.0
    for one in work:
        forward = float(one.cost.sum())
        trains = are_trained(model, parts, one)
        encoders += forward * (3 if trains else 1)
        again = recipe.train.recompute_encoders + recipe.train.recompute_encoder_calls
        recomputed += forward * again if trains else 0.0
    recomputed += masked if bounds_scores(model.llm) else 0.0
    attention = masked + linear_attention_flops(model, workload)
    recomputed += {"none": 0.0, "pointwise": 0.0, "selective": attention, "full": llm_forward}[
        recipe.train.recompute_llm
    ]
    return Flops(llm, encoders, recomputed, masked * 3)


def llm_forward_flops(model: SizedModel, workload: Workload) -> float:
    """Return the FLOPs of the LLM's forward pass over all tokens of the global batch."""
    attention = causal_attention_flops(model, workload) + linear_attention_flops(model, workload)
    return 2.0 * model.llm_matrices * workload.tokens + attention


def linear_attention_flops(model: SizedModel, workload: Workload) -> float:
    """Return the FLOPs of the gated delta rule in the LLM's forward pass (`model.llm.delta_rule`).

    A head with the widths K and V multiplies each token by its state three times, which takes 6 K V FLOPs. In a chunk
    of C tokens, it computes two matrices of scores, solves a triangular system for K + V columns, and multiplies the
    values by scores. These take 5 C K + 3 C V FLOPs per token.
    """
    count = sum(layer.is_linear for layer in attention_layers(model.llm))
    if not count:
        return 0.0
    sizes = delta_sizes(model.llm)
    key, value = sizes.key_width, sizes.value_width
    of_token = sizes.value_heads * (6.0 * key * value + CHUNK_TOKENS * (5 * key + 3 * value))
    return count * of_token * workload.tokens


def causal_attention_flops(model: SizedModel, workload: Workload) -> float:
    """Return the FLOPs of causal attention in the LLM's forward pass, which are half the FLOPs of full attention.

    With a window of w tokens, a sample of n > w tokens needs w n - w²/2 scores instead of n²/2.
    """
    config, tokens = model.llm, workload.num_tokens.astype(np.float64)
    width, scores = config.num_attention_heads * head_dim(config), 0.0
    windows = Counter(layer.window for layer in attention_layers(config) if not layer.is_linear)
    for window, count in windows.items():
        seen = tokens if window is None else np.minimum(tokens, window)
        scores += count * float((seen * tokens - seen**2 / 2).sum())
    return 4.0 * width * scores


def are_trained(model: SizedModel, parts: PartSizes, work: EncoderWork) -> bool:
    """Return whether any encoder of `work` is trained. If so, the encoder calls have a backward pass."""
    primary = model.config.primary
    prefixes = (
        "audio.primary" if primary is not None and name == primary.name else f"audio.experts.{name}"
        for name in work.names
    )
    return any(prefix in parts.trained for prefix in prefixes)
