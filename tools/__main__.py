"""The command `python -m tools`, which is equivalent to `earshot`."""

from __future__ import annotations

from tools.cli import run

if __name__ == "__main__":
    run()
