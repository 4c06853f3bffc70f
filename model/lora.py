"""Low-rank adapters (LoRA, arXiv 2106.09685): a linear layer computes W·x + s·B·A·x, usually with a frozen W.

The adapters are added to a model after it has been built. Each consists of two parameters of the layer, `lora_A` [rank,
inputs] and `lora_B` [outputs, rank], and a forward hook that adds s·B·A·x to the layer's output. The hook does not read
W, so W may have any storage format. `model.llm.lora` adds the same adapters to Megatron's parallel layers.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig

from model.config import LoraConfig
from model.errors import UserError
from model.llm.names import hf_shapes

FACTORS = ("lora_A", "lora_B")
LLM = "llm."
_LLM_LAYER = re.compile(
    r"llm\.model\.layers\.\d+\.(self_attn\.([qkvo]|qkv)_proj|mlp\.(experts\.[^.]+\.|shared_expert\.)?(gate|up|down|gate_up)_proj"
    r"|block_sparse_moe\.experts\.\d+\.w[123]|linear_attn\.(in_proj_(qkv|z|b|a)|out_proj))"
)
_ENCODER = re.compile(r"audio\.(primary|experts\.[^.]+\.encoder)\..+")
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)
"""The groups of the LLM's projections that form one matrix in training, and that can therefore only be frozen
together."""

Initial = Callable[[str, tuple[int, int]], Tensor]
"""A function that returns the initial values of a factor in fp32, given the factor's full name and shape."""


def unknown_factor(name: str, shape: tuple[int, int]) -> Tensor:
    """Return a factor on the meta device, for models of which only the shapes are needed."""
    return torch.empty(shape, device="meta")


def initial_factor(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Return the initial values of a factor: zeros for B, and uniformly distributed values for A, as in peft.

    The values depend only on the seed, the name and the shape, so they are the same for every topology.
    """
    if name.endswith("lora_B"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.rand(shape, generator=generator, device="cpu")
    return (2 * values - 1) / math.sqrt(shape[1])


@dataclass(frozen=True)
class Adapters:
    """The adapters of a recipe, and their initial values."""

    parts: tuple[LoraConfig, ...] = ()
    initial: Initial = partial(initial_factor, seed=0)

    @classmethod
    def of(cls, parts: Sequence[LoraConfig], seed: int) -> Adapters:
        """Return the adapters of the recipe section `lora`, with initial values from `seed`."""
        return cls(tuple(parts), partial(initial_factor, seed=seed))

    def of_layer(self, name: str) -> LoraConfig | None:
        """Return the settings for a layer's adapter.

        Args:
            name: The name of the layer, `audio.…` or `llm.…`.

        Returns:
            The last entry that matches; None if the layer has no adapter.
        """
        if not can_adapt(name):
            return None
        return next((p for p in reversed(self.parts) if fnmatch.fnmatchcase(name, p.pattern)), None)

    def freezes(self, name: str) -> bool:
        """Return whether the weight and the bias of the layer `name` are frozen because of an adapter."""
        parts = (self.of_layer(other) for other in _fused_with(name))
        return any(part is not None and not part.train_base for part in parts)

    def check(self, names: Iterable[str]) -> None:
        """Check that every pattern matches a layer.

        Args:
            names: The names of all layers of the model that can be adapted; see `can_adapt`.

        Raises:
            UserError: If a pattern matches nothing. The message contains the pattern and the most similar names.
        """
        names = sorted(set(names))
        for part in self.parts:
            if not fnmatch.filter(names, part.pattern):
                raise UserError(
                    f"lora: pattern = {part.pattern}: matches no linear layer; the nearest names are "
                    f"{', '.join(_nearest(part.pattern, names)) or 'none'}; correct the pattern"
                )

    def factor_shapes(self, weights: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, int]]:
        """Return the shapes of the factors by name.

        Args:
            weights: The names and shapes of weights; names end with `.weight`.
        """
        shapes = {}
        for name, shape in weights:
            layer = name.removesuffix(".weight")
            part = self.of_layer(layer) if layer != name and len(shape) == 2 else None
            if part is not None:
                shapes[f"{layer}.lora_A"] = (part.rank, shape[1])
                shapes[f"{layer}.lora_B"] = (shape[0], part.rank)
        return shapes


NO_ADAPTERS = Adapters()


def can_adapt(name: str) -> bool:
    """Return whether the linear layer `name` can have an adapter, as the LLM's projections and encoder layers can."""
    return bool(_LLM_LAYER.fullmatch(name) or _ENCODER.fullmatch(name))


def llm_shapes(hf_config: PretrainedConfig, adapters: Adapters) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of the LLM and its adapters by name, without the prefix `llm.`."""
    shapes = hf_shapes(hf_config)
    factors = adapters.factor_shapes((LLM + name, shape) for name, shape in shapes.items())
    return {**shapes, **{name.removeprefix(LLM): shape for name, shape in factors.items()}}


def llm_layers(hf_config: PretrainedConfig) -> list[str]:
    """Return the names of the LLM's layers that can have an adapter, with the prefix `llm.`."""
    names = (LLM + name.removesuffix(".weight") for name, shape in hf_shapes(hf_config).items() if len(shape) == 2)
    return [name for name in names if can_adapt(name)]


def adaptable_layers(module: nn.Module, prefix: str) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers within `module` that can have an adapter, with their full names.

    Args:
        module: A module of plain PyTorch, such as the audio tower or the single-process model.
        prefix: The full name of `module` and a dot; empty for the single-process model.
    """
    named = ((prefix + path, layer) for path, layer in module.named_modules())
    return [(name, layer) for name, layer in named if isinstance(layer, nn.Linear) and can_adapt(name)]


def add_adapters(module: nn.Module, prefix: str, adapters: Adapters) -> None:
    """Add the adapters to the linear layers within `module`, and freeze weights according to `Adapters.freezes`.

    Args:
        module: See `adaptable_layers`; its weights must be loaded already.
        prefix: See `adaptable_layers`.
        adapters: The adapters.
    """
    for name, layer in adaptable_layers(module, prefix):
        if adapters.freezes(name):
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
        part = adapters.of_layer(name)
        if part is not None:
            shapes = ((part.rank, layer.in_features), (layer.out_features, part.rank))
            for factor, shape in zip(FACTORS, shapes, strict=True):
                values = adapters.initial(f"{name}.{factor}", shape).to(layer.weight, copy=True)
                layer.register_parameter(factor, nn.Parameter(values))
            layer.register_forward_hook(partial(_add_product, scale=part.scale))


def _add_product(layer: nn.Module, args: tuple[Any, ...], output: Tensor, *, scale: float) -> Tensor:
    return output + scale * linear(linear(args[0], layer.lora_A), layer.lora_B)  # type: ignore[arg-type]


def _fused_with(name: str) -> list[str]:
    """Return `name` and the other layers whose weights form one matrix with the weight of `name` in training."""
    prefix, _, own = name.rpartition(".")
    for group in _FUSED if name.startswith(LLM) else ():
        if own in group:
            return [f"{prefix}.{other}" for other in group]
    return [name]


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three names similar to the pattern, in which `*` replaces the numbers of layers."""
    last = pattern.rpartition(".")[2]

    def likeness(kind: str) -> tuple[float, float]:
        ends = difflib.SequenceMatcher(None, last, kind.rpartition(".")[2]).ratio()
        return ends, difflib.SequenceMatcher(None, pattern, kind).ratio()

    kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    return sorted(kinds, key=lambda kind: (likeness(kind), kind), reverse=True)[:3]
