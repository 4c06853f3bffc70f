"""Statistics about which experts of the LLM's layers compute which tokens, and their history `token_load.jsonl`.

All numbers are sums over tokens, so they can be added over steps and ranks. Tokens are grouped by the task of their
sample and by their modality.

Shapes: L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from trainer.telemetry.jsonl import read_lines

Floats = NDArray[np.float64]

HISTORY_NAME = "token_load.jsonl"
"""The name of the file in the run's folder."""
MODALITIES = ("text", "audio")
"""The modalities of tokens: those of the tokenizer, and audio embeddings."""
MAX_METRIC_EXPERTS = 16
"""The largest number of experts for which trackers get metrics of every expert."""


class TokenGroup(NamedTuple):
    """The properties by which tokens are grouped."""

    task: str
    modality: str
    """One of `MODALITIES`."""


@dataclass(frozen=True)
class TokenCell:
    """Sums over a number of tokens, for each layer with experts."""

    tokens: Floats
    """The number of tokens [L]."""
    entropy: Floats
    """The sum of the entropies of the router's probabilities [L], in nats."""
    chosen: Floats
    """The number of tokens that each expert computed [L, E]."""
    first: Floats
    """The number of tokens for which each expert had the highest score [L, E]."""
    weights: Floats
    """The sum of the weights of each expert [L, E], 0 where it was not chosen."""

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
        """The share of each expert in the choices of each layer [L, E]. The shares of a layer sum to 1."""
        return self.chosen / np.maximum(self.chosen.sum(-1, keepdims=True), 1)


@dataclass(frozen=True)
class TokenLoad:
    """The load of the experts in the LLM's layers over a number of consecutive steps."""

    step: int
    """The last of the steps, counted from 1."""
    num_steps: int
    experts: tuple[str, ...]
    layers: tuple[int, ...]
    """The numbers of the layers with experts."""
    cells: Mapping[TokenGroup, TokenCell]
    """The sums by group; groups without tokens are not listed."""

    @staticmethod
    def of(
        step: int, num_steps: int, experts: Sequence[str], layers: Sequence[int], tasks: Sequence[str], sums: Floats
    ) -> TokenLoad:
        """Return the load that `sums` describes.

        Args:
            step: The last step.
            num_steps: The number of steps.
            experts: The names of the experts.
            layers: The numbers of the layers.
            tasks: The names of all tasks.
            sums: [tasks · modalities, L, 2 + 3·E]: tokens, entropy, and `chosen`, `first` and `weights` of each expert.
        """
        cells, count = {}, len(experts)
        for index, own in enumerate(sums):
            if own[:, 0].any():
                task, modality = divmod(index, len(MODALITIES))
                parts = np.split(own[:, 2:], [count, 2 * count], axis=1)
                cells[TokenGroup(tasks[task], MODALITIES[modality])] = TokenCell(own[:, 0], own[:, 1], *parts)
        return TokenLoad(step, num_steps, tuple(experts), tuple(layers), cells)

    def __add__(self, later: TokenLoad) -> TokenLoad:
        assert (self.experts, self.layers) == (later.experts, later.layers), "loads of different LLMs"
        cells = dict(self.cells)
        for group, cell in later.cells.items():
            cells[group] = cells[group] + cell if group in cells else cell
        return replace(later, num_steps=self.num_steps + later.num_steps, cells=cells)

    def total(self, task: str | None = None, modality: str | None = None) -> TokenCell | None:
        """Return the sum over the groups of a task, a modality or both; None if there are no such tokens."""
        found = [
            cell
            for group, cell in self.cells.items()
            if task in (None, group.task) and modality in (None, group.modality)
        ]
        return sum(found[1:], found[0]) if found else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the tokens, in alphabetical order."""
        return tuple(sorted({group.task for group in self.cells}))

    @property
    def dead(self) -> tuple[str, ...]:
        """The experts that computed no token, as `layer/expert`."""
        total = self.total()
        if total is None:
            return ()
        none = np.argwhere(total.chosen == 0)
        return tuple(f"{self.layers[layer]}/{self.experts[expert]}" for layer, expert in none)

    @property
    def overload(self) -> float:
        """The largest share of an expert in a layer's choices, relative to an even use of all experts."""
        total = self.total()
        return float(total.share.max()) * len(self.experts) if total is not None else 1.0

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
            cells[TokenGroup(str(own["task"]), str(own["modality"]))] = TokenCell(*arrays)
        return TokenLoad(int(tree["step"]), int(tree["num_steps"]), experts, layers, cells)


def add_up(loads: Iterable[TokenLoad]) -> TokenLoad:
    """Return the sum of several loads in the order of their steps, of which there must be at least one."""
    first, *others = loads
    return sum(others, first)


def token_metrics(load: TokenLoad) -> dict[str, float]:
    """Return the metrics `ffn_expert/...` by name; empty if there are no tokens.

    They are means over layers. Those of every expert are left out if there are more than `MAX_METRIC_EXPERTS`.
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
    for group, cell in sorted(load.cells.items()):
        shares = cell.share.mean(0)
        weights = (cell.weights / np.maximum(cell.tokens, 1)[:, None]).mean(0)
        for expert, share, weight in zip(load.experts, shares, weights, strict=True):
            metrics[f"ffn_expert/{group.task}/{group.modality}/{expert}/share"] = float(share)
            metrics[f"ffn_expert/{group.task}/{group.modality}/{expert}/weight"] = float(weight)
    return metrics


def read_history(path: Path) -> list[TokenLoad]:
    """Return the loads of a run in order; none if the file does not exist.

    Args:
        path: The file `token_load.jsonl` of the run.

    Raises:
        UserError: If the file contains other lines.
    """
    if not path.is_file():
        return []
    loads = []
    for number, (_, record) in enumerate(read_lines(path), start=1):
        try:
            loads.append(TokenLoad.from_json(record))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} line {number}: not a record of experts ({error!r}); restore the file") from None
        if (loads[0].experts, loads[0].layers) != (loads[-1].experts, loads[-1].layers):
            raise UserError(f"{path} line {number}: other experts than before; the file mixes two models, restore it")
    return loads
