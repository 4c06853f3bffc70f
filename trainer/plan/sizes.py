"""What a recipe's model is made of, known without weights or network: encoders and LLM by their sizes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from model.audio_tower import AudioTower
from model.config import EncoderConfig, ModelConfig
from model.encoders.hf_config import resolve
from model.errors import UserError
from model.llm.names import hf_shapes
from trainer.config.checks import known_encoder, known_llm_config
from trainer.config.schema import Recipe
from trainer.engine.optim import OptimConfig, check_patterns, setting_of


@dataclass(frozen=True)
class Size:
    """Parameters of a part."""

    total: int = 0
    learned: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.total + other.total, self.learned + other.learned)


@dataclass(frozen=True)
class SizedModel:
    """A model whose every tensor has a known shape."""

    config: ModelConfig
    """The recipe's, with sizes in place of checkpoints."""
    llm: PretrainedConfig
    vocab_size: int
    """Of the tokenizer."""

    def tower(self, held: Collection[str] | None = None) -> AudioTower:
        """The audio side on the meta device: real modules without memory. `held`: see `AudioTower`."""
        with torch.device("meta"):
            return AudioTower(self.config, self.llm.hidden_size, self.vocab_size, held)


def sized_model(recipe: Recipe) -> SizedModel:
    """The recipe's model by its sizes. A tokenizer that exists already is taken to be the LLM's own.

    Raises:
        UserError: a hub id without `config`: its sizes are then unknown here.
    """
    model = recipe.model
    llm = known_llm_config(model.llm)
    if llm is None:
        raise _unknown_size("model.llm", model.llm.weights)
    primary = None if model.primary is None else _sized("model.primary", model.primary)
    experts = tuple(_sized(f"model.experts[{i}]", e) for i, e in enumerate(model.experts))
    tokenizer = recipe.data.tokenizer
    vocab_size = llm.vocab_size if tokenizer.path is not None else tokenizer.train_vocab_size
    return SizedModel(dataclasses.replace(model, primary=primary, experts=experts), llm, vocab_size)


def parameter_sizes(model: SizedModel, optim: OptimConfig) -> dict[str, Size]:
    """Every parameter of the model: `audio.…`, and `llm.…` by its Hugging Face name.

    Raises:
        UserError: an idle pattern in `optim.parts`.
    """
    named = model.tower().named_parameters()
    sizes = {f"audio.{n}": _size(optim, f"audio.{n}", tuple(p.shape), p.requires_grad) for n, p in named}
    sizes |= {f"llm.{name}": _size(optim, f"llm.{name}", shape) for name, shape in hf_shapes(model.llm).items()}
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
        f"{place}.weights = {weights}: a plan does not download; repeat the checkpoint's sizes in {place}.config, "
        "or give a local directory"
    )


def _size(optim: OptimConfig, name: str, shape: tuple[int, ...], learns: bool = True) -> Size:
    count = math.prod(shape)
    return Size(count, count if learns and not setting_of(optim, name, len(shape)).frozen else 0)
