"""Helpers that write the folder of an invented run, with a recipe and a random but plausible routing history."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from model.router import Routing
from trainer.config.load import dump, load_recipe
from trainer.telemetry.expert_load import ClipGroup, ExpertLoad, group_of
from trainer.telemetry.load_history import HISTORY_NAME, LoadInterval, LoadMeter, RankLoad

EXPERTS = ("hubert", "wavlm", "whisper_tiny")
GATES = ("data_independent", "data_dependent")
KINDS = (
    ("asr", "en", "digits"),
    ("asr", "pl", "</script><img src=x onerror=alert(1)>"),
    ("er", "en", "stage"),
    ("ac", None, "street & yard"),
)
SECONDS = (0.4, 1.5, 3.0, 7.0, 12.0)
EVERY_STEPS, LAST_STEP, TINY_DIES = 10, 200, 100
CLIPS_PER_RANK = 12


def write_run(folder: Path, *overrides: str, num_ranks: int = 2) -> Path:
    """Write a run of the recipe `kit_cpu` to `folder`/kit_cpu, and return its folder.

    Its third encoder expert is not used after step `TINY_DIES`.
    """
    run = folder / "kit_cpu"
    run.mkdir(parents=True)
    recipe = load_recipe("kit_cpu", [f"parallel.num_ranks={num_ranks}", *overrides])
    (run / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    lines = [json.dumps(interval.to_json()) + "\n" for interval in make_history(num_ranks)]
    (run / HISTORY_NAME).write_text("".join(lines), encoding="utf-8")
    return run


def make_history(num_ranks: int) -> list[LoadInterval]:
    """Return a history that has an interval for step 1, and then one for every `EVERY_STEPS` steps."""
    rng = np.random.default_rng(5)
    ends = [1, *range(EVERY_STEPS, LAST_STEP + 1, EVERY_STEPS)]
    history = []
    for first, last in zip([0, *ends], ends, strict=False):
        parts = [make_part(rng, rank, last - first, last) for rank in range(num_ranks)]
        history.append(LoadMeter(EXPERTS, "whisper").merge(last, parts))
    return history


def make_part(rng: np.random.Generator, rank: int, num_steps: int, step: int) -> RankLoad:
    """Return the clips and costs of a rank in `num_steps` steps. Rank 1 computes longer than rank 0."""
    meter = LoadMeter(EXPERTS, "whisper")
    for _ in range(num_steps):
        meter.add_step({"whisper": (0.1, 0.01, 0, 0)} | {e: (0.05 + 0.04 * rank, 0.02, 1e4, 2e4) for e in EXPERTS}, 0.5)
    kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=CLIPS_PER_RANK)]
    seconds = [SECONDS[i] for i in rng.integers(len(SECONDS), size=CLIPS_PER_RANK)]
    groups = [group(*kind, sec) for kind, sec in zip(kinds, seconds, strict=True)]
    logits = torch.from_numpy(rng.normal(size=(CLIPS_PER_RANK, len(GATES), len(EXPERTS))))
    logits[:, :, 2] -= 100.0 if step > TINY_DIES else 0.0
    logits[:, 1, 0] += 2.0 * torch.tensor([kind[0] == "asr" for kind in kinds])
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, probs.argmax(-1, keepdim=True), True)
    part = meter.take()
    return RankLoad(ExpertLoad.of(Routing(probs, chosen, GATES), groups, seconds, EXPERTS), part.costs, part.step_sec)


def group(task: str, language: str | None, source: str, sec: float) -> ClipGroup:
    """Return the group to which the trainer assigns a clip if its manifest has these values."""
    return group_of(task, {"language": language, "source": source}, sec)
