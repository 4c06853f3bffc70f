"""A helper that runs a command from the documentation as a reader would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_earshot(words: Sequence[str], folder: Path, python: str = sys.executable) -> str:
    """Run `earshot WORDS` in a folder, check that it succeeds, and return what it prints.

    Args:
        words: The arguments after `earshot`.
        folder: The folder in which the command runs.
        python: The path to the Python interpreter.
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
