"""A sweep over recipe keys: one plan for every combination of their values, and a table of the plans."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from trainer.plan.accelerator import GIB
from trainer.plan.plan import Plan
from trainer.plan.report import WIDTH, costs, duration_text, range_text
from trainer.plan.tables import gib, table


@dataclass(frozen=True)
class Row:
    """One combination of values, and its plan."""

    values: tuple[str, ...]
    """The value of each key of the sweep."""
    plan: Plan | None
    """The plan with these values; None if the recipe is invalid with them."""
    reason: str = ""
    """The reason why the recipe is invalid; empty if it is valid."""


@dataclass(frozen=True)
class Sweep:
    """The plans of all combinations of the values of some keys."""

    name: str
    """The name of the recipe."""
    accelerator: str
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    price: float | None
    """The price of one accelerator for an hour; None if it is not known."""

    @property
    def any_fits(self) -> bool:
        """Whether any of the plans fits into memory."""
        return any(row.plan is not None and row.plan.fits for row in self.rows)

    @property
    def labels(self) -> tuple[str, ...]:
        """The shortest suffixes of the dotted keys that distinguish all keys."""
        for count in range(1, max(key.count(".") for key in self.keys) + 2):
            found = tuple(".".join(key.split(".")[-count:]) for key in self.keys)
            if len(set(found)) == len(found):
                return found
        return self.keys


def parse_sweeps(texts: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the keys and the values of the options `--sweep`. Commas within brackets do not separate values.

    Raises:
        UserError: If an option has no value or an empty one, or a key is given twice.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        key, _, rest = text.partition("=")
        values = _split(rest)
        if not key or not all(values):
            raise UserError(f"--sweep {text}: specify a key and its values, such as parallel.num_ranks=64,128,256")
        if key in found:
            raise UserError(f"--sweep {text}: the key {key} is given twice; put all values into one option")
        found[key] = values
    return list(found.items())


def check_keys(swept: Sequence[tuple[str, Sequence[str]]], load: Callable[[str], object]) -> None:
    """Check the keys of a sweep, before time is spent on plans.

    Args:
        swept: The keys and their values.
        load: A function that loads the recipe with one override `key=value`, or raises a UserError.

    Raises:
        UserError: If the recipe cannot be loaded with any value of a key. This is the error of the first value.
    """
    for key, values in swept:
        errors = []
        for value in values:
            try:
                load(f"{key}={value}")
            except UserError as error:
                errors.append(error)
        if len(errors) == len(values):
            raise UserError(f"--sweep {errors[0]}")


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def sweep(
    name: str,
    accelerator: str,
    swept: Sequence[tuple[str, Sequence[str]]],
    plan: Callable[[list[str]], Plan],
    price: float | None,
) -> Sweep:
    """Plan all combinations of the values.

    Args:
        name: The name of the recipe.
        accelerator: The name of the accelerator.
        swept: The keys and their values.
        plan: A function that returns the plan of the recipe with some overrides `key=value`, or raises a UserError.
        price: The price of one accelerator for an hour; None if it is not known.
    """
    keys = tuple(key for key, _ in swept)
    rows = []
    for values in itertools.product(*(values for _, values in swept)):
        try:
            rows.append(Row(values, plan([f"{key}={value}" for key, value in zip(keys, values, strict=True)])))
        except UserError as error:
            rows.append(Row(values, None, str(error)))
    return Sweep(name, accelerator, keys, tuple(rows), price)


def sweep_table(found: Sweep) -> str:
    """Return a table with one row per plan in at most 100 columns, and the reasons why recipes are invalid."""
    header = [*found.labels, "ranks", "fits", "peak GiB", "step", "bubble", "MFU", "all steps"]
    header += ["cost"] if found.price else []
    lines, refused = [header], []
    for row in found.rows:
        cells = list(row.values)
        if row.plan is None:
            cells += ["", "invalid"]
            named = " ".join(f"{label}={value}" for label, value in zip(found.keys, row.values, strict=True))
            refused += textwrap.wrap(f"{named}: {row.reason}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        else:
            cells += _cells(row.plan, found.price)
        lines.append([*cells, *[""] * (len(header) - len(cells))])
    drawn, legend = table(lines), list[str]()
    if max(map(len, drawn)) > WIDTH:  # Long names of keys are replaced by letters.
        letters = [chr(ord("a") + i) for i in range(len(found.keys))]
        legend = [f"  {letter}: {key}" for letter, key in zip(letters, found.keys, strict=True)]
        drawn = table([[*letters, *header[len(letters) :]], *lines[1:]])
    return "\n".join([*legend, *drawn, *refused])


def _cells(plan: Plan, price: float | None) -> list[str]:
    cells = [str(plan.topology.world), plan.verdict, gib(plan.worst.total)]
    if plan.too_small:
        return [*cells, "too small"]
    low, high = plan.seconds_range
    cells += [range_text(low, high), f"{plan.time.bubble:.0%}", f"{plan.time.mfu:.1%}"]
    cells += [range_text(plan.run_sec(low), plan.run_sec(high))]
    return cells + ([costs(plan, price)] if price else [])


def as_tree(found: Sweep) -> dict[str, Any]:
    """Return a sweep as JSON values, from which its plots are drawn. The keys contain the units."""
    rows = []
    for row in found.rows:
        tree: dict[str, Any] = {"values": list(row.values), "reason": row.reason}
        plan = row.plan
        if plan is not None:
            low, high = plan.seconds_range
            world = plan.topology.world
            tree |= {
                "ranks": world,
                "fits": plan.fits,
                "verdict": plan.verdict,
                "too_small": plan.too_small,
                "peak_gib": plan.worst.total / GIB,
                "usable_gib": plan.accelerator.usable_bytes / GIB,
                "steps": plan.recipe.train.steps,
            }
            if not plan.too_small:
                tree |= {
                    "step_sec": [low, high],
                    "step_text": range_text(low, high),
                    "hours": [plan.run_sec(low) / 3600, plan.run_sec(high) / 3600],
                    "hours_text": range_text(plan.run_sec(low), plan.run_sec(high)),
                    "mfu": plan.time.mfu,
                    "bubble": plan.time.bubble,
                    "gpu_hours": [plan.run_sec(seconds) / 3600 * world for seconds in (low, high)],
                }
        rows.append(tree)
    return {
        "recipe": found.name,
        "accelerator": found.accelerator,
        "keys": list(found.keys),
        "labels": list(found.labels),
        "price": found.price,
        "rows": rows,
        "fastest": fastest(found),
    }


def fastest(found: Sweep) -> str:
    """Return sentences about the plans that finish first and cost least among those that fit; empty if none fits."""
    fitting = [
        (row.values, row.plan)
        for row in found.rows
        if row.plan is not None and row.plan.fits and not row.plan.too_small
    ]
    if not fitting:
        return ""

    def seconds(one: tuple[tuple[str, ...], Plan]) -> float:
        return one[1].run_sec(one[1].time.total)

    def named(one: tuple[tuple[str, ...], Plan]) -> str:
        return " ".join(f"{key}={value}" for key, value in zip(found.keys, one[0], strict=True))

    first = min(fitting, key=seconds)
    cheapest = min(fitting, key=lambda one: seconds(one) * one[1].topology.world)
    text = f"{named(first)} finishes first, after {duration_text(seconds(first))}."
    if cheapest is not first:
        hours = seconds(cheapest) / 3600 * cheapest[1].topology.world
        cost = (
            f"costs least, {hours * found.price:,.0f}"
            if found.price
            else f"needs the fewest accelerator-hours, {hours:,.0f}"
        )
        text += f" {named(cheapest)} {cost}."
    if len({len(plan.workload.num_tokens) * plan.recipe.train.steps for _, plan in fitting}) > 1:
        text += " The runs differ in how many samples they process, so a shorter run may also learn from less data."
    return text
