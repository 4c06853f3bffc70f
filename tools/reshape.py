"""The former name of `tools.reshard`, kept for existing scripts."""

from __future__ import annotations

import sys

from tools.reshard import main

if __name__ == "__main__":
    sys.exit(main())
