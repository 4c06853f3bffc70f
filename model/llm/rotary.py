"""The frequencies of rotary embeddings, as in transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.llm.families import family_of
from model.llm.features import rope_sets
from model.llm.names import head_dim

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary embedding that rotates R of the D channels of a head."""

    key: str
    """The name of this embedding, to which `AttentionLayer.rope` refers."""
    inv_freq: Tensor
    """The inverse frequencies [R/2] in fp32."""
    scaling: float
    """The factor by which the cosines and sines are multiplied."""
    in_fp32: bool = False
    """True if queries and keys are rotated in fp32, regardless of their dtype."""


def rotary_embeddings(hf_config: PretrainedConfig) -> dict[str, Rotary]:
    """Return the rotary embeddings of an LLM by `AttentionLayer.rope`.

    Embeddings of the type longrope are correct only for sequences of up to `original_max_position_embeddings` tokens,
    since transformers uses `short_factor` only up to this length.
    """
    found, in_fp32 = {}, family_of(hf_config).rotates_in_fp32
    for key, rope in rope_sets(hf_config).items():
        if rope["rope_type"] == "default":
            width = int(head_dim(hf_config) * rope.get("partial_rotary_factor", 1.0))
            inv_freq = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width))
            found[key] = Rotary(key, inv_freq, 1.0, in_fp32)
        else:
            initial = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
            with torch.device("cpu"):  # YaRN uses the default device, which is meta in `earshot plan`.
                inv_freq, scaling = initial(hf_config, torch.device("cpu"), layer_type=key or None)
            found[key] = Rotary(key, inv_freq, float(scaling), in_fp32)
    return found


def num_positions(hf_config: PretrainedConfig) -> int:
    """Return the number of positions that the LLM's rotary embeddings support, including any configured scaling."""
    positions = int(hf_config.max_position_embeddings)
    for rope in rope_sets(hf_config).values():
        stretched, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if rope["rope_type"] == "longrope":
            positions = min(positions, int(rope["original_max_position_embeddings"]))
        elif stretched is not None and factor is not None:
            positions = min(positions, int(stretched * factor))
    return positions
