"""Check a job's recipe, data and plans before its ranks start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

from model.errors import UserError
from trainer.job.check import Facts
from trainer.job.node_check import GIB
from trainer.telemetry.announce import print_timed
from trainer.telemetry.jsonl import write_atomically
from trainer.telemetry.origin import PLAN_NAME, plan_json_name

STORE_SEC = 10.0
"""The time in seconds for which an unreachable bucket is retried in the first attempt."""
_PER_NODE = 8
"""The number of ranks per node if neither the job nor PLAN_ACCELERATOR specifies it. Plans have the same default."""


class RefusedError(UserError):
    """Raised when a job cannot run.

    Args:
        message: The reason, as one line.
        facts: The properties of the recipe; None if the check failed before it had found them.
    """

    def __init__(self, message: str, facts: Facts | None) -> None:
        super().__init__(message)
        self.facts = facts


def check(
    recipe: str,
    overrides: Sequence[str],
    retry_sec: float = STORE_SEC,
    plan: bool = True,
    per_node: int | None = None,
    smaller: bool = False,
) -> Facts:
    """Check the recipe and its data and, concurrently, print its plan.

    Args:
        recipe: The name or file of the recipe.
        overrides: The `key=value` arguments.
        retry_sec: The time for which an unreachable bucket is retried, in seconds.
        plan: Whether to make and print the plan.
        per_node: The number of ranks per node that the plan assumes, unless PLAN_ACCELERATOR contains `per_node`; None
            for the plan's default.
        smaller: Whether to also check the layouts with which `restart.min_nodes` lets a restarted job continue, so that
            a mistake that affects only them is found before the job starts.

    Returns:
        The properties of the recipe that the job needs.

    Raises:
        RefusedError: If the data cannot be read or the plan is impossible.
    """
    options = [f"--retry-sec={retry_sec}", *(_per_node(per_node or _PER_NODE) if smaller else [])]
    processes = [_start("trainer.job.check", recipe, *overrides, *options)]
    if plan:
        processes.append(_start_plan(recipe, overrides, per_node))
    outputs = [process.communicate() for process in processes]
    line = next((line for line in outputs[0][0].splitlines() if line.startswith("{")), None)
    facts = None if line is None else Facts.from_json(line)
    if plan:
        shown, numbers = _divided(outputs[1][0])
        print(shown, flush=True)
        facts = None if facts is None else _with_plan(facts, shown, numbers)
    for process, (_, errors) in reversed(list(zip(processes, outputs, strict=True))):
        if process.returncode:
            raise RefusedError(errors.strip().removeprefix("error: "), facts)
    assert facts is not None, outputs[0]
    if facts.fewer_ranks:
        _check_fewer(recipe, overrides, facts, per_node)
    return facts


def keep_plan(facts: Facts, is_whole: bool = True) -> None:
    """Write the plan of a job to the folder of its run, if there is a plan. The run is later compared with its plan.

    Args:
        facts: The properties of the recipe.
        is_whole: Whether the job has all nodes of the recipe. If not, the plan is stored next to that of all nodes,
            because a later attempt may have all nodes again.
    """
    if not facts.plan:
        return
    folder = Path(facts.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if is_whole:  # Trackers show this plan.
        write_atomically(folder / PLAN_NAME, facts.plan + "\n")
    write_atomically(folder / plan_json_name(None if is_whole else facts.num_ranks), facts.plan_json + "\n")


def _per_node(per_node: int | None) -> list[str]:
    """Return the option with the number of ranks per node. A `per_node` in PLAN_ACCELERATOR has precedence."""
    accelerator = os.environ.get("PLAN_ACCELERATOR", "")
    given = re.search(r"(?:^|,)per_node=(\d+)", accelerator)
    if given is not None:
        return [f"--per-node={given[1]}"]
    return [] if per_node is None else [f"--per-node={per_node}"]


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", *arguments], stdout=PIPE, stderr=PIPE, text=True)


def _start_plan(recipe: str, overrides: Sequence[str], per_node: int | None) -> subprocess.Popen[str]:
    accelerator = os.environ.get("PLAN_ACCELERATOR", "h100")
    options = [f"--accelerator={accelerator}", "--json", "--no-advice"]
    if "per_node=" not in accelerator:
        options += _per_node(per_node)  # The preflight requires the host memory that this many ranks need.
    return _start("tools.plan", recipe, *overrides, *options)


def _divided(output: str) -> tuple[str, str]:
    """Return the text of a plan and the line with its numbers, which is empty if there is none."""
    lines = output.splitlines()
    numbers = [line for line in lines if line.startswith("{")]
    return "\n".join(line for line in lines if not line.startswith("{")).rstrip(), numbers[-1] if numbers else ""


def _with_plan(facts: Facts, shown: str, numbers: str) -> Facts:
    if not numbers:
        return replace(facts, plan=shown)
    tree = json.loads(numbers)
    needed = {"host_gib": tree["host_bytes_per_node"]["total"] / GIB, "disk_gib": tree["disk_bytes_per_run"] / GIB}
    return replace(facts, plan=shown, plan_json=numbers, **needed)


def _check_fewer(recipe: str, overrides: Sequence[str], facts: Facts, per_node: int | None) -> None:
    """Plan the layouts on which a restarted job may continue, from the smallest up, until one is possible.

    Raises:
        RefusedError: If the smallest one is impossible. The message says what is possible.
    """
    first = ""
    for num_ranks in reversed(facts.fewer_ranks):
        process = _start_plan(recipe, [*overrides, f"parallel.num_ranks={num_ranks}"], per_node)
        _, errors = process.communicate()
        if not process.returncode:
            break
        first = first or f"{num_ranks} ranks cannot run: {errors.strip().removeprefix('error: ')}"
    else:
        remedy = "no smaller number of nodes is possible, so remove restart.min_nodes"
        raise RefusedError(f"restart.min_nodes = {facts.min_nodes}: {first}; {remedy}", facts)
    if first:
        least = num_ranks // facts.ranks_per_node
        raise RefusedError(f"restart.min_nodes = {facts.min_nodes}: {first}; set restart.min_nodes={least}", facts)
    may = ", ".join(map(str, facts.fewer_ranks))
    print_timed(f"job: restart.min_nodes = {facts.min_nodes}: a restart may continue with {may} ranks")
