"""A function that runs a command of the documentation as a reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_earshot(words: Sequence[str], folder: Path, python: str = sys.executable) -> str:
    """Return what `earshot WORDS` prints in a folder, and require that it succeeds.

    Args:
        words: The arguments after `earshot`.
        folder: The current folder of the command.
        python: The interpreter.
    """
    done = subprocess.run(
        [python, "-m", "tools", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
