"""Tests of the large recipes, whose layouts were chosen by planning: MFU, tokens per update, and documented numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.config.load import load_recipe
from trainer.parallel.topology import build_topology
from trainer.plan.accelerator import KNOWN
from trainer.plan.plan import Plan
from trainer.plan.planner import Planner
from trainer.plan.report import report
from trainer.plan.workload import typical_workload

ROOT = Path(__file__).resolve().parents[2]
FEW_SAMPLES = [
    "data.global_batch_samples=1024",
    "parallel.pipeline=8",
    "parallel.virtual_stages=10",
    "parallel.expert=4",
    "train.recompute_llm=none",
    "train.recompute_encoder_calls=false",
    "train.recompute_encoders=true",
    "train.steps=20000",
]
"""The overrides for a small batch, which the recipe mowe_70b documents."""


def planned(name: str, overrides: list[str]) -> Plan:
    recipe = load_recipe(name, overrides)
    topology = build_topology(recipe.parallel, recipe.parallel.num_ranks)
    return Planner(recipe, KNOWN["h100"]).plan(recipe, typical_workload(recipe, topology))


def is_close(line: str, other: str) -> bool:
    """Return True if two lines differ only in numbers, by at most 2 %."""
    number = r"[0-9][0-9,.]*"
    if re.sub(number, "", line) != re.sub(number, "", other):
        return False
    values = [[float(n.replace(",", "").rstrip(".")) for n in re.findall(number, text)] for text in (line, other)]
    return values[0] == pytest.approx(values[1], rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "overrides", "ranks", "most_tokens", "least_mfu"),
    [
        ("mowe_8b", [], 16, 500_000, 0.35),  # the goal of 0.40 is missed (docs/plan.md)
        ("mowe_70b", [], 128, 2_100_000, 0.45),
        ("mowe_405b", [], 1008, 2_100_000, 0.40),
        ("mowe_70b", FEW_SAMPLES, 128, 135_000, 0.30),
    ],
)
def test_large_recipes_are_fast_within_their_token_budget(
    name: str, overrides: list[str], ranks: int, most_tokens: int, least_mfu: float
) -> None:
    plan = planned(name, overrides)
    assert plan.fits and plan.topology.world == ranks and not plan.mechanisms.labels()
    assert plan.workload.tokens <= most_tokens
    assert plan.time.mfu >= least_mfu
    pages = ["docs/plan.md"] + (["README.md"] if name == "mowe_70b" and not overrides else [])
    for page in pages:
        shown = (ROOT / page).read_text(encoding="utf-8").splitlines()
        for line in report(plan).split("\n\n")[0].splitlines():
            assert any(is_close(line, other) for other in shown), f"{page} does not show: {line}"
    if overrides:
        documented = (ROOT / "trainer" / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert all(override in documented for override in overrides)
