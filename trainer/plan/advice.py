"""Advice on the changes that improve a plan most, found by a search over valid layouts."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.schema import Recipe
from trainer.plan.fit import changes_between, estimates
from trainer.plan.plan import Plan, Planner
from trainer.plan.remedies import remedy
from trainer.plan.workload import Workload

_MAX_TRIED = 3
"""The largest number of candidates that are planned in full for one piece of advice."""
WORTH = 1.1
"""The smallest speed-up from `--fit` for which this option is recommended."""


@dataclass(frozen=True)
class Advice:
    """Recommended changes to a recipe."""

    change: tuple[str, ...]
    """The single `key=value` that makes the step fastest, or makes it fit into memory; empty if there is none."""
    change_speedup: float
    """The step time of the recipe divided by the step time with `change`; 1 if there is no change."""
    layout: tuple[str, ...]
    """The overrides `key=value` of the fastest layout that fits; empty if it is not faster than the recipe."""
    layout_speedup: float
    """The step time of the recipe divided by the step time with `layout`; 1 if `layout` is empty."""


def advise(planner: Planner, plan: Plan, workload: Workload) -> Advice:
    """Return the advice for `plan`.

    Candidates are ordered by a quick estimate of their step time. The fastest candidates are planned in full, and only
    candidates that fit into memory are recommended.
    """
    timed = sorted(estimates(planner, plan.recipe, workload), key=lambda item: item[0])
    limit = plan.time.total if plan.fits else float("inf")
    described = [(sec, changes_between(plan.recipe, v), v) for sec, v in timed if sec < limit]
    single = _first_that_fits(planner, workload, [(c, v) for _, c, v in described if len(c) == 1])
    several = _first_that_fits(planner, workload, [(c, v) for _, c, v in described if c])
    found = []
    for one in (single, several):
        seconds = one[1].time.total if one is not None else float("inf")
        better = one is not None and (seconds < plan.time.total or not plan.fits)
        found.append((tuple(one[0]), plan.time.total / seconds) if one is not None and better else ((), 1.0))
    return Advice(*found[0], *found[1])


def _first_that_fits(
    planner: Planner, workload: Workload, candidates: list[tuple[list[str], Recipe]]
) -> tuple[list[str], Plan] | None:
    """Return the first candidate that fits into memory, and its plan; None if none of the first few fits."""
    for changes, variant in candidates[:_MAX_TRIED]:
        plan = planner.plan(variant, workload)
        if plan.fits:
            return changes, plan
    return None


def limits(plan: Plan) -> list[tuple[str, float, str]]:
    """Return (name, seconds, a way to shorten it) for each part of a step, the longest part first."""
    parts = sorted(plan.time.parts.items(), key=lambda item: -item[1])
    return [(name, seconds, remedy(name, plan.recipe)) for name, seconds in parts if seconds > 0]
