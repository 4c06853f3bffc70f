"""The command `python -m trainer.restart`, which batch scripts call. It is implemented in `trainer.run.restart`."""

from __future__ import annotations

import sys

from trainer.run.restart import main

if __name__ == "__main__":
    sys.exit(main())
