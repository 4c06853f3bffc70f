"""Mechanisms that published runs use and the trainer does not have, as assumptions of a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanisms:
    """The assumptions under which a plan asks "what if"; the defaults describe the trainer as it is.

    `bench.plan_published` sets them to compare the plan with runs of other trainers. A plan that sets any of them says
    so in its output, because the trainer cannot run it.
    """

    virtual_stages: int = 1
    """The number of virtual stages per rank (interleaved 1F1B, arXiv 2104.04473)."""
    context: int = 1
    """The context-parallel size: the number of ranks that share each sequence."""
    overlap_data: bool = False
    """Collectives over replicas run during the last backward and the first forward pass of a step."""
    overlap_tensor: bool = False
    """Tensor-parallel collectives run in TP chunks during the matrix products; only the first chunk is waited for."""
    sequence_parallel: bool = True
    """False describes tensor parallelism that all-reduces and keeps norms and residuals whole on every rank."""
    fused_kernels: bool = False
    """TransformerEngine's fused norms, rotary embedding, activation and gradient accumulation."""
    fused_attention: bool = True
    """False describes attention that writes the scores [heads, t, t] to memory and computes them in full."""
    selective: bool = False
    """The backward pass recomputes attention's scores only (arXiv 2205.05198)."""
    fp8: bool = False
    """The layers' matrix products run in fp8, at twice the bf16 rate."""
    bf16_gradients: bool = False
    """The LLM's gradients are accumulated and reduced in bf16."""
    sharded_weights: bool = False
    """Weights of the LLM are sharded over replicas and gathered per layer and pass (FSDP)."""

    def labels(self) -> list[str]:
        """Return the assumptions that differ from the trainer, as `name=value`."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return [f"{f.name}={str(getattr(self, f.name)).lower()}" for f in changed]


AS_BUILT = Mechanisms()
"""The mechanisms of the trainer."""
