"""The preflight of a job: every node checks itself, and then all ranks of the chosen nodes run an all-reduce."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model.errors import UserError
from trainer.job.cancel import raise_if_cancelled
from trainer.job.check import Facts
from trainer.job.gpu_check import Report
from trainer.job.node_check import Wanted
from trainer.job.slurm import Allocation, Layout, srun
from trainer.parallel.environment import start_limit_sec
from trainer.telemetry.announce import print_timed


@dataclass(frozen=True)
class Found:
    """The result of a preflight."""

    nodes: tuple[str, ...]
    """The nodes to run on, exactly as many as are needed."""
    bad: dict[str, str]
    """A description of the faults of each faulty node, by the node's name."""


class BadNodesError(UserError):
    """Raised when too few nodes are usable.

    Args:
        message: The error message.
        bad: The names of the faulty nodes.
    """

    def __init__(self, message: str, bad: Sequence[str]) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


def preflight(
    allocation: Allocation,
    layout: Layout,
    facts: Facts,
    environ: Mapping[str, str],
    suspects: Mapping[str, str] | None = None,
) -> Found:
    """Check all nodes of the job, print the results, and choose the nodes to run on.

    Args:
        allocation: The job's resources.
        layout: The distribution of ranks over nodes.
        facts: The properties of the recipe.
        environ: The environment variables. PREFLIGHT_MIN_MEMORY_GIB (default 16) and PREFLIGHT_MIN_DISK_GIB (default
            10) are the free memory and disk space that a node must have in addition to what the plan needs. For
            EARSHOT_START_SEC; see `trainer.parallel.environment.meeting_limit_sec`.
        suspects: The nodes with a hardware fault in an earlier attempt of this job, each with a description of the
            fault. These nodes are not used.

    Raises:
        BadNodesError: If fewer nodes are usable than the run needs.
    """
    wanted = Wanted(
        layout.ranks_per_node if allocation.gpus_per_node else 0,
        facts.run_dir,
        facts.stores,
        facts.trackers,
        float(environ.get("PREFLIGHT_MIN_MEMORY_GIB", "16")) + facts.host_gib,
        float(environ.get("PREFLIGHT_MIN_DISK_GIB", "10")),
        facts.num_ranks,
        facts.checkpoints,
        facts.disk_gib,
    )
    print_timed(f"preflight: checking {', '.join(allocation.nodes)}")
    module = ["trainer.job.node_check", json.dumps(asdict(wanted))]
    limit_sec = start_limit_sec(len(allocation.nodes), environ)
    lines = _answers(srun(allocation, allocation.nodes, 1, module), limit_sec)
    reports = {r["node"]: Report(**r) for r in lines}
    bad = {n: "no answer" for n in allocation.nodes if n not in reports}
    bad |= {n: "; ".join(r.faults) for n, r in reports.items() if r.faults}
    earlier = {n: what for n, what in (suspects or {}).items() if n in allocation.nodes and n not in bad}
    bad |= {n: f"hardware fault in an earlier attempt: {what}" for n, what in earlier.items()}
    print_timed(f"preflight: {len(allocation.nodes)} nodes, {layout.num_nodes} needed")
    for node in allocation.nodes:
        report = reports.get(node, Report(node))
        print_timed(f"  {node}: " + (f"BAD: {bad[node]}" if node in bad else ", ".join(report.facts)))
        for warning in report.warnings:
            print_timed(f"  {node}: warning: {warning}")
    while True:
        nodes = choose(allocation.nodes, bad, layout.num_nodes)
        print_timed(f"preflight: all-reduce on {', '.join(nodes)}")
        silent = _test_all_reduce(allocation, nodes, layout, environ)
        if not silent:
            return Found(nodes, bad)
        bad |= {n: "did not finish the all-reduce" for n in silent}
        print_timed(f"  BAD: {', '.join(silent)} did not finish the all-reduce")


def choose(nodes: Sequence[str], bad: Mapping[str, str], num_needed: int) -> tuple[str, ...]:
    """Return the first `num_needed` usable nodes.

    Args:
        nodes: All nodes of the job.
        bad: A description of the faults of each faulty node, by the node's name.
        num_needed: The number of nodes that the run needs.

    Raises:
        BadNodesError: If fewer nodes are usable.
    """
    good = tuple(n for n in nodes if n not in bad)
    if len(good) >= num_needed:
        return good[:num_needed]
    named = "; ".join(f"{node}: {fault}" for node, fault in sorted(bad.items()))
    common = [f for f in bad[nodes[0]].split("; ") if all(_kind(f) in _kind(bad[n]) for n in nodes)] if not good else []
    if common:  # Other nodes would fail as well.
        variable = next((word.strip("()") for word in common[0].split() if word.startswith("(PREFLIGHT_")), None)
        remedy = f"export a smaller {variable} if this is enough (slurm/env.sh)" if variable else "fix this first"
        raise BadNodesError(f"all {len(nodes)} nodes fail the same check: {common[0]}; {remedy}", sorted(bad))
    without = ",".join(sorted(bad))
    raise BadNodesError(
        f"{num_needed} nodes are needed, but only {len(good)} of {len(nodes)} are usable; {named}; "
        f"request spares (sbatch --nodes={num_needed}-{num_needed + len(bad)}) or exclude them (--exclude={without})",
        sorted(bad),
    )


def _kind(fault: str) -> str:
    """Return a fault without its numbers."""
    return re.sub(r"\d+(\.\d+)?", "#", fault)


def _test_all_reduce(
    allocation: Allocation, nodes: Sequence[str], layout: Layout, environ: Mapping[str, str]
) -> list[str]:
    """Run an all-reduce on `nodes`, and return the nodes that caused it to fail. The list is empty if it succeeded.

    Raises:
        BadNodesError: If the all-reduce failed although all ranks were connected.
    """
    limit_sec = start_limit_sec(len(nodes) * layout.ranks_per_node, environ)
    answers = _answers(srun(allocation, nodes, layout.ranks_per_node, ["trainer.job.all_reduce"]), limit_sec)
    done = [a for a in answers if "gb_per_sec" in a]
    if len(done) == len(nodes) * layout.ranks_per_node:
        slowest = min(done, key=lambda a: float(a["gb_per_sec"]))
        print_timed(
            f"  all-reduce of {slowest['mib']} MiB over {len(done)} ranks: "
            f"{slowest['gb_per_sec']:.2f} GB/s per link (slowest rank, on {slowest['node']})"
        )
        return []
    arrived = Counter(a["node"] for a in answers if a.get("arrived"))
    silent = [node for node in nodes if arrived[node] < layout.ranks_per_node]
    if not silent:
        raise BadNodesError("all ranks were connected, but their all-reduce failed; see its error in the log above", ())
    # The ranks connect to the first node. If no node has all of its ranks connected, the first node is at fault.
    return [nodes[0]] if len(silent) == len(nodes) else silent


def _answers(command: Sequence[str], limit_sec: float) -> list[dict[str, Any]]:
    """Run a job step, and return the JSON objects that its tasks print within `limit_sec` seconds.

    Raises:
        CancelledError: If SIGTERM or SIGINT has ended the step.
    """
    step = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        output, _ = step.communicate(timeout=limit_sec)
    except subprocess.TimeoutExpired:
        step.terminate()
        output, _ = step.communicate()
    else:
        raise_if_cancelled(step.returncode)
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
