"""The export of the LLM's low-rank adapters as a folder that peft loads on top of the original LLM.

transformers stores a projection of all experts of a layer in one parameter. peft adapts such a parameter with two
matrices, which contain the factors of all experts (`peft.tuners.lora.layer.ParamWrapper`). The adapters of single
experts may have different ranks, so this module pads them with zeros to one rank.

Shapes: E experts, R rank of a parameter's adapter.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import LoraConfig, is_factor
from model.errors import UserError
from model.llm.families import mixture_of
from model.llm.stacked import EXPERTS_MODULE, FusedProjection, fused_projections
from model.lora import FACTORS, Adapters
from trainer.export.source import LLM, Source
from trainer.export.weights import Target

WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def adapter_names(source: Source) -> dict[str, str]:
    """Return the names of all factors of the LLM's low-rank adapters: peft's name → name in the checkpoint.

    The factors of an expert are named as if the expert were a separate module (see `fuse_expert_factors`).

    Raises:
        UserError: If the LLM has no adapter, or if other weights of the LLM were trained, which an adapter cannot
            contain.
    """
    saved = {name: entry for name, entry in source.reader.manifest.tensors.items() if name.startswith(LLM)}
    factors = {f"{_PREFIX}{name.removeprefix(LLM)}.weight": name for name in saved if is_factor(name)}
    where = f"{source.folder.url}: --adapter"
    if not factors:
        raise UserError(f"{where}: the LLM has no adapters; export without --adapter")
    learned = sorted(name for name, entry in saved.items() if entry.step is not None and not is_factor(name))
    if learned:
        raise UserError(
            f"{where}: {len(learned)} other tensors of the LLM were trained, such as {learned[0]}, and an adapter does "
            "not contain them; export with --merge, or train with optim.parts that freeze llm.*"
        )
    return factors


def fuse_expert_factors(source: Source, targets: Sequence[Target]) -> list[Target]:
    """Fuse the factors of experts whose weights share one parameter, and return all targets.

    Args:
        source: The checkpoint.
        targets: The factors, under the names of `adapter_names`.
    """
    layers, by_name = _adapted_layers(source), {target.name: target for target in targets}
    projections = _adapted_projections(source, layers)
    found, used = list[Target](), set[str]()
    for name, projection in projections.items():
        rank, places = _places(projection, layers)
        for factor in FACTORS:
            parts = [(place, by_name[_factor_name(layer, factor)]) for layer, place in places[factor].items()]
            used |= {part.name for _, part in parts}
            num_columns = rank * projection.num_experts
            shape = (num_columns, parts[0][1].shape[1]) if factor == "lora_A" else (projection.num_outputs, num_columns)
            fused = _factor_name(_wrapper_of(name, projections), factor)
            found.append(Target(fused, "", shape, parts[0][1].dtype, parts=tuple(parts)))
    return [target for target in targets if target.name not in used] + found


def write_adapter_config(source: Source, folder: Path) -> None:
    """Write the settings from which peft builds the adapters of `adapter_names`."""
    layers = _adapted_layers(source)
    projections = _adapted_projections(source, layers)
    within = {layer for projection in projections.values() for layer in projection.parts}
    modules = {name: part for name, part in layers.items() if name not in within}
    parameters: dict[str, LoraConfig] = {}
    if mixture_of(source.hf_config()) is not None:
        # peft would take a dense layer's projection for an expert's if the projection were listed as a module.
        parameters = {f"{name}.weight": part for name, part in modules.items() if ".mlp." in name}
        modules = {name: part for name, part in modules.items() if ".mlp." not in name}
    ranks = {name: part.rank for name, part in (modules | parameters).items()}
    alphas = {name: part.alpha for name, part in (modules | parameters).items()}
    for name, projection in projections.items():
        ranks[name], _ = _places(projection, layers)
        alphas[name] = ranks[name]  # B contains the factor alpha/rank of each expert.
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.recipe.model.llm.weights,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(modules),
        "target_parameters": sorted({*parameters, *projections}) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _adapted_layers(source: Source) -> dict[str, LoraConfig]:
    """Return the adapter settings of each LLM layer that has an adapter, by the layer's name in the checkpoint."""
    adapters, found = Adapters(source.recipe.lora), {}
    for name in adapter_names(source).values():
        layer = name.removesuffix(".lora_A")
        part = adapters.of_layer(layer) if layer != name else None
        if part is not None:
            found[layer.removeprefix(LLM)] = part
    return found


def _adapted_projections(source: Source, layers: Mapping[str, LoraConfig]) -> dict[str, FusedProjection]:
    """Return the fused parameters of transformers in which the part of at least one expert has an adapter."""
    found = fused_projections(source.hf_config())
    return {name: projection for name, projection in found.items() if not layers.keys().isdisjoint(projection.parts)}


@dataclass(frozen=True)
class _FactorPlace:
    """The place of an expert's factor in the fused factor of a parameter: A [E · R, inputs] or B [outputs, R · E]."""

    expert: int
    rank: int
    """The rank R of the fused factor."""
    own: slice
    """The part of R that the expert's factor occupies."""
    outputs: slice | None
    """The rows of B for the adapted projection, such as gate or up; None for A."""
    scale: float
    """The factor by which the values are multiplied."""

    def put(self, values: Tensor, whole: Tensor) -> None:
        """Implement `trainer.export.weights.Place`."""
        if self.outputs is None:
            whole.view(-1, self.rank, whole.shape[1])[self.expert, self.own].copy_(values)
        else:
            whole.view(whole.shape[0], self.rank, -1)[self.outputs, self.own, self.expert].copy_(self.scale * values)


def _places(
    projection: FusedProjection, layers: Mapping[str, LoraConfig]
) -> tuple[int, dict[str, dict[str, _FactorPlace]]]:
    """Return R, and for each of the factors A and B, the place of each adapted layer's factor by the layer's name.

    The gate and the up projection of an expert use different parts of R, since each has its own A.
    """
    widths, slices = Counter[int](), {}
    for layer, (expert, _) in projection.parts.items():
        if (part := layers.get(layer)) is not None:
            slices[layer] = slice(widths[expert], widths[expert] + part.rank)
            widths[expert] += part.rank
    rank = max(widths.values())
    places: dict[str, dict[str, _FactorPlace]] = {factor: {} for factor in FACTORS}
    for layer, own in slices.items():
        expert, outputs = projection.parts[layer]
        places["lora_A"][layer] = _FactorPlace(expert, rank, own, None, 1.0)
        places["lora_B"][layer] = _FactorPlace(expert, rank, own, outputs, layers[layer].scale)
    return rank, places


def _wrapper_of(parameter: str, adapted: Mapping[str, FusedProjection]) -> str:
    """Return the name of the peft module that contains the adapter of a parameter.

    peft wraps the module with the experts once for each adapted parameter. The last wrapper is the outermost.
    """
    module = parameter.rpartition(".")[0]
    assert module.endswith(EXPERTS_MODULE), parameter
    of_module = [name for name in adapted if name.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(of_module) - 1 - of_module.index(parameter))


def _factor_name(layer: str, factor: str) -> str:
    return f"{_PREFIX}{layer}.{factor}.weight"
