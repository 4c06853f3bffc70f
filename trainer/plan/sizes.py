"""Parameter counts of a recipe's model, computed without weights and without network access."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from model.audio_tower import AudioTower
from model.config import EncoderConfig, ModelConfig, is_factor
from model.encoders.hf_config import resolve
from model.errors import UserError
from model.lora import NO_ADAPTERS, Adapters, adaptable_layers, add_adapters, llm_layers, llm_shapes, unknown_factor
from trainer.config.checks import known_encoder, known_llm_config
from trainer.config.schema import Recipe
from trainer.engine.optim import OptimConfig, check_patterns, setting_of


@dataclass(frozen=True)
class Size:
    """The number of parameters of a part of the model."""

    total: int = 0
    learned: int = 0
    """The number of those that are trainable."""

    def __add__(self, other: Size) -> Size:
        return Size(self.total + other.total, self.learned + other.learned)


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

    def tower(self, held: Collection[str] | None = None) -> AudioTower:
        """Build the audio side on the meta device, which takes no memory.

        Args:
            held: names of the encoder experts to build; None builds all.
        """
        with torch.device("meta"):
            tower = AudioTower(self.config, self.llm.hidden_size, self.vocab_size, held)
            add_adapters(tower, "audio.", self.adapters)
        return tower


def sized_model(recipe: Recipe) -> SizedModel:
    """Return the recipe's model with all sizes resolved.

    A tokenizer given by `data.tokenizer.path` is assumed to be the LLM's own.

    Raises:
        UserError: If a model is a hub id without `config`, since its sizes are then unknown.
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
        UserError: If a pattern in `optim.parts` matches no parameter, or one in `lora` no layer.
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
    return sizes


def _sized(place: str, encoder: EncoderConfig) -> EncoderConfig:
    known = known_encoder(encoder)
    if known is None:
        raise _unknown_size(place, encoder.weights)
    if known.weights is None:
        return known
    stored = resolve(known).hf_config
    shared = {f.name for f in dataclasses.fields(PretrainedConfig)}
    own = [f.name for f in dataclasses.fields(stored) if f.name not in shared]
    return dataclasses.replace(known, weights=None, config={name: getattr(stored, name) for name in own})


def _unknown_size(place: str, weights: str | None) -> UserError:
    return UserError(
        f"{place}.weights = {weights}: a plan does not download anything; give the checkpoint's sizes in "
        f"{place}.config, or give a local directory"
    )


def _size(optim: OptimConfig, name: str, shape: tuple[int, ...], learns: bool = True) -> Size:
    count = math.prod(shape)
    return Size(count, count if learns and not setting_of(optim, name, len(shape)).frozen else 0)
