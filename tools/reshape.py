"""The former name of `tools.reshard`, which is kept so that existing scripts work."""

from __future__ import annotations

import sys

from tools.reshard import main

if __name__ == "__main__":
    sys.exit(main())
