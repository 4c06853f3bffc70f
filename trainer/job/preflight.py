"""Before ranks start: every node looks at itself, then all ranks of the chosen nodes add up numbers together."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from model.errors import UserError
from trainer.job.check import Facts
from trainer.job.node_check import Report, Wanted
from trainer.job.slurm import Allocation, Layout, srun

_ANSWER_SEC = 120.0


@dataclass(frozen=True)
class Found:
    """What preflight leaves."""

    nodes: tuple[str, ...]
    """To run on, as many as are needed."""
    bad: dict[str, str]
    """Node → what is wrong with it."""


class BadNodesError(UserError):
    """Too few nodes are good."""

    def __init__(self, message: str, bad: Sequence[str]) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


def preflight(allocation: Allocation, layout: Layout, facts: Facts, environ: Mapping[str, str]) -> Found:
    """Look at all nodes of the job and choose those to run on; prints what is found.

    Args:
        environ: PREFLIGHT_MIN_MEMORY_GIB (besides what a save needs) and PREFLIGHT_MIN_DISK_GIB, of which defaults are
            16 and 10.

    Raises:
        BadNodesError: fewer nodes are good than the run needs.
    """
    wanted = Wanted(
        layout.ranks_per_node if allocation.gpus_per_node else 0,
        facts.run_dir,
        facts.stores,
        facts.trackers,
        float(environ.get("PREFLIGHT_MIN_MEMORY_GIB", "16")) + facts.snapshot_gib,
        float(environ.get("PREFLIGHT_MIN_DISK_GIB", "10")),
        facts.num_ranks,
    )
    module = ["trainer.job.node_check", json.dumps(asdict(wanted))]
    lines = _answers(srun(allocation, allocation.nodes, 1, module))
    reports = {r["node"]: Report(**r) for r in lines}
    bad = {n: "no answer" for n in allocation.nodes if n not in reports}
    bad |= {n: "; ".join(r.faults) for n, r in reports.items() if r.faults}
    say(f"preflight: {len(allocation.nodes)} nodes, {layout.num_nodes} needed")
    for node in allocation.nodes:
        report = reports.get(node, Report(node))
        say(f"  {node}: " + (f"BAD: {bad[node]}" if node in bad else ", ".join(report.facts)))
        for warning in report.warnings:
            say(f"  {node}: warning: {warning}")
    while True:
        nodes = choose(allocation.nodes, bad, layout.num_nodes)
        silent = _add_up(allocation, nodes, layout)
        if not silent:
            return Found(nodes, bad)
        bad |= {n: "did not finish the all-reduce" for n in silent}
        say(f"  BAD: {', '.join(silent)} did not finish the all-reduce")


def choose(nodes: Sequence[str], bad: Mapping[str, str], num_needed: int) -> tuple[str, ...]:
    """The first good nodes, as many as are needed.

    Raises:
        BadNodesError: there are not enough.
    """
    good = tuple(n for n in nodes if n not in bad)
    if len(good) >= num_needed:
        return good[:num_needed]
    named = "; ".join(f"{node}: {fault}" for node, fault in sorted(bad.items()))
    without = ",".join(sorted(bad))
    raise BadNodesError(
        f"{num_needed} nodes are needed, {len(good)} of {len(nodes)} are good; {named}; "
        f"ask for spares (sbatch --nodes={num_needed}-{num_needed + len(bad)}) or leave them out (--exclude={without})",
        sorted(bad),
    )


def _add_up(allocation: Allocation, nodes: Sequence[str], layout: Layout) -> list[str]:
    """Nodes that a failed all-reduce is blamed on; empty: it worked."""
    answers = _answers(srun(allocation, nodes, layout.ranks_per_node, ["trainer.job.all_reduce"]))
    done = [a for a in answers if "gb_per_sec" in a]
    if len(done) == len(nodes) * layout.ranks_per_node:
        slowest = min(done, key=lambda a: float(a["gb_per_sec"]))
        say(
            f"  all-reduce of {slowest['mib']} MiB over {len(done)} ranks: "
            f"{slowest['gb_per_sec']:.2f} GB/s per link (slowest rank, on {slowest['node']})"
        )
        return []
    arrived = Counter(a["node"] for a in answers if a.get("arrived"))
    silent = [node for node in nodes if arrived[node] < layout.ranks_per_node]
    if not silent:
        raise BadNodesError("all ranks met, but their all-reduce failed: the log above has its error", ())
    # Without the first node, nobody meets: it alone is to blame.
    return [nodes[0]] if len(silent) == len(nodes) else silent


def _answers(command: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON lines of all tasks, of those that answer in time."""
    step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = step.communicate(timeout=_ANSWER_SEC)
    except subprocess.TimeoutExpired:
        step.terminate()
        output, _ = step.communicate()
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def say(text: str) -> None:
    """A line for the job's log, with the time of day."""
    now = datetime.now()
    print(f"{now:%H:%M:%S}.{now.microsecond // 100_000} {text}", flush=True)
