"""A short fuzzing run of all parsers. `make fuzz` starts a long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_parser_raises_only_its_own_errors() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "60"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[1])
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert found.stdout.count(" 0 failures") >= 33
