"""The interface of adapters, and their construction from a recipe.

Shapes: B clips, F frames, S audio tokens, D width. Σ denotes the sum over all clips.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

from torch import nn

from model.batch import Ragged
from model.config import AdapterConfig
from model.connectors.kinds import ADAPTERS
from model.errors import UserError
from model.table import load_entry


class Adapter(nn.Module, ABC):
    """A network that turns the features of a clip into one vector per audio token.

    The output for a clip must not depend on the other clips in the batch.

    Args:
        config: The recipe's `model.adapter`.
        input_dim: The width D of the features.

    Raises:
        UserError: If a value of `config` is invalid for this kind.
    """

    dim: int
    """The width of the output."""
    normalizes_embeddings: ClassVar[bool] = False
    """True if this kind has an RMSNorm after the projector, as with `model.adapter.normalize`."""

    def __init__(self, config: AdapterConfig, input_dim: int) -> None:
        super().__init__()
        self.rate = config.rate

    @classmethod
    def num_parts(cls, config: AdapterConfig) -> int:
        """Return the number of equal parts of an output vector that belong to consecutive times. CTC reads them
        separately."""
        return 1

    @abstractmethod
    def forward(self, features: Ragged) -> Ragged:
        """Return the output [ΣS, dim] for features [ΣF, D], with S = `rate.tokens_of_frames(F)`."""

    @abstractmethod
    def kept_elements(self, frames: Sequence[int], device: str) -> int:
        """Return the number of elements that are saved for the backward pass. `earshot plan` uses it.

        Args:
            frames: The number of frames of each clip.
            device: The type of the device, such as `cpu`.
        """


def check_default_shape(config: AdapterConfig) -> None:
    """Check that `bias` and `last_group` have their default values, for kinds that support no other values.

    Raises:
        UserError: If one of them has a different value.
    """
    if not config.bias:
        raise UserError(f"model.adapter.bias = false: the kind {config.kind} always has biases; remove the key")
    if config.last_group != "pad":
        raise UserError(
            f"model.adapter.last_group = {config.last_group}: the kind {config.kind} always pads; remove the key"
        )


def adapter_class(config: AdapterConfig) -> type[Adapter]:
    """Return the class of the kind that `config` names."""
    return cast(type[Adapter], load_entry(ADAPTERS[config.kind]))


def build_adapter(config: AdapterConfig, input_dim: int) -> Adapter:
    """Return a new adapter of the kind that `config` names.

    Raises:
        UserError: If a value of `config` is invalid for its kind.
    """
    return adapter_class(config)(config, input_dim)
