"""The tensors of gated delta networks in Hugging Face, and the part of each on a tensor-parallel rank.

Tensors are named by their role in `model.llm.families.QWEN3_5_MODULES` and the last part of their name.
"""

from __future__ import annotations

import re

from transformers import PretrainedConfig

from model.llm.features import DeltaSizes, delta_sizes

Index = tuple[slice, ...]

DELTA = re.compile(r"^self_attention\.(in_proj\.weight|conv1d\.weight|dt_bias|A_log)$")
"""A pattern for the Megatron parameters of a gated delta network that are split by heads."""


def delta_shapes(hf_config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a gated delta network."""
    sizes, hidden = delta_sizes(hf_config), hf_config.hidden_size
    channels = 2 * sizes.keys + sizes.values
    return {
        "delta.dt_bias": (sizes.value_heads,),
        "delta.A_log": (sizes.value_heads,),
        "delta_convolution.weight": (channels, 1, sizes.kernel),
        "delta_norm.weight": (sizes.value_width,),
        "delta_output.weight": (hidden, sizes.values),
        "delta_inputs.weight": (channels, hidden),
        "delta_gate.weight": (sizes.values, hidden),
        "delta_rate.weight": (sizes.value_heads, hidden),
        "delta_decay.weight": (sizes.value_heads, hidden),
    }


def delta_parts(parameter: str, sizes: DeltaSizes, tp_rank: int, tp_size: int) -> list[tuple[str, Index]]:
    """Return the parts of a Megatron parameter on a rank, in order along dimension 0.

    Args:
        parameter: The first group of `DELTA`.
        sizes: The sizes of the gated delta network over all ranks.
        tp_rank: The tensor-parallel rank.
        tp_size: The tensor-parallel size.

    Returns:
        The Hugging Face tensor and the index within it, for each part.
    """
    whole = slice(None)

    def own(first: int, count: int) -> slice:
        return slice(first + tp_rank * count // tp_size, first + (tp_rank + 1) * count // tp_size)

    inputs = [own(0, sizes.keys), own(sizes.keys, sizes.keys), own(2 * sizes.keys, sizes.values)]
    if parameter == "conv1d.weight":
        return [("delta_convolution.weight", (rows, whole, whole)) for rows in inputs]
    if parameter != "in_proj.weight":
        return [(f"delta.{parameter}", (own(0, sizes.value_heads),))]
    others = {"gate": sizes.values, "rate": sizes.value_heads, "decay": sizes.value_heads}
    return [
        *(("delta_inputs.weight", (rows, whole)) for rows in inputs),
        *((f"delta_{role}.weight", (own(0, count), whole)) for role, count in others.items()),
    ]
