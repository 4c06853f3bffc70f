"""The weights of a dense LLM to which FFN experts are added. An expert starts with the weights of its donor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PretrainedConfig

from model.llm.families import mixture_of, modules_of
from model.llm.mixture import SCORE_BIAS
from model.llm.names import Index
from model.llm.weights import WeightSource, check_tensor


class MixtureSource:
    """A `WeightSource` with the weights of `base`, FFN experts from `donors`, and random routers.

    Args:
        base: The weights of the dense LLM.
        donors: For each expert, by its name, the weights of a dense LLM of the same architecture.
        routers: The weights and biases of the routers, and the weights of the gates of shared experts. The weights of
            routers must be random, because routers with equal rows would give all experts the same score.
        hf_config: The LLM with its experts.

    Raises:
        UserError: If a donor lacks a tensor of a feed-forward network, or has it in a different shape.
    """

    def __init__(
        self,
        base: WeightSource,
        donors: Mapping[str, WeightSource],
        routers: WeightSource,
        hf_config: PretrainedConfig,
    ) -> None:
        self._base = base
        self._sources: dict[str, tuple[WeightSource, str]] = {}
        """The source of each tensor that is not from `base`, and the tensor's name in this source."""
        mixture, modules = mixture_of(hf_config), modules_of(hf_config)
        assert mixture is not None
        hidden, width = hf_config.hidden_size, mixture.width
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for n in mixture.layers:
            prefix = modules["layer"].format(n=n)
            for path, _ in mixture.router_parts(modules["router"]):
                for kind in ("weight", SCORE_BIAS):
                    self._sources[f"{prefix}.{path}.{kind}"] = routers, f"{prefix}.{path}.{kind}"
            kinds = [("expert", expert) for expert in mixture.experts] + [("shared", one) for one in mixture.shared]
            for kind, expert in kinds:
                for role, shape in shapes.items():
                    name = f"{prefix}.{modules[role]}.weight"
                    check_tensor(donors[expert], name, shape)
                    own = f"{prefix}.{modules[f'{kind}_{role}'].format(e=expert)}.weight"
                    self._sources[own] = donors[expert], name
            if mixture.shared_gate:
                for expert in mixture.shared:
                    score = f"{prefix}.{modules['shared_score'].format(e=expert)}.weight"
                    self._sources[score] = routers, score

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Implement `WeightSource`."""
        source, other = self._sources.get(name, (self._base, name))
        return source.shape(other)

    def read(self, name: str, index: Index) -> Tensor:
        """Implement `WeightSource`."""
        source, other = self._sources.get(name, (self._base, name))
        return source.read(other, index)

    def where(self, name: str) -> str:
        """Implement `WeightSource`."""
        source, other = self._sources.get(name, (self._base, name))
        return source.where(other)
