"""The profile of FFN experts: the tasks, modalities and languages of the tokens that each expert processes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainer.config.provenance import Provenance
from trainer.page.figure import save
from trainer.scoring.table import format_table
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.token_load import MODALITIES, Floats, TokenCell, TokenLoad, add_up

MAX_SHOWN_EXPERTS = 16
"""The largest number of experts in a table on the terminal. If there are more, the most used ones are shown."""


@dataclass(frozen=True)
class TokenProfile:
    """The load of the FFN experts over a run."""

    run: str
    """The name of the run."""
    history: tuple[TokenLoad, ...]
    """The load of each logging interval, in the order of the steps; not empty."""
    origins: tuple[Provenance, ...] = ()
    """The origin of each expert's initial weights; empty if the recipe did not add the experts."""

    @cached_property
    def load(self) -> TokenLoad:
        """The sum over all steps."""
        return add_up(self.history)

    @property
    def drift(self) -> dict[str, float]:
        """The change in the experts' shares from the first to the last quarter of the intervals, by modality.

        The change is the total variation distance, from 0 to 1, averaged over layers.
        """
        last = self.load.step
        first = last - self.load.num_steps
        quarter = self.load.num_steps / 4
        # Intervals have different lengths, because older ones are merged in long histories.
        early = [load for load in self.history if load.step <= first + quarter]
        late = [load for load in self.history if load.step - load.num_steps >= last - quarter]
        ends = add_up(early or self.history[:1]), add_up(late or self.history[-1:])
        found = {}
        for modality in MODALITIES:
            cells = [end.total(modality=modality) for end in ends]
            if cells[0] is not None and cells[1] is not None:
                found[modality] = float(0.5 * np.abs(cells[0].share - cells[1].share).sum(-1).mean())
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the content of `ffn_experts.json`."""
        load = self.load
        groups = {
            "/".join(key): {"task": key[0], "modality": key[1], **_as_json(cell)}
            for key, cell in load.totals("task", "modality").items()
        }
        cells = [{**group._asdict(), **_as_json(cell)} for group, cell in sorted(load.cells.items())]
        return {
            "run": self.run,
            "steps": [self.history[0].step - self.history[0].num_steps + 1, load.step],
            "experts": list(load.experts),
            "layers": list(load.layers),
            "origins": [asdict(origin) for origin in self.origins],
            "groups": groups,
            "cells": cells,
            "mix": self._mix().round(6).tolist(),
            "drift": self.drift,
            "dead": list(load.dead),
            "overload": load.overload,
        }

    def _mix(self) -> Floats:
        """Return the share of each modality in the tokens of each expert, [modalities, layers, experts]."""
        none = np.zeros((len(self.load.layers), len(self.load.experts)))
        cells = [self.load.total(modality=modality) for modality in MODALITIES]
        chosen = np.stack([none if cell is None else cell.chosen for cell in cells])
        return chosen / np.maximum(chosen.sum(0), 1)


def _as_json(cell: TokenCell) -> dict[str, Any]:
    tokens = np.maximum(cell.tokens, 1)
    return {
        "tokens": cell.tokens.tolist(),
        "entropy": (cell.entropy / tokens).round(6).tolist(),
        "share": cell.share.round(6).tolist(),
        "first_share": (cell.first / tokens[:, None]).round(6).tolist(),
        "weight": (cell.weights / tokens[:, None]).round(6).tolist(),
    }


def describe_tokens(profile: TokenProfile) -> str:
    """Return tables of the experts' shares for a terminal."""
    load = profile.load
    total = load.total()
    if total is None:
        return "experts of the LLM: no tokens"
    order = np.argsort(-total.share.mean(0), kind="stable")[:MAX_SHOWN_EXPERTS]
    shown = [load.experts[k] for k in sorted(order)] if len(load.experts) > MAX_SHOWN_EXPERTS else list(load.experts)
    rows = _rows(load, shown, "task", "modality")
    by_language = _rows(load, shown, "language", "modality")
    if len({row["language"] for row in by_language}) < 2:
        by_language = []
    layers = [
        {"layer": layer, **{name: float(total.share[i, load.experts.index(name)]) for name in shown}}
        for i, layer in enumerate(load.layers)
    ]
    drift = ", ".join(f"{modality} {value:.2f}" for modality, value in profile.drift.items())
    dead = ", ".join(load.dead[:8]) + (f" and {len(load.dead) - 8} more" if len(load.dead) > 8 else "")
    return "\n\n".join(
        [
            f"experts of the LLM: share of the choices of each task and modality, mean over {len(load.layers)} layers\n"
            + format_table(rows),
            *(
                ["share of the choices of each language and modality\n" + format_table(by_language)]
                if by_language
                else []
            ),
            "share of the choices in each layer, all tokens\n" + format_table(layers),
            f"dead       {dead or 'none'} (layer/expert)\n"
            f"overload   {load.overload:.3f} (largest share of an expert in a layer / even share)\n"
            f"drift      {drift or 'unknown'} (first to last quarter of the steps, 0 to 1)",
        ]
    )


def _rows(load: TokenLoad, shown: Sequence[str], *properties: str) -> list[dict[str, Any]]:
    """Return one row of a table per group of tokens, with the shares of the experts `shown`."""
    rows = []
    for key, cell in load.totals(*properties).items():
        shares = dict(zip(load.experts, cell.share.mean(0).tolist(), strict=True))
        row: dict[str, Any] = {**dict(zip(properties, key, strict=True)), "tokens": int(cell.tokens.max())}
        rows.append({**row, **{name: shares[name] for name in shown}})
    return rows


def write_token_files(profile: TokenProfile, folder: Path) -> list[Path]:
    """Write ffn_experts.json and a heat map of layers and experts for every task, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ffn_experts.json"
    write_atomically(path, json.dumps(profile.to_json(), indent=1, allow_nan=False) + "\n")
    names = {task: re.sub(r"[^A-Za-z0-9_-]", "_", task) for task in profile.load.tasks}
    return [path, *(_heat_map(profile, task, folder / f"ffn-experts-{name}.png") for task, name in names.items())]


def _heat_map(profile: TokenProfile, task: str, path: Path) -> Path:
    load = profile.load
    cells = [(modality, load.total(task, modality)) for modality in MODALITIES]
    found = [(modality, cell) for modality, cell in cells if cell is not None]
    width = 1.2 + max(2.0, 0.5 * min(len(load.experts), 40))
    figure = Figure(figsize=(width * len(found), 1.6 + max(1.2, 0.25 * len(load.layers))))
    for axes, (modality, cell) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        axes.imshow(cell.share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(len(load.layers)), list(map(str, load.layers)))
        if len(load.experts) <= MAX_SHOWN_EXPERTS:
            axes.set_xticks(range(len(load.experts)), list(load.experts), rotation=30, ha="right")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.set_title(f"{task}, {modality}")
        axes.spines[:].set_visible(False)
    return save(figure, path)


def failures_of(profile: TokenProfile, dead: bool, overload: float) -> list[str]:
    """Return a description of each limit of `--fail-on` that is exceeded.

    Args:
        profile: The profile.
        dead: Whether an expert without tokens is a failure.
        overload: The largest share of an expert in a layer, relative to an even distribution.
    """
    load, failures = profile.load, []
    if dead and load.dead:
        failures.append(f"dead: {len(load.dead)} experts of the LLM, such as {load.dead[0]}")
    if load.overload > overload:
        failures.append(f"overload {load.overload:.3f} > {overload:g}")
    return failures


def until(history: Sequence[TokenLoad], step: int | None) -> tuple[TokenLoad, ...]:
    """Return the part of a history up to `step`, or the whole history if `step` is None."""
    return tuple(load for load in history if step is None or load.step <= step)
