"""Parameter counts of a recipe's model, computed without weights and without network access."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig

from model.audio_tower import AudioTower
from model.config import EncoderConfig, ModelConfig, is_factor
from model.errors import UserError
from model.hub.configuration import self_contained
from model.llm.names import hf_shapes
from model.lora import NO_ADAPTERS, Adapters, adaptable_layers, add_adapters, llm_layers, llm_shapes, unknown_factor
from trainer.config.checks import known_encoder
from trainer.config.llm_checks import known_llm_config
from trainer.config.schema import Recipe
from trainer.engine.optim import OptimConfig, check_patterns, setting_of
from trainer.engine.stages import Stage, StagedOptim, check_stages
from trainer.plan.experts import as_dense

_PERSISTENT = 100_000
"""The default of DeepSpeed's `stage3_param_persistence_threshold`."""


@dataclass(frozen=True)
class Size:
    """The number of parameters of a part of the model."""

    total: int = 0
    learned: int = 0
    """The number of trainable parameters."""
    large: int = 0
    """The number of tensors that ZeRO-3 gathers, because they have more than 100,000 elements."""

    def __add__(self, other: Size) -> Size:
        return Size(self.total + other.total, self.learned + other.learned, self.large + other.large)


@dataclass(frozen=True)
class PartSizes:
    """The sizes of the model's parts. They are summed in advance because a search needs them for every layout."""

    layers: Size
    """All layers of the LLM."""
    embedding: Size
    """The LLM's embedding."""
    ends: Size
    """The LLM's embedding and output layer."""
    llm: Size
    """The whole LLM."""
    shared: Size
    """The audio modules without encoder experts."""
    experts: dict[str, Size]
    """The encoder experts, by name."""
    depths: dict[str, int]
    """The number of layers of each encoder, by its prefix (`audio.primary` or `audio.experts.NAME`)."""
    trained: frozenset[str]
    """The prefixes of the encoders with trainable weights or adapters."""

    @property
    def encoder_width(self) -> float:
        """The width of a square matrix as large as the audio modules' mean large tensor."""
        total = sum(self.experts.values(), self.shared)
        return math.sqrt(total.total / total.large) if total.large else 64.0


def part_sizes(sizes: dict[str, Size]) -> PartSizes:
    """Return the sizes of the model's parts, given the sizes of its parameters."""

    def add(found: dict[str, Size], key: str, size: Size) -> None:
        found[key] = found.get(key, Size()) + size

    parts: dict[str, Size] = {}
    experts: dict[str, Size] = {}
    layers: dict[str, set[str]] = {}
    trained: set[str] = set()
    for name, size in sizes.items():
        words = name.split(".")
        if words[0] == "llm":
            add(parts, "llm", size)
            if name.startswith("llm.model.layers."):
                add(parts, "layers", size)
            elif name == "llm.model.embed_tokens.weight":
                add(parts, "embedding", size)
            elif name == "llm.lm_head.weight":
                add(parts, "head", size)
            continue
        prefix = ".".join(words[: 3 if words[1] == "experts" else 2])
        if words[1] == "experts":
            add(experts, words[2], size)
        else:
            add(parts, "shared", size)
        if size.learned and name.startswith(f"{prefix}.encoder."):
            trained.add(prefix)
        if "layers" in words:
            layers.setdefault(prefix, set()).add(words[words.index("layers") + 1])
    none = Size()
    embedding = parts.get("embedding", none)
    return PartSizes(
        parts.get("layers", none),
        embedding,
        embedding + parts.get("head", none),
        parts.get("llm", none),
        parts.get("shared", none),
        experts,
        {prefix: len(numbers) for prefix, numbers in layers.items()},
        frozenset(trained),
    )


@dataclass(frozen=True)
class SizedModel:
    """A model in which the shape of every tensor is known."""

    config: ModelConfig
    """The recipe's model, with explicit encoder sizes in place of checkpoints."""
    llm: PretrainedConfig
    vocab_size: int
    """The vocabulary size of the tokenizer."""
    adapters: Adapters = NO_ADAPTERS
    """The low-rank adapters of the LLM and of encoders."""

    @cached_property
    def llm_matrices(self) -> int:
        """The number of weights in the matrices of the LLM, by which each token's vector is multiplied."""
        config = as_dense(self.llm)
        shapes = (shape for name, shape in hf_shapes(config).items() if "embed_tokens" not in name)
        tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
        return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2) + tied

    def tower(self, held: Collection[str] | None = None) -> AudioTower:
        """Build the audio modules on the meta device, where they use no memory.

        Args:
            held: The names of the encoder experts to build; None for all.
        """
        with torch.device("meta"):
            tower = AudioTower(self.config, self.llm.hidden_size, self.vocab_size, held)
            add_adapters(tower, "audio.", self.adapters)
        return tower

    def shared_tower(self, held: Collection[str]) -> AudioTower:
        """Return the result of `tower`, which is built only once. Callers must not change it."""
        key = frozenset(held)
        if key not in self._towers:
            self._towers[key] = self.tower(held)
        return self._towers[key]

    @cached_property
    def _towers(self) -> dict[frozenset[str], AudioTower]:
        return {}


def sized_model(recipe: Recipe) -> SizedModel:
    """Return the recipe's model with all sizes resolved.

    A tokenizer given by `data.tokenizer.path` is assumed to be the LLM's own.

    Raises:
        UserError: If the sizes of a model are unknown because the recipe names a hub id without `config`.
    """
    model = recipe.model
    llm = known_llm_config(model.llm)
    if llm is None:
        raise _unknown_size("model.llm", model.llm.weights)
    primary = None if model.primary is None else _sized("model.primary", model.primary)
    experts = tuple(_sized(f"model.experts[{i}]", e) for i, e in enumerate(model.experts))
    tokenizer = recipe.data.tokenizer
    vocab_size = llm.vocab_size if tokenizer.path is not None else tokenizer.train_vocab_size
    adapters = Adapters(recipe.lora, unknown_factor)
    return SizedModel(dataclasses.replace(model, primary=primary, experts=experts), llm, vocab_size, adapters)


def parameter_sizes(model: SizedModel, optim: OptimConfig) -> dict[str, Size]:
    """Return the size of every parameter of the model.

    Names begin with `audio.`, or with `llm.` followed by the Hugging Face name.

    Raises:
        UserError: If a pattern in `optim.parts` matches no parameter, or a pattern in `lora` matches no layer.
    """
    tower, adapters = model.tower(), model.adapters
    adapters.check([*llm_layers(model.llm), *(name for name, _ in adaptable_layers(tower, "audio."))])
    named = tower.named_parameters()
    sizes = {f"audio.{n}": _size(optim, f"audio.{n}", tuple(p.shape), p.requires_grad) for n, p in named}
    for hf_name, shape in llm_shapes(model.llm, adapters).items():
        name = f"llm.{hf_name}"
        learns = is_factor(name) or not adapters.freezes(name.rpartition(".")[0])
        sizes[name] = _size(optim, name, shape, learns)
    check_patterns(optim, sizes)
    check_stages(optim, sizes)
    return sizes


def stage_sizes(model: SizedModel, stage: Stage) -> dict[str, Size]:
    """Return the size of every parameter of the model. Only parameters that are trained in `stage` count as learned."""
    settings = {f.name: getattr(stage.optim, f.name) for f in dataclasses.fields(OptimConfig)}
    return parameter_sizes(model, StagedOptim(**settings, stages=(stage,)))


def _sized(place: str, encoder: EncoderConfig) -> EncoderConfig:
    known = known_encoder(encoder)
    if known is None:
        raise _unknown_size(place, encoder.weights)
    return known if known.weights is None else EncoderConfig(**self_contained(known))


def _unknown_size(place: str, weights: str | None) -> UserError:
    return UserError(
        f"{place}.weights = {weights}: a plan does not download anything; set the checkpoint's sizes in "
        f"{place}.config, or use a local directory"
    )


def _size(optim: OptimConfig, name: str, shape: tuple[int, ...], learns: bool = True) -> Size:
    count = math.prod(shape)
    trained = learns and not setting_of(optim, name, len(shape)).frozen
    return Size(count, count if trained else 0, int(count > _PERSISTENT))
