"""A function that runs a command of the documentation as a reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_earshot(words: Sequence[str], folder: Path, *packages: Path) -> str:
    """Return what `earshot WORDS` prints in a folder, and require that it succeeds.

    Args:
        words: the arguments after `earshot`.
        folder: the current folder of the command.
        packages: folders of further installed packages.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tools", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *packages)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
