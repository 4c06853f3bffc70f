"""Statistics about the tokens that each FFN expert processes.

All numbers are sums over tokens, so they can be added over steps and ranks. Tokens are grouped by the task and the
language of their sample and by their modality.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.llm.mixture import NULL

Floats = NDArray[np.float64]

MODALITIES = ("text", "audio")
"""The modalities: `text` for tokens from the tokenizer, and `audio` for audio embeddings."""
UNNAMED = "-"
"""The language of samples whose manifest entry does not name one."""
OTHER = "other"
"""The language of samples whose task and language are not counted separately."""
MAX_KINDS = 64
"""The largest number of pairs of a task and a language that are counted separately."""
MAX_METRIC_EXPERTS = 16
"""The largest number of experts for which trackers get separate metrics of each expert."""


class TokenGroup(NamedTuple):
    """The properties by which tokens are grouped."""

    task: str
    modality: str
    """One of `MODALITIES`."""
    language: str = UNNAMED
    """The language of the sample as in the manifest, or `UNNAMED` or `OTHER`."""


@dataclass(frozen=True)
class SampleKinds:
    """The kinds of samples whose tokens are counted separately, in an order that is the same on all ranks."""

    pairs: tuple[tuple[str, str], ...]
    """The task and the language of each kind."""

    @staticmethod
    def of(tasks: Sequence[str], num_samples: Mapping[tuple[str, str], int]) -> SampleKinds:
        """Return the most frequent kinds in the data, and one additional kind per task for all other samples.

        Args:
            tasks: The names of all tasks.
            num_samples: The number of samples by task and language. The language is empty if a sample has none.
        """
        counts = Counter({(task, language or UNNAMED): num for (task, language), num in num_samples.items()})
        # The order of pairs with the same number of samples must not depend on the order in which they are given.
        frequent = sorted(counts, key=lambda pair: (-counts[pair], pair))[:MAX_KINDS]
        return SampleKinds((*sorted(frequent), *((task, OTHER) for task in tasks)))

    @cached_property
    def _places(self) -> dict[tuple[str, str], int]:
        return {pair: place for place, pair in enumerate(self.pairs)}

    def place(self, task: str, language: object) -> int:
        """Return the index of the kind of a sample.

        Args:
            task: The task.
            language: The field `language` of the sample's manifest entry, or None.
        """
        found = self._places.get((task, str(language or UNNAMED)))
        return self._places[task, OTHER] if found is None else found


@dataclass(frozen=True)
class TokenCell:
    """Sums over a set of tokens, for each layer with experts."""

    tokens: Floats
    """The number of tokens [L]."""
    entropy: Floats
    """The sum of the entropies of the router's probabilities [L], in nats."""
    chosen: Floats
    """The number of tokens that each expert processed [L, E]."""
    first: Floats
    """The number of tokens for which each expert had the highest score [L, E]."""
    weights: Floats
    """The sum of the weights of each expert [L, E]. The weight of an expert that was not chosen is 0."""

    def __add__(self, other: TokenCell) -> TokenCell:
        return TokenCell(
            self.tokens + other.tokens,
            self.entropy + other.entropy,
            self.chosen + other.chosen,
            self.first + other.first,
            self.weights + other.weights,
        )

    @property
    def share(self) -> Floats:
        """The fraction of the choices in each layer that fall on each expert [L, E].

        The fractions of a layer sum to 1.
        """
        return self.chosen / np.maximum(self.chosen.sum(-1, keepdims=True), 1)


@dataclass(frozen=True)
class TokenLoad:
    """The load of FFN experts over a number of consecutive steps."""

    step: int
    """The last of the steps, counted from 1."""
    num_steps: int
    experts: tuple[str, ...]
    """The names of the experts. The last one is `NULL` if a layer has null experts, which are counted together."""
    layers: tuple[int, ...]
    """The numbers of the layers with experts."""
    cells: Mapping[TokenGroup, TokenCell]
    """The sums by group; groups without tokens are not listed."""

    @staticmethod
    def of(
        step: int, num_steps: int, experts: Sequence[str], layers: Sequence[int], kinds: SampleKinds, sums: Floats
    ) -> TokenLoad:
        """Return the load that `sums` describes.

        Args:
            step: The last step.
            num_steps: The number of steps.
            experts: The names of the experts.
            layers: The numbers of the layers.
            kinds: The kinds of samples.
            sums: [kinds · modalities, L, 2 + 3·E]: tokens, entropy, and `chosen`, `first` and `weights` of each expert.
        """
        cells, count = {}, len(experts)
        for index, own in enumerate(sums):
            if own[:, 0].any():
                kind, modality = divmod(index, len(MODALITIES))
                parts = np.split(own[:, 2:], [count, 2 * count], axis=1)
                task, language = kinds.pairs[kind]
                cells[TokenGroup(task, MODALITIES[modality], language)] = TokenCell(own[:, 0], own[:, 1], *parts)
        return TokenLoad(step, num_steps, tuple(experts), tuple(layers), cells)

    def __add__(self, later: TokenLoad) -> TokenLoad:
        assert (self.experts, self.layers) == (later.experts, later.layers), "loads of different LLMs"
        cells = dict(self.cells)
        for group, cell in later.cells.items():
            cells[group] = cells[group] + cell if group in cells else cell
        return replace(later, num_steps=self.num_steps + later.num_steps, cells=cells)

    def total(
        self, task: str | None = None, modality: str | None = None, language: str | None = None
    ) -> TokenCell | None:
        """Return the sum over the groups with the given properties; None if there are no such tokens."""
        found = [
            cell
            for group, cell in self.cells.items()
            if task in (None, group.task) and modality in (None, group.modality) and language in (None, group.language)
        ]
        return sum(found[1:], found[0]) if found else None

    def totals(self, *properties: str) -> dict[tuple[str, ...], TokenCell]:
        """Return the sums over the groups that have the same values of some properties, in alphabetical order.

        Args:
            properties: Fields of `TokenGroup`, whose values are the keys of the result.
        """
        found: dict[tuple[str, ...], TokenCell] = {}
        for group, cell in sorted(self.cells.items()):
            key = tuple(getattr(group, name) for name in properties)
            found[key] = found[key] + cell if key in found else cell
        return dict(sorted(found.items()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the tokens, in alphabetical order."""
        return tuple(sorted({group.task for group in self.cells}))

    @property
    def dead(self) -> tuple[str, ...]:
        """The experts that processed no token, as `layer/expert`. Null experts are not listed."""
        total = self.total()
        if total is None:
            return ()
        none = np.argwhere(total.chosen[:, self._computing] == 0)
        return tuple(f"{self.layers[layer]}/{self.experts[expert]}" for layer, expert in none)

    @property
    def overload(self) -> float:
        """The largest fraction of a layer's choices that fall on one expert, multiplied by the number of experts.

        It is 1 if all experts are chosen equally often. Null experts and choices of them are not counted.
        """
        total = self.total()
        if total is None:
            return 1.0
        chosen = total.chosen[:, self._computing]
        return float((chosen / np.maximum(chosen.sum(-1, keepdims=True), 1)).max()) * chosen.shape[1]

    @property
    def _computing(self) -> slice:
        """The experts that compute something. Null experts, if there are any, are the last ones."""
        return slice(len(self.experts) - (self.experts[-1:] == (NULL,)))

    def to_json(self) -> dict[str, Any]:
        """Return the load as a tree that `from_json` reads. It becomes one line of the history."""
        cells = [
            {
                **group._asdict(),
                "tokens": cell.tokens.tolist(),
                "entropy": cell.entropy.round(4).tolist(),
                "chosen": cell.chosen.tolist(),
                "first": cell.first.tolist(),
                "weights": cell.weights.round(4).tolist(),
            }
            for group, cell in sorted(self.cells.items())
        ]
        head = {"step": self.step, "num_steps": self.num_steps}
        return {**head, "experts": list(self.experts), "layers": list(self.layers), "cells": cells}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> TokenLoad:
        """Return the load that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If the tree was not written by `to_json`.
        """
        experts, layers = tuple(map(str, tree["experts"])), tuple(map(int, tree["layers"]))
        cells = {}
        for own in tree["cells"]:
            arrays = [np.asarray(own[name], dtype=np.float64) for name in TokenCell.__dataclass_fields__]
            pairs = (len(layers), len(experts))
            if [a.shape for a in arrays] != [(len(layers),), (len(layers),), pairs, pairs, pairs]:
                raise ValueError("the shapes do not match the numbers of layers and experts")
            # Earlier versions did not count languages.
            group = TokenGroup(str(own["task"]), str(own["modality"]), str(own.get("language", UNNAMED)))
            cells[group] = TokenCell(*arrays)
        return TokenLoad(int(tree["step"]), int(tree["num_steps"]), experts, layers, cells)


def add_up(loads: Iterable[TokenLoad]) -> TokenLoad:
    """Return the sum of loads.

    Args:
        loads: The loads in the order of steps, at least one.
    """
    first, *others = loads
    return sum(others, first)


def token_metrics(load: TokenLoad) -> dict[str, float]:
    """Return the metrics `ffn_expert/...` by name; empty if there are no tokens.

    The metrics are means over layers. Metrics of single experts are omitted if there are more than `MAX_METRIC_EXPERTS`
    experts.
    """
    total = load.total()
    if total is None:
        return {}
    metrics = {
        "ffn_expert/num_dead": float(len(load.dead)),
        "ffn_expert/overload": load.overload,
        "ffn_expert/entropy": float((total.entropy / np.maximum(total.tokens, 1)).mean()),
    }
    if len(load.experts) > MAX_METRIC_EXPERTS:
        return metrics
    kinds = {f"ffn_expert/{'/'.join(key)}": cell for key, cell in load.totals("task", "modality").items()}
    languages = load.totals("language", "modality")
    if len({language for language, _ in languages}) > 1:
        kinds |= {f"ffn_expert/language/{'/'.join(key)}": cell for key, cell in languages.items()}
    for name, cell in kinds.items():
        shares = cell.share.mean(0)
        weights = (cell.weights / np.maximum(cell.tokens, 1)[:, None]).mean(0)
        for expert, share, weight in zip(load.experts, shares, weights, strict=True):
            metrics[f"{name}/{expert}/share"] = float(share)
            metrics[f"{name}/{expert}/weight"] = float(weight)
    return metrics
