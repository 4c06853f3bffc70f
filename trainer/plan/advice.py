"""Advice on the changes that improve a plan most, found by a search over valid layouts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from trainer.plan.fit import Search, first_that_fits
from trainer.plan.layouts import changes_between
from trainer.plan.plan import Plan
from trainer.plan.planner import Planner
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
    search, limit = Search(planner, plan.recipe, workload), plan.time.total if plan.fits else float("inf")
    found: list[tuple[tuple[str, ...], float]] = []
    for candidates in (search.single_changes(), search.candidates()):
        faster = (one for one in candidates if one.recipe != plan.recipe)
        best, _ = first_that_fits(
            planner, workload, itertools.takewhile(lambda c: c.seconds < limit, faster), _MAX_TRIED
        )
        if best is not None and (best.time.total < plan.time.total or not plan.fits):
            changes = tuple(changes_between(plan.recipe, best.recipe))
            found.append((changes, plan.time.total / best.time.total))
        else:
            found.append(((), 1.0))
    return Advice(*found[0], *found[1])


def limits(plan: Plan) -> list[tuple[str, float, str]]:
    """Return (name, seconds, a way to shorten it) for each part of a step, the longest part first."""
    parts = sorted(plan.time.parts.items(), key=lambda item: -item[1])
    return [(name, seconds, remedy(name, plan.recipe)) for name, seconds in parts if seconds > 0]
