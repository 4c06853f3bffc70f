"""The export of the LLM's low-rank adapters as a folder that peft loads on top of the original LLM."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from model.config import is_factor
from model.errors import UserError
from model.lora import Adapters
from trainer.export.source import LLM, Source

WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def adapter_names(source: Source) -> dict[str, str]:
    """Return the names of all factors of the LLM's low-rank adapters: peft's name → name in the checkpoint.

    Raises:
        UserError: If the LLM has no adapter, if other weights of the LLM were trained, which an adapter cannot contain,
            or if an adapter belongs to a part of a tensor in transformers.
    """
    saved = {name: entry for name, entry in source.reader.manifest.tensors.items() if name.startswith(LLM)}
    factors = {f"{_PREFIX}{name.removeprefix(LLM)}.weight": name for name in saved if is_factor(name)}
    where = f"{source.folder.url}: --adapter"
    if not factors:
        raise UserError(f"{where}: the LLM has no adapters; export without --adapter")
    stacked = {LLM + part.name for tensor in source.stacked().values() for part in tensor.parts}
    within = sorted(name for name in factors.values() if f"{name.rpartition('.')[0]}.weight" in stacked)
    if within:
        raise UserError(
            f"{where}: {within[0]} belongs to an expert, which transformers stores in one tensor with all experts, so "
            "peft cannot adapt it; export with --merge"
        )
    learned = sorted(name for name, entry in saved.items() if entry.step is not None and not is_factor(name))
    if learned:
        raise UserError(
            f"{where}: {len(learned)} other tensors of the LLM were trained, such as {learned[0]}, and an adapter does "
            "not contain them; export with --merge, or train with optim.parts that freeze llm.*"
        )
    return factors


def write_adapter_config(source: Source, folder: Path) -> None:
    """Write the settings from which peft builds the adapters of `adapter_names`."""
    adapters = Adapters(source.recipe.lora)
    layers = [name.removesuffix(".lora_A") for name in adapter_names(source).values() if name.endswith(".lora_A")]
    parts = {name.removeprefix(LLM): adapters.of_layer(name) for name in layers}
    ranks = {name: part.rank for name, part in parts.items() if part is not None}
    alphas = {name: part.alpha for name, part in parts.items() if part is not None}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.recipe.model.llm.weights,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(parts),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
