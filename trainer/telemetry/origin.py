"""Facts about the origin of a run, which trackers show as tags."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

PLAN_NAME = "plan.txt"
"""The name of the file in a run's folder that contains the plan of its job, or a summary of its recipe if there is no
plan."""
PLAN_JSON_NAME = "plan.json"
"""The name of the file in a run's folder that contains the numbers of its plan. Measurements of the run are compared
with them."""

_PACKAGES = ("earshot", "torch", "deepspeed", "megatron-core", "transformers")
_PROJECT = Path(__file__).parents[2]
_GIT_SEC = 5.0


def plan_json_name(num_ranks: int | None = None) -> str:
    """Return the name of the file with the numbers of a plan.

    Args:
        num_ranks: The number of ranks of a job that continues on fewer nodes; None for the plan of the run's recipe.
    """
    return PLAN_JSON_NAME if num_ranks is None else f"plan-{num_ranks}-ranks.json"


def origin_of(recipe: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the commit, host, user, job, package versions and recipe digest of a run. Unknown values are omitted.

    Args:
        recipe: The resolved recipe as YAML.
        environ: The environment variables.
    """
    tags = {
        "commit": _commit(),
        "host": socket.gethostname(),
        "user": _user(),
        "job": environ.get("SLURM_JOB_ID", ""),
        "recipe_digest": hashlib.sha256(recipe.encode()).hexdigest()[:12],
    }
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: value for name, value in tags.items() if value}


def _commit() -> str:
    """Return the commit of the checkout, followed by `+` if files were changed; empty outside a checkout."""
    if not (_PROJECT / ".git").exists():
        return ""
    try:
        named = ["git", "-C", str(_PROJECT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(named, capture_output=True, text=True, timeout=_GIT_SEC, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user id
        return ""
