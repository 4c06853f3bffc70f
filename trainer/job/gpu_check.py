"""Check a node's GPUs with their vendor's tool. This module does not import torch.

The installed build of torch determines the vendor. Without the tool, the GPUs are not checked, and the job continues.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NVIDIA_QUERY = "index,name,memory.free,memory.total,ecc.errors.uncorrected.volatile.total"
_NVIDIA = ("nvidia-smi", f"--query-gpu={_NVIDIA_QUERY}", "--format=csv,noheader,nounits")
_AMD = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
_FREE_SHARE = 0.9
"""The fraction of a GPU's memory that must be free."""
_TOOL_SEC = 30.0


@dataclass
class Report:
    """The results of a node's check."""

    node: str
    """The short name of the node."""
    faults: list[str] = field(default_factory=list)
    """The reasons why the node cannot be used; empty if it can."""
    facts: list[str] = field(default_factory=list)
    """The node's resources and the response times of servers."""
    warnings: list[str] = field(default_factory=list)
    """The problems that do not prevent the use of the node."""


def check_gpus(num_wanted: int, report: Report) -> None:
    """Check that the node has `num_wanted` healthy GPUs, and add the result to `report`."""
    if not num_wanted:
        report.facts.append("no GPUs requested")
        return
    is_amd = torch_build().get("hip") is not None
    command = _AMD if is_amd else _NVIDIA
    text = _output(command, report)
    if text is not None:
        (judge_amd if is_amd else judge_nvidia)(text, num_wanted, report)


def torch_build() -> dict[str, Any]:
    """Return the variables of torch's file `version.py`, such as `cuda` and `hip`; empty if torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    path = Path(spec.origin).with_name("version.py")
    return runpy.run_path(str(path)) if path.is_file() else {}


def judge_nvidia(table: str, num_wanted: int, report: Report) -> None:
    """Add faults and facts about NVIDIA's GPUs to a report.

    Args:
        table: The output of `nvidia-smi --query-gpu` for `_NVIDIA_QUERY`.
        num_wanted: The number of GPUs that the node must have.
        report: The report to add to.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    sizes = {i: (int(free), int(total)) for i, _, free, total, _ in rows if free.isdecimal() and total.isdecimal()}
    _judge([row[1] for row in rows], sizes, num_wanted, report)
    for index, _name, _free, _total, errors in rows:
        if errors.isdecimal() and int(errors):  # The value is "[N/A]" if the memory does not count errors.
            report.faults.append(f"GPU {index}: {errors} uncorrected memory errors")


def judge_amd(text: str, num_wanted: int, report: Report) -> None:
    """Add faults and facts about AMD's GPUs to a report. This output of rocm-smi does not contain memory errors.

    Args:
        text: The output of `rocm-smi --showproductname --showmeminfo vram --json`.
        num_wanted: The number of GPUs that the node must have.
        report: The report to add to.
    """
    try:
        cards = {k.removeprefix("card"): v for k, v in json.loads(text).items() if k.startswith("card")}
        sizes = {}
        for index, card in cards.items():
            total, used = (int(card[f"VRAM Total {what}Memory (B)"]) >> 20 for what in ("", "Used "))
            sizes[index] = (total - used, total)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        report.warnings.append(f"GPUs are not checked: the output of rocm-smi cannot be read ({error!r})")
        return
    names = [str(card.get("Card Series", card.get("Card series", "AMD GPU"))) for card in cards.values()]
    _judge(names, sizes, num_wanted, report)
    report.facts.append("memory errors not checked")


def _judge(names: Sequence[str], sizes_mib: dict[str, tuple[int, int]], num_wanted: int, report: Report) -> None:
    """Add the faults and facts that are found in the same way for all vendors.

    `sizes_mib` contains the free and the total memory of each GPU, in MiB.
    """
    if len(names) < num_wanted:
        report.faults.append(f"{len(names)} of {num_wanted} GPUs answer")
    for index, (free, total) in sizes_mib.items():
        if free < _FREE_SHARE * total:
            report.faults.append(f"GPU {index}: {free} of {total} MiB free; another process uses the rest")
    if names:
        memory = f", {min(free for free, _ in sizes_mib.values()) / 1024:.1f} GiB free" if sizes_mib else ""
        report.facts.append(f"{len(names)} × {names[0]}{memory}")


def _output(command: Sequence[str], report: Report) -> str | None:
    """Return the output of the vendor's tool, or None after adding a fault or a warning to `report`."""
    tool = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SEC)
    except FileNotFoundError:
        report.warnings.append(f"GPUs are not checked: no {tool} in PATH")
        return None
    except subprocess.TimeoutExpired:
        report.faults.append(f"{tool} does not answer within {_TOOL_SEC:.0f} s")
        return None
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        report.faults.append(f"{tool} fails with exit code {done.returncode}: {said}")
        return None
    return done.stdout
