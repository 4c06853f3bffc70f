"""A plan's assumptions about mechanisms that published runs use but the trainer lacks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Mechanisms:
    """The mechanisms that a plan assumes. The defaults describe the trainer.

    `bench.plan_published` sets them to compare the plan with runs of other trainers. The output of a plan lists the
    mechanisms that differ from the defaults, because the trainer cannot run such a plan.
    """

    context: int = 1
    """The number of ranks that share each sequence and exchange keys and values in a ring during attention. The trainer
    gathers them before attention instead (`parallel.context`)."""
    overlap_tensor: bool = False
    """True if tensor-parallel collectives run in TP chunks, of which all but the first overlap with matmuls."""
    sequence_parallel: bool = True
    """True for sequence parallelism; False if ranks all-reduce and each rank computes all norms and residuals."""
    fused_kernels: bool = False
    """True if norms, rotary embedding, activation and gradient accumulation are one kernel each, as in
    TransformerEngine."""
    fused_attention: bool = True
    """True for fused attention; False if attention computes all scores [heads, t, t] and writes them to memory."""
    fp8: bool = False
    """True if the matmuls of the layers run in fp8, at twice the bf16 rate."""
    fp8_weights: bool = False
    """True if the weights of the layers are stored in fp8 without transposed copies, and gathered in fp8."""
    recompute_attention: bool = False
    """True if the backward pass runs attention again from its queries, keys and values (Megatron's `core_attn`)."""
    mlp: Literal["kept", "graphed", "recomputed"] = "kept"
    """What happens to the activations of each layer's second norm and MLP, except the norm's input. `kept`: they are
    kept. `recomputed`: the backward pass computes them again. `graphed`: CUDA graphs, one per layer and micro-batch,
    hold them in a pool of their own. PyTorch counts this pool as allocated only while the graphs are captured, after
    the first steps."""
    sharded_weights: bool = False
    """True if the LLM's weights are sharded over replicas, and gathered for each layer in each pass (FSDP)."""

    def labels(self) -> list[str]:
        """Return the assumptions that differ from the trainer, as `name=value`."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return [f"{f.name}={str(getattr(self, f.name)).lower()}" for f in changed]


AS_BUILT = Mechanisms()
"""The assumptions that describe the trainer."""
