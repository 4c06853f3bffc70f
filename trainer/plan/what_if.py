"""How mechanisms that the trainer lacks change the memory of a layer of the LLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from model.llm.names import head_dim
from model.llm.stages import Recompute
from trainer.parallel.topology import Topology
from trainer.plan.layer_time import layer_products
from trainer.plan.mechanisms import Mechanisms


@dataclass(frozen=True)
class WhatIfBytes:
    """The bytes by which mechanisms change the memory of one layer on one rank."""

    kept: int
    """The change in the bytes that the layer keeps per micro-batch for the backward pass."""
    graphed: int
    """The bytes per micro-batch that the capture of CUDA graphs holds."""
    smaller_weights: int
    """The bytes by which the layer's weights are smaller."""


def what_if_bytes(
    hf_config: PretrainedConfig,
    topology: Topology,
    rows: int,
    dtype: torch.dtype,
    recompute: Recompute,
    mechanisms: Mechanisms,
) -> WhatIfBytes:
    """Return how mechanisms that the trainer lacks change the memory of a layer.

    Without sequence parallelism, every rank keeps the whole inputs and outputs of both norms. Attention without a fused
    kernel keeps 5 bytes per score: the softmax, the dropout mask and the dropout's output (Korthikanti et al. 2022).
    With fp8, the inputs of matmuls are kept in one byte per value. The output of attention is one of these inputs.
    Fused attention keeps it in bf16 for its own backward pass, too, unless the backward pass runs attention again.

    Args:
        hf_config: The configuration of the LLM.
        topology: The layout of the ranks.
        rows: The tokens of a micro-batch on a context-parallel rank.
        dtype: The dtype of weights and activations.
        recompute: The value of `train.recompute_llm`.
        mechanisms: The mechanisms.
    """
    h, tp, size = hf_config.hidden_size, topology.tp, dtype.itemsize
    ffn, width = hf_config.intermediate_size, hf_config.num_attention_heads * head_dim(hf_config)
    of_input = 1 if mechanisms.fp8 else size
    # The second norm's output, the outputs of the first matmul (gate and up), and the input of the second one.
    of_mlp = (h * of_input + 2 * ffn * size + ffn * of_input) / tp
    kept = graphed = 0.0
    if not mechanisms.sequence_parallel:
        kept += 4 * h * (1 - 1 / tp) * size
    if mechanisms.fp8:
        kept -= (2 * h + ffn) / tp * (size - 1)
        kept += width / tp * (1 - size if mechanisms.recompute_attention else 1)
    if not mechanisms.fused_attention and recompute != "selective":
        kept += 5 * hf_config.num_attention_heads / tp * rows
    if mechanisms.mlp != "kept":
        kept -= of_mlp
    if mechanisms.mlp == "graphed":  # Graphs read their input from a buffer, which the capture holds as well.
        graphed = of_mlp + h / tp * size
    weights = sum(n * k for n, k in layer_products(hf_config, tp))
    return WhatIfBytes(
        int(kept * rows), int(graphed * rows), int(weights * (size - 1)) if mechanisms.fp8_weights else 0
    )
