"""Tests that slurm/submit.sh checks whether the ranks fit on the requested nodes. They use a stub of sbatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.corpus import write_corpus
from trainer.job.slurm import Allocation

ROOT = Path(__file__).parents[2]
SBATCH = """#!/bin/bash
printf '%s\\n' "$@" > "$SUBMITTED"
"""
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --gpus-per-node=h100:8
exec python -m trainer.job "$@"
"""


def submit(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run slurm/submit.sh with a stub of sbatch that writes its arguments to the file `submitted`."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "sbatch").write_text(SBATCH)
    (programs / "sbatch").chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment |= {"PATH": path, "SUBMITTED": str(folder / "submitted"), "PYTHONPATH": str(ROOT)}
    command = [str(ROOT / "slurm" / "submit.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("nodes", "tasks", "gpus", "found"),
    [
        ("2", "", "8", (2, 8, 8)),
        ("2-4", "", "h100:4", (4, 4, 4)),
        ("1", "2", "", (1, 2, 0)),
        ("", "", "8", None),
        ("2", "", "", None),
        ("2k", "1", "", None),
    ],
)
def test_the_options_of_sbatch_are_understood(
    nodes: str, tasks: str, gpus: str, found: tuple[int, int, int] | None
) -> None:
    environ = {"SUBMIT_NODES": nodes, "SUBMIT_NTASKS_PER_NODE": tasks, "SUBMIT_GPUS_PER_NODE": gpus}
    asked = Allocation.asked(environ)
    assert (asked and (len(asked.nodes), asked.tasks_per_node, asked.gpus_per_node)) == found
    assert Allocation.asked({}) is None


def test_without_a_script_the_usage_is_printed(tmp_path: Path) -> None:
    done = submit(tmp_path, "--nodes=3")
    assert done.returncode == 2 and done.stderr.startswith("usage: slurm/submit.sh") and done.stderr.count("\n") == 1
    assert not (tmp_path / "submitted").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_too_many_ranks_for_the_nodes_are_refused_before_sbatch(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "job.sh").write_text(SCRIPT)
    keys = [f"data.root={tmp_path}", "data.datasets=[{name: golden, manifest: golden.jsonl}]"]
    keys += ["data.global_batch_samples=24", "data.num_lanes=24"]
    done = submit(tmp_path, "job.sh", "debug", *keys, "parallel.num_ranks=24")
    assert done.returncode == 2 and not (tmp_path / "submitted").exists()
    message = "error: parallel.num_ranks = 24 needs 3 nodes of 8 tasks, but the job has 2: use sbatch --nodes=3, or"
    assert done.stderr.splitlines()[-1].startswith(message), done.stderr
    done = submit(tmp_path, "--nodes=3", "job.sh", "debug", *keys, "parallel.num_ranks=24")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "submitted").read_text().splitlines()[:3] == ["--nodes=3", "job.sh", "debug"]
